"""The one-step attack, against diffusers' Heun sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from detector_views import generation, score_of
from nemo_bench.detectors import (
    OneStep,
)
from nemo_bench.diffusion import Conditioning, Diffusion
from tiny import tiny_sd2


@pytest.mark.parametrize("make", [None, tiny_sd2])
def test_one_step_equals_a_step_of_heuns_method(tiny: Diffusion, make: Any) -> None:
    """A single step from the largest noise level, as in Karras' schedule."""
    model = Diffusion(make(), steps=4, guidance=3.0) if make else tiny
    scheduler = HeunDiscreteScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(timesteps=[999])
    assert len(scheduler.timesteps) == 1
    timestep, sigma = scheduler.timesteps[0], float(scheduler.sigmas[0])
    latents, text = generation(model, 2)
    noise = latents * sigma
    both = Conditioning(torch.cat([model.unconditional(2).text, text.text]))
    scaled = scheduler.scale_model_input(torch.cat([noise, noise]), timestep)
    with torch.no_grad():
        empty, prompted = model.unet(scaled, timestep, both.text).sample.chunk(2)
    there = scheduler.step(empty + 7.5 * (prompted - empty), timestep, noise).prev_sample
    expected = (noise - there).square().mean((1, 2, 3)).mean()
    assert score_of(model, OneStep(seeds=2)).score == pytest.approx(float(expected), rel=2e-3)
