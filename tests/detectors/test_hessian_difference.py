from __future__ import annotations

import pytest
import torch

from detector_views import view_of
from linear_noise import LinearNoise
from nemo_bench.detectors import HessianDifference
from nemo_bench.diffusion import Diffusion

A, B = [[2.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [3.0, 1.0]]


def test_score_by_hand() -> None:
    """|(A^T A - B^T B) x|^2, which is 9 for A = 2 I, B = I and x = (1, 0)."""
    twice = LinearNoise([[2.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]])
    assert HessianDifference().observe(twice.view([[1.0, 0.0]]))["hessian_difference"].tolist() == [9]
    # A^T A = (4 2; 2 2) and B^T B = (10 3; 3 1): at (1, 0) it is (-6, -1), at (0, 1) (-1, 1).
    found = HessianDifference().observe(LinearNoise(A, B).view([[1.0, 0.0], [0.0, 1.0]]))
    assert found["hessian_difference"].tolist() == [37, 2]


def test_along_the_difference_by_hand() -> None:
    """A - B = (1 1; -3 0), times its transpose (10 1; 1 1)."""
    found = HessianDifference(along="difference").observe(LinearNoise(A, B).view([[1.0, 0.0], [0.0, 1.0]]))
    assert found["hessian_difference"].tolist() == [101, 2]


def test_gradient_of_a_model_is_that_of_finite_differences(tiny: Diffusion) -> None:
    view = view_of(tiny, tiny.latents([0, 1]))
    with torch.no_grad():
        found = HessianDifference().observe(view)["hessian_difference"]

        def value(x: torch.Tensor) -> torch.Tensor:
            halves = [tiny.predict_noise(x, view.timestep, text) for text in (view.text, tiny.unconditional(2))]
            own, empty = (half.double().square().flatten(1).sum(1) for half in halves)
            return (own - empty) / 2

        direction = torch.randn(tiny.latent_shape, generator=torch.Generator().manual_seed(1))
        slope = (value(view.latents + 1e-2 * direction) - value(view.latents - 1e-2 * direction)) / 2e-2
    with torch.enable_grad():
        x = view.latents.clone().requires_grad_()
        halves = [tiny.predict_noise(x, view.timestep, text) for text in (view.text, tiny.unconditional(2).clone())]
        (gradient,) = torch.autograd.grad(
            sum(s * h.square().sum() / 2 for s, h in zip((1, -1), halves, strict=True)), x
        )
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slope.float(), rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(gradient.square().flatten(1).sum(1), found, rtol=1e-3, atol=0)


def test_no_difference_scores_nothing() -> None:
    assert HessianDifference().observe(LinearNoise(A, A).view([[5.0, 2.0]]))["hessian_difference"] == pytest.approx(0)
