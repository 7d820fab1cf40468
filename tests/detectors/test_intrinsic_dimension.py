from __future__ import annotations

from typing import Any

import pytest
import torch

from detector_views import PROMPT, view_of
from linear_noise import LinearNoise
from nemo_bench.detectors import IntrinsicDimension
from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.dimension import intrinsic_dimension, noise_along, probes

SIGNS = torch.tensor([1.0, -1.0])[None, :, None, None]
X = torch.tensor([[3.0, 4.0]])[:, :, None, None]


def scaled(factor: float) -> list[list[float]]:
    return [[factor, 0.0], [0.0, factor]]


@pytest.mark.parametrize(
    ("factor", "latents", "expected"),
    [
        (0.5, X, 2 - 0.8 * 0.5 * 2 + 0.25 * 25),  # D - sigma c D + c^2 |x|^2
        (1 / 0.8, 0 * X, 0.0),  # a point at 0 has no dimension
        (0.0, X, 2.0),
    ],
)
def test_dimension_by_hand(factor: float, latents: torch.Tensor, expected: float) -> None:
    found = intrinsic_dimension(factor * latents, factor * SIGNS, SIGNS, 0.8)
    assert found.tolist() == pytest.approx([expected])


def test_all_signs_together_give_the_trace() -> None:
    matrix = torch.tensor([[1.0, 5.0], [-2.0, 3.0]])
    found = []
    for signs in ([1.0, 1.0], [1.0, -1.0]):
        direction = torch.tensor(signs)[None, :, None, None]
        slope = (matrix @ direction.flatten())[None, :, None, None]
        found.append(float(intrinsic_dimension(torch.zeros(1, 2, 1, 1), slope, direction, 0.8)))
    assert sum(found) / 2 == pytest.approx(2 - 0.8 * 4)


@pytest.mark.parametrize(
    ("settings", "trace", "norm"),
    [
        ({}, 0.1 + 3 * 0.4, 0.1 + 3 * 0.4),  # B + g (A - B)
        ({"legacy_trace": True}, 3 * 0.4, 0.1 + 3 * 0.4),
    ],
)
def test_guided_noise_has_a_guided_trace(settings: dict[str, Any], trace: float, norm: float) -> None:
    model = LinearNoise(scaled(0.5), scaled(0.1))
    view = model.view([[3.0, 4.0]], number=3)
    (direction,) = probes(model, 1)  # type: ignore[arg-type]
    found = IntrinsicDimension(at="running", **settings).observe(view)["dimension"]
    expected = 2 - 0.8 * trace * float(direction.square().sum()) + norm**2 * 25
    assert found.tolist() == pytest.approx([expected], rel=1e-5)


def test_difference_of_dimensions_leaves_the_number_of_elements_out() -> None:
    model = LinearNoise(scaled(0.5), scaled(0.1))
    detector = IntrinsicDimension(at="running", difference=True, probes=2)
    lengths = sum(float(direction.square().sum()) for direction in probes(model, 2)) / 2  # type: ignore[arg-type]
    found = detector.observe(model.view([[3.0, 4.0]], number=3))["dimension"]
    assert found.tolist() == pytest.approx([-0.8 * 0.4 * lengths + (0.25 - 0.01) * 25], rel=1e-5)


def test_clean_latents_are_scaled_to_the_timestep() -> None:
    """At x the noise is 1.3 x, the clean latents (x - 0.8 * 1.3 x) / 0.6, and 0.6 times that is -0.04 x."""
    model = LinearNoise(scaled(0.5), scaled(0.1))
    view = model.view([[3.0, 4.0]], number=3)
    (direction,) = probes(model, 1)  # type: ignore[arg-type]
    expected = 2 - 0.8 * 1.3 * float(direction.square().sum()) + 1.3**2 * 25 * 0.04**2
    assert IntrinsicDimension().observe(view)["dimension"].tolist() == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize(("settings", "there"), [({}, 3), ({"at": "running"}, 3), ({"at": "running", "step": 13}, 1)])
def test_one_step_is_observed(settings: dict[str, Any], there: int) -> None:
    model = LinearNoise(scaled(0.5), scaled(0.1))
    observed = [IntrinsicDimension(**settings).observe(model.view([[3.0, 4.0]], number=n)) for n in range(4)]
    assert [bool(values) for values in observed] == [number == there for number in range(4)]


def test_fewer_dimensions_score_higher(tiny: Diffusion) -> None:
    observed = [{}, {"dimension": torch.tensor([4.0, 8.0])}]
    found = IntrinsicDimension().score(tiny, PROMPT, observed, None)
    assert (found.score, found.details) == (-6.0, {"dimension": 6.0})


def test_derivative_along_a_direction_is_that_of_finite_differences(tiny: Diffusion) -> None:
    view = view_of(tiny, tiny.latents([0, 1]))
    (direction,) = probes(tiny, 1)
    with torch.no_grad():
        noise, slope = noise_along(tiny, view.latents, view.timestep, view.text, direction)
        ahead, behind = (
            tiny.predict_noise(view.latents + step * direction, view.timestep, view.text) for step in (1e-2, -1e-2)
        )
        torch.testing.assert_close(noise, tiny.predict_noise(view.latents, view.timestep, view.text), rtol=0, atol=1e-3)
    expected = (ahead - behind) / 2e-2
    assert (slope - expected).norm() < 2e-2 * expected.norm()
