"""The dimension that is optimized, its gradient, and what follows from it."""

from __future__ import annotations

import pytest
import torch

from batches import batch_of
from detector_views import view_of
from nemo_bench import Diffusion
from nemo_bench.detectors import IntrinsicDimension
from nemo_bench.diffusion import Sampling
from nemo_bench.methods import DimensionOptimization


@pytest.mark.parametrize("legacy", [False, True])
def test_the_value_is_that_of_the_detector_at_the_same_step(tiny: Diffusion, legacy: bool) -> None:
    batch = batch_of(tiny, [(0, 0), (0, 1)])
    values = DimensionOptimization(step=25, legacy_trace=legacy).measure(tiny, batch.prompts, batch.text, batch.latents)
    sampling = Sampling(tiny, batch.text, batch.latents)
    for _ in range(2):
        sampling.predict()
        sampling.advance()
    view = view_of(tiny, sampling.latents, sampling.timestep, number=2)
    with torch.no_grad():
        found = values([0, 1], batch.text.text)
        detector = IntrinsicDimension(at="running", step=25, legacy_trace=legacy)
        torch.testing.assert_close(-found, detector.observe(view)["dimension"], rtol=1e-3, atol=1e-2)


def test_gradient_of_the_dimension_is_that_of_finite_differences(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    values = DimensionOptimization().measure(tiny, batch.prompts, batch.text, batch.latents)
    leaf = batch.text.text.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(values([0, 1], leaf).sum(), [leaf])
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (values([0, 1], leaf + sign * 1e-2 * direction).sum() for sign in (1, -1))
    assert float((ahead - behind) / 2e-2) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_all_steps_are_taken_and_dimensions_grow(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    method = DimensionOptimization(steps=2)
    values = method.measure(tiny, batch.prompts, batch.text, batch.latents)
    with method.apply(tiny, batch) as changed, torch.no_grad():
        assert (values([0, 1], changed.text.text) < values([0, 1], batch.text.text)).all()
    assert [dict(note) for note in changed.notes] == [{"steps": 2}] * 2
