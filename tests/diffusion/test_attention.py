from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_bench import Diffusion, ModelError
from nemo_bench.diffusion import conditional_attention, conditional_rows, cross_attentions
from tiny import tiny_pipeline, tiny_sd2, tiny_sdxl, tiny_texts


@pytest.fixture(scope="module", params=[tiny_pipeline, tiny_sd2, tiny_sdxl], ids=["sd1", "sd2", "sdxl"])
def model(request: pytest.FixtureRequest) -> Diffusion:
    make: Callable[[], Any] = request.param
    return Diffusion(make(), steps=3, guidance=3.0)


def test_attention_that_is_not_edited_is_the_models_own(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    plain, processors = model.generate(text, latents), dict(model.unet.attn_processors)
    shapes: dict[str, set[tuple[int, ...]]] = {}

    def look(layer: str, logits: torch.Tensor) -> torch.Tensor:
        shapes.setdefault(layer, set()).add(tuple(logits.shape))
        return logits

    with model.edit_attention(look):
        seen = model.generate(text, latents)
    torch.testing.assert_close(seen, plain, rtol=0, atol=2e-3)
    layers = {name: part for name, part in model.unet.named_modules() if name.endswith("attn2")}
    assert set(shapes) == set(layers)
    first = next(name for name in layers if name.startswith("down_blocks.1"))
    (shape,) = shapes[first]
    assert shape == (4, layers[first].heads, 64, 16)  # two halves of two images, heads, 8x8 pixels, tokens
    assert model.unet.attn_processors == processors
    assert torch.equal(model.generate(text, latents), plain)


def test_logits_are_scaled_products_of_queries_and_keys(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(1)), model.latents([0])
    name = next(n for n, _ in model.unet.named_modules() if n.endswith("attn2"))
    layer, seen = model.unet.get_submodule(name), dict[str, torch.Tensor]()
    hooks = [
        layer.get_submodule(part).register_forward_hook(lambda _m, _a, out, part=part: seen.update({part: out}))
        for part in ("to_q", "to_k")
    ]
    with model.edit_attention(lambda layer, logits: seen.setdefault(layer, logits)):
        model.predict_noise(latents, 981, text)
    for hook in hooks:
        hook.remove()
    width = seen["to_q"].shape[-1] // layer.heads
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        expected = seen["to_q"][0, :, part] @ seen["to_k"][0, :, part].T / width**0.5
        torch.testing.assert_close(seen[name][0, head], expected)


def test_some_blocks_can_be_edited_alone(model: Diffusion) -> None:
    seen = set()
    with model.edit_attention(lambda layer, logits: seen.add(layer) or logits, "down_blocks.1."):
        model.predict_noise(model.latents([0]), 981, model.encode(["red sun map"]))
    assert seen
    assert all(layer.startswith("down_blocks.1.") for layer in seen)


def test_an_error_inside_leaves_the_layers_as_they_were(model: Diffusion) -> None:
    processors = dict(model.unet.attn_processors)
    with pytest.raises(KeyError), model.edit_attention(lambda layer, logits: logits):
        raise KeyError
    assert model.unet.attn_processors == processors
    assert not any("get_attention_scores" in vars(part) for part in model.unet.modules())


def test_editing_missing_layers_or_a_compiled_network_is_an_error(model: Diffusion) -> None:
    with pytest.raises(ModelError, match=r"no cross-attention in its up_blocks\.9"):
        model.edit_attention(lambda layer, logits: logits, "up_blocks.9")
    compiled = Diffusion(tiny_pipeline(), compiled=True)
    with pytest.raises(ModelError, match=r"needs model\.compiled=false"):
        compiled.edit_attention(lambda layer, logits: logits)


def test_conditional_rows_are_all_or_the_second_half() -> None:
    assert list(range(6))[conditional_rows(6, 3)] == [3, 4, 5]
    assert list(range(3))[conditional_rows(3, 3)] == [0, 1, 2]
    with pytest.raises(ModelError, match="5 rows is none of 3 images"):
        conditional_rows(5, 3)


def test_attention_is_that_of_the_conditional_half_averaged_over_heads() -> None:
    third, half = torch.tensor([1.0, 2.0]).log(), torch.tensor([1.0, 1.0]).log()
    # Two halves of one image, two heads, one pixel, two tokens.
    logits = torch.stack([torch.stack([half, half]), torch.stack([third, half])])[:, :, None]
    torch.testing.assert_close(conditional_attention(logits, 1), torch.tensor([[[5 / 12, 7 / 12]]]))
    torch.testing.assert_close(conditional_attention(logits, 2)[0], torch.tensor([[0.5, 0.5]]))


def test_layers_are_in_network_order(model: Diffusion) -> None:
    names = [*cross_attentions(model.unet)]
    if len(names) == 16:  # Stable Diffusion 1 and 2
        assert [name.split(".")[0] for name in names] == ["down_blocks"] * 6 + ["mid_block"] + ["up_blocks"] * 9
        assert names[3] == "down_blocks.1.attentions.1.transformer_blocks.0.attn2"
    called: list[str] = []
    with model.edit_attention(lambda layer, logits: called.append(layer) or logits):
        model.predict_noise(model.latents([0]), 981, model.encode(["red sun map"]))
    assert called == names
    some = tuple(names[:2])
    assert [*cross_attentions(model.unet, some)] == names[:2]
