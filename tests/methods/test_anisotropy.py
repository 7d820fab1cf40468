from __future__ import annotations

import pytest
import torch

from batches import batch_of, images_of
from nemo_bench import Diffusion
from nemo_bench.methods import AnisotropyOptimization, EmbeddingOptimization
from tiny import tiny_pipeline


def test_the_value_is_norm_and_angle_position_by_position(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    found = AnisotropyOptimization(norm_weight=0.5, angle_weight=3.0).measure(
        tiny, batch.prompts, batch.text, batch.latents
    )([0, 1], batch.text.text)
    for row in range(2):
        both = torch.cat([tiny.unconditional(1).text, batch.text.text[[row]]])
        with torch.no_grad():
            (u, c), (late_u, late_c) = (
                tiny.unet(batch.latents[[row]].expand(2, -1, -1, -1), t, both).sample for t in (981, 41)
            )
        norm, cosines = float((c - u).norm()), []
        for y in range(16):
            for x in range(16):
                a, b = late_u[:, y, x], (late_c - late_u)[:, y, x]
                cosines.append(float(a @ b / (a.norm() * b.norm())))
        expected = 0.5 * norm + 3.0 * sum(cosines) / len(cosines)
        assert float(found[row]) == pytest.approx(expected, rel=1e-3)


def test_angle_of_velocities_matches_the_network_with_gradients() -> None:
    model = Diffusion(tiny_pipeline(0, "v_prediction"))
    batch = batch_of(model, [(0, 0)])
    method = AnisotropyOptimization(norm_weight=0.0, angle_weight=1.0, angle_of="prediction")
    leaf, own = (batch.text.text.clone().requires_grad_() for _ in range(2))
    found = method.measure(model, batch.prompts, batch.text, batch.latents)([0], leaf)
    unconditional = model.unet(batch.latents, 41, model.unconditional(1).text).sample.detach()
    added = model.unet(batch.latents, 41, own).sample - unconditional
    expected = torch.nn.functional.cosine_similarity(unconditional, added, dim=1).mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)
    gradients = [torch.autograd.grad(value, one)[0] for value, one in ((found.sum(), leaf), (expected, own))]
    assert torch.cosine_similarity(*(one.flatten() for one in gradients), dim=0) > 0.999


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (1.0, 2.0)])
def test_gradients_match_finite_differences(tiny: Diffusion, weights: tuple[float, float]) -> None:
    batch = batch_of(tiny, [(0, 0)])
    method = AnisotropyOptimization(norm_weight=weights[0], angle_weight=weights[1])
    measure = method.measure(tiny, batch.prompts, batch.text, batch.latents)
    leaf = batch.text.text.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(measure([0], leaf).sum(), [leaf])
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (measure([0], leaf + sign * 1e-2 * direction) for sign in (1, -1))
    assert float((ahead - behind) / 2e-2) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_without_angle_the_norm_alone_is_optimized(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    with AnisotropyOptimization(0.0, steps=2, images=None, angle_weight=0.0).apply(tiny, batch) as changed:
        found = changed.text.text
    with EmbeddingOptimization(0.0, steps=2, images=None).apply(tiny, batch) as expected:
        torch.testing.assert_close(found, expected.text.text, rtol=0, atol=2e-3)


def test_each_step_takes_two_passes(tiny: Diffusion) -> None:
    batch, before = batch_of(tiny, [(0, 0)]), tiny.row_passes
    with AnisotropyOptimization(0.0, steps=2, images=3, norm_weight=1e3).apply(tiny, batch):
        assert tiny.row_passes - before == 3 * 2 * (1 + 2 * 2)


def test_below_the_target_the_image_is_the_same(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0)])
    assert torch.equal(images_of(tiny, AnisotropyOptimization(1e9), batch), tiny.generate(batch.text, batch.latents))
