"""Sharpness, against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detector_views import PROMPT, generation, score_of, view_of
from nemo_bench.detectors import (
    Sharpness,
)
from nemo_bench.diffusion import Diffusion, Step
from tiny import tiny_sd2


@pytest.mark.parametrize("make", [None, tiny_sd2])
def test_sharpness_equals_the_derivative_along_the_score_difference(tiny: Diffusion, make: Any) -> None:
    model = Diffusion(make(), steps=4, guidance=3.0) if make else tiny
    view = view_of(model, model.latents([0, 1]))
    with torch.no_grad():
        exact = Sharpness().observe(view)["sharpness"]
        sigma = (1 - model.signal(view.timestep)) ** 0.5

        def score(x: Tensor) -> Tensor:
            empty = model.unconditional(2)
            added = model.predict_noise(x, view.timestep, view.text) - model.predict_noise(x, view.timestep, empty)
            return -added / sigma

        direction = score(view.latents)
        slopes = [
            (score(view.latents + step * direction) - score(view.latents - step * direction)) / (2 * step)
            for step in (1e-3, 4e-3)
        ]
        expected = slopes[0].flatten(1).norm(dim=1)
        torch.testing.assert_close(exact, expected, rtol=2e-2, atol=0)
        torch.testing.assert_close(Sharpness(eta=0.05).observe(view)["sharpness"], expected, rtol=3e-2, atol=0)
        torch.testing.assert_close(Sharpness(squared=True).observe(view)["sharpness"], exact**2)
    assert Sharpness().score(model, PROMPT, [{"sharpness": torch.tensor([1.0, 4.0])}], None).score == 2.5


def test_sharpness_of_some_steps_is_their_mean(tiny: Diffusion) -> None:
    latents, text = generation(tiny, 2)
    steps: list[Step] = []

    def keep(step: Step) -> Tensor:
        steps.append(step)
        return step.guided(step.scale)

    tiny.generate(text, latents, rule=keep)
    views = [view_of(tiny, step.latents, step.timestep, number=step.number) for step in steps]
    with torch.no_grad():
        each = [float(Sharpness().observe(view)["sharpness"].mean()) for view in views]
    assert len(each) == 4
    assert each[0] != pytest.approx(each[1], rel=1e-2)
    assert score_of(tiny, Sharpness(seeds=2, steps=2)).score == pytest.approx((each[0] + each[1]) / 2, rel=1e-3)
    assert score_of(tiny, Sharpness(seeds=2, steps=None)).score == pytest.approx(sum(each) / 4, rel=1e-3)
