from __future__ import annotations

import pytest
import torch

from batches import batch_of, images_of
from nemo_bench import Diffusion, ModelError
from nemo_bench.methods import BrightEndingOptimization
from nemo_bench.methods.bright_ending import bright_ending
from tiny import tiny_sdxl


def test_the_mask_is_the_attention_to_the_end_in_the_last_step(tiny: Diffusion) -> None:
    """Computed again from queries and keys of the two layers, in the last pass of a plain generation."""
    batch, seen = batch_of(tiny, [(0, 0), (1, 0)], ["red sun", "red sun map fox"]), dict[str, torch.Tensor]()
    layers = [f"down_blocks.0.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1)]
    hooks = [
        tiny.unet.get_submodule(f"{layer}.{part}").register_forward_hook(
            lambda _m, _a, output, name=f"{layer}.{part}": seen.update({name: output})
        )
        for layer in layers
        for part in ("to_q", "to_k")
    ]
    tiny.generate(batch.text, batch.latents)
    for hook in hooks:
        hook.remove()
    expected = torch.zeros(2, 256)
    for row, end in enumerate((3, 5)):  # start, words, end
        for layer in layers:
            heads = tiny.unet.get_submodule(layer).heads
            query, key = (seen[f"{layer}.{part}"][2 + row].chunk(heads, 1) for part in ("to_q", "to_k"))
            for q, k in zip(query, key, strict=True):
                weights = (q @ k.T / q.shape[1] ** 0.5).softmax(1)
                expected[row] += weights[:, end] / heads / len(layers)
    found = bright_ending(tiny, batch.prompts, batch.text, batch.latents)
    torch.testing.assert_close(found, expected.view(2, 16, 16), rtol=0, atol=1e-4)


def test_steps_follow_the_masked_magnitude(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0)])
    mask = bright_ending(tiny, batch.prompts, batch.text, batch.latents)
    leaf = batch.text.text.clone().requires_grad_()
    optimizer = torch.optim.AdamW([leaf], lr=0.05)
    for _ in range(2):
        both = torch.cat([tiny.unconditional(1).text, leaf])
        unconditional, conditional = tiny.unet(batch.latents.expand(2, -1, -1, -1), 981, both).sample
        value = ((conditional - unconditional) * mask).norm() / mask.mean()
        (gradient,) = torch.autograd.grad(value, [leaf])
        gradient[:, 0] = 0
        leaf.grad = gradient
        optimizer.step()
    before = tiny.row_passes
    with BrightEndingOptimization(0.0, steps=2).apply(tiny, batch) as changed:
        torch.testing.assert_close(changed.text.text, leaf.detach(), rtol=0, atol=3e-3)
    # A generation for the mask, the unconditional noise, and two passes with their gradients.
    assert tiny.row_passes - before == tiny.passes_per_image + 1 + 2 * 2


def test_masks_do_not_depend_on_the_batch(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (0, 1), (1, 0)])
    together = bright_ending(tiny, batch.prompts, batch.text, batch.latents)
    for row in range(3):
        one = batch.rows([row])
        torch.testing.assert_close(
            bright_ending(tiny, one.prompts, one.text, one.latents), together[[row]], rtol=0, atol=1e-4
        )


def test_sdxl_has_no_such_mask() -> None:
    model = Diffusion(tiny_sdxl(), steps=2, guidance=3.0)
    with pytest.raises(ModelError, match=r"no cross-attention in its down_blocks\.0"):
        images_of(model, BrightEndingOptimization(), batch_of(model, [(0, 0)]))
