from __future__ import annotations

import pytest
import torch

from batches import batch_of, images_of
from nemo_bench import Diffusion
from nemo_bench.methods import EmbeddingOptimization
from nemo_bench.prompts.tasks import seeds_of


def magnitudes(model: Diffusion, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Wen's metric of single images, from two plain passes of the network."""
    each = []
    for row in latents:
        pair = torch.cat([model.unconditional(1).text, text])
        noises = model.unet(row.expand(2, -1, -1, -1), 981, pair).sample
        each.append((noises[1] - noises[0]).norm())
    return torch.stack(each)


@pytest.mark.parametrize("legacy", [False, True])
def test_steps_are_those_of_the_public_script(tiny: Diffusion, legacy: bool) -> None:
    """Two steps for the first four images of a prompt, written out with torch's own AdamW and autograd."""
    batch = batch_of(tiny, [(0, 0)])
    latents = tiny.latents(seeds_of(batch.prompts[0], "generate", range(4)))
    leaf = batch.text.text.clone().requires_grad_()
    optimizer = torch.optim.AdamW([leaf], lr=0.05)
    for _ in range(2):
        each = magnitudes(tiny, latents, leaf)
        (gradient,) = torch.autograd.grad(each.norm() if legacy else each.mean(), [leaf])
        gradient[:, 0] = 0
        leaf.grad = gradient
        optimizer.step()
    method = EmbeddingOptimization(0.0, steps=2, legacy_batch_norm=legacy)
    with method.apply(tiny, batch) as changed:
        torch.testing.assert_close(changed.text.text, leaf.detach(), rtol=0, atol=2e-3)
        # The start is moved by the decay alone.
        torch.testing.assert_close(changed.text.text[:, 0], batch.text.text[:, 0] * (1 - 0.05 * 0.01) ** 2)
        assert changed.notes == ({"steps": 2, "reached": False},)
        assert torch.equal(changed.latents, batch.latents)


def test_gradients_match_finite_differences(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    measure = EmbeddingOptimization().measure(tiny, batch.prompts, batch.text, batch.latents)
    leaf = batch.text.text.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(measure([0, 1], leaf).sum(), [leaf])
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (measure([0, 1], leaf + sign * 1e-2 * direction).sum() for sign in (1, -1))
    assert float((ahead - behind) / 2e-2) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_the_magnitude_falls_to_the_target(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    before = tiny.text_noise(batch.latents, 981, batch.text).flatten(1).norm(dim=1)
    target = 0.8 * float(before.min())
    with EmbeddingOptimization(target, steps=30, images=None).apply(tiny, batch) as changed:
        after = tiny.text_noise(changed.latents, 981, changed.text).flatten(1).norm(dim=1)
    assert (after <= target * 1.0001).all()
    assert (after > 0.3 * target).all()  # it stops there
    assert all(note["reached"] and note["steps"] > 0 for note in changed.notes)


@pytest.mark.parametrize("images", [2, None])
def test_images_do_not_depend_on_their_batch(planted: Diffusion, images: int | None) -> None:
    texts = ["the golden harbor podcast for nine silent stars", "new stories from a midnight garden, why rings by four"]
    batch = batch_of(planted, [(0, 0), (0, 1), (1, 2)], texts)
    together = images_of(planted, EmbeddingOptimization(2.5, images=images), batch)
    for row in range(3):
        alone = images_of(planted, EmbeddingOptimization(2.5, images=images), batch.rows([row]))
        torch.testing.assert_close(together[[row]], alone, rtol=0, atol=2e-2)


def test_images_of_a_prompt_share_an_embedding_optimized_once(tiny: Diffusion) -> None:
    method, batch = EmbeddingOptimization(0.0, steps=2, images=3), batch_of(tiny, [(0, 0), (0, 7), (1, 0)])
    before = tiny.row_passes
    with method.apply(tiny, batch) as changed:
        text = changed.text.text
    # Two prompts of three images: their unconditional noise, then two passes with their gradients.
    assert tiny.row_passes - before == 2 * 3 * (1 + 2 * 2)
    assert torch.equal(text[0], text[1])
    assert not torch.equal(text[0], text[2])
    before = tiny.row_passes
    with method.apply(tiny, batch.rows([2, 1])) as again:
        assert torch.equal(again.text.text, text[[2, 1]])
    assert tiny.row_passes == before


def test_unshared_embeddings_differ_between_images(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (0, 1)])
    with EmbeddingOptimization(0.0, steps=2, images=None).apply(tiny, batch) as changed:
        assert not torch.equal(*changed.text.text)


def test_a_single_norm_is_larger_by_the_root_of_the_images() -> None:
    assert EmbeddingOptimization().target == 1.5
    assert EmbeddingOptimization(legacy_batch_norm=True).target == 3
    values = torch.full((1, 4), 1.5)
    assert float(EmbeddingOptimization().pool(values)) == 1.5
    assert float(EmbeddingOptimization(legacy_batch_norm=True).pool(values)) == 3


def test_prompts_of_one_text_are_two_prompts(tiny: Diffusion) -> None:
    # Their ids give them other starting noise.
    batch = batch_of(tiny, [(0, 0), (1, 0)], ["red sun map"] * 2)
    with EmbeddingOptimization(0.0, steps=1).apply(tiny, batch) as changed:
        assert not torch.equal(*changed.text.text)
