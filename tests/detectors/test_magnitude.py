"""Magnitude, by hand."""

from __future__ import annotations

import pytest
import torch

from detector_views import PROMPT, generation, score_of
from nemo_bench.detectors import (
    Magnitude,
)
from nemo_bench.diffusion import Diffusion, Similarity
from tiny import tiny_sd2


def test_magnitude_is_the_mean_of_the_norms_of_images(tiny: Diffusion) -> None:
    observed = [{"magnitude": torch.tensor([3.0, 5.0])}, {"magnitude": torch.tensor([1.0, 2.0])}]
    found = Magnitude(seeds=2).score(tiny, PROMPT, observed, None)
    assert found.score == pytest.approx(2.75)
    assert found.details == {"by_step": [4.0, 1.5]}
    latents, text = generation(tiny, 2)
    t = tiny.timesteps()[0]
    difference = tiny.predict_noise(latents, t, text) - tiny.predict_noise(latents, t, tiny.unconditional(2))
    norms = difference.square().sum((1, 2, 3)).sqrt()
    assert score_of(tiny, Magnitude(seeds=2, steps=1)).score == pytest.approx(float(norms.mean()), rel=1e-4)


def test_magnitude_of_a_velocity_model_is_that_of_its_noise() -> None:
    model = Diffusion(tiny_sd2(), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))
    latents, text = generation(model, 1)
    t = model.timesteps()[0]
    with torch.no_grad():
        halves = [model.unet(latents, t, c.text).sample for c in (text, model.unconditional(1))]
    root = model.signal(t) ** 0.5
    expected = root * (halves[0] - halves[1]).norm()
    assert score_of(model, Magnitude(seeds=1, steps=1)).score == pytest.approx(float(expected), rel=1e-4)


def test_magnitude_of_some_steps_equals_the_first_ones_of_all(tiny: Diffusion) -> None:
    whole, part = score_of(tiny, Magnitude(seeds=2)), score_of(tiny, Magnitude(seeds=2, steps=3))
    assert len(whole.details["by_step"]) == tiny.steps
    assert part.details["by_step"] == pytest.approx(whole.details["by_step"][:3], rel=1e-3)
