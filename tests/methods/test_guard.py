"""GUARD's guidance: by hand, and with a model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from batches import batch_of
from nemo_bench import Diffusion
from nemo_bench.diffusion import Sampling, Step
from nemo_bench.methods import GUARD, AttentionAttenuation
from nemo_bench.methods.guard import projected


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("number", [0, 25, 49])
def test_a_factor_of_1_is_plain_guidance_at_a_lower_scale(tiny: Diffusion, number: int, orthogonal: bool) -> None:
    latents, unconditional, conditional = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    step = Step(number, 1, 7.5, latents, unconditional, conditional)
    model = SimpleNamespace(steps=50)  # makes no pass
    with GUARD(factor=1, orthogonal=orthogonal).apply(model, batch_of(tiny, [(0, 0)])) as changed:  # type: ignore[arg-type]
        assert changed.rule
        found = changed.rule(step)
    torch.testing.assert_close(found, step.guided(7.5 - 2 * math.cos(math.pi * number / 100)))
    assert not changed.notes


@pytest.mark.parametrize("orthogonal", [False, True])
def test_attention_is_attenuated_in_the_attraction_alone(tiny: Diffusion, orthogonal: bool) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    before = tiny.row_passes
    with GUARD(repulsion=1.5, orthogonal=orthogonal).apply(tiny, batch) as changed:
        sampling = Sampling(tiny, changed.text, changed.latents)
        sampling.predict()
        assert changed.rule
        found = changed.rule(sampling.step)
    assert tiny.row_passes - before == 2 * 2 + 2
    assert all(0 < note["spikes"] < 1 for note in changed.notes)
    at = batch.latents, sampling.timestep
    unconditional = tiny.predict_noise(*at, tiny.unconditional(2))
    repelled = tiny.predict_noise(*at, batch.text) - unconditional
    with AttentionAttenuation(threshold=0.1).apply(tiny, batch):
        attracted = tiny.predict_noise(*at, batch.text) - unconditional
    assert (attracted - repelled).abs().max() > 1e-2
    if orthogonal:
        attracted = projected(attracted, repelled)
    expected = unconditional + tiny.guidance * attracted - 1.5 * repelled
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_projection_takes_the_part_along_a_nearly_parallel_direction() -> None:
    attracted = torch.tensor([[2.0, 0.5], [9.0, 1.0], [1.0, 1.0]])[:, :, None, None]
    repelled = torch.tensor([[2.0, 0.0], [1.0, 0.0], [2.0, 0.0]])[:, :, None, None]
    # Cosines 0.970, 0.994 and 0.707; the second coefficient, 9, is clipped to 2.
    found = projected(attracted, repelled).flatten(1)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5], [7.0, 1.0], [1.0, 1.0]]))
