"""Cross-attention of a UNet: its layers, its logits, and edits of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from nemo_bench.errors import ModelError

_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
Edit = Callable[[str, Tensor], Tensor]
"""Changes attention logits: takes the module path of a layer and its logits, float32, (N, heads, queries, tokens), and
gives the logits that enter the softmax. Queries are the pixels of the layer row by row."""


@contextmanager
def edit_attention(layers: Mapping[str, Any], edit: Edit) -> Iterator[None]:
    """Edits the logits of attention layers inside the context, once a layer in every pass.

    Plain attention takes the place of fused attention, which has no logits; the two differ by rounding.
    """
    from diffusers.models.attention_processor import AttnProcessor

    original = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.set_processor(AttnProcessor())
            layer.get_attention_scores = partial(_edited_scores, layer, name, edit)
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(original[name])
            layer.__dict__.pop("get_attention_scores", None)


def _edited_scores(
    layer: Any, name: str, edit: Edit, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Replaces ``Attention.get_attention_scores`` of diffusers; rows and heads share the first dimension."""
    logits = layer.scale * (query.float() @ key.float().transpose(1, 2))
    edited = edit(name, logits.unflatten(0, (-1, layer.heads)))
    return edited.softmax(-1).flatten(0, 1).to(query.dtype)


def cross_attentions(unet: nn.Module, blocks: str | tuple[str, ...] = "") -> dict[str, Any]:
    """The cross-attention layers of a UNet by module path, in network order: down, middle, up.

    ``blocks`` are beginnings of module paths, such as ``"down_blocks.0."``; ModelError if there is no such layer.
    """
    layers = [(n, m) for n, m in unet.named_modules() if n.endswith("attn2") and n.startswith(blocks)]
    if not layers:
        raise ModelError(f"the UNet has no cross-attention in its {blocks or 'blocks'}")

    def order(name: str) -> list[int]:
        return [_ORDER.get(name.split(".")[0], 3), *map(int, re.findall(r"\d+", name))]

    return dict(sorted(layers, key=lambda layer: order(layer[0])))


def value_layers(unet: nn.Module, layers: str = "down+mid") -> dict[str, nn.Module]:
    """The cross-attention value projections of a UNet by module path, in network order."""
    blocks = "" if layers == "all" else ("down_blocks.", "mid_block.")
    return {f"{name}.to_v": layer.to_v for name, layer in cross_attentions(unet, blocks).items()}


def conditional_attention(logits: Tensor, images: int) -> Tensor:
    """Attention of the pixels of N images to the tokens of their prompts, (N, queries, tokens), the mean over heads."""
    return logits[conditional_rows(len(logits), images)].softmax(-1).mean(1)


def conditional_rows(rows: int, images: int) -> slice:
    """The conditional rows of a UNet pass: all or, under guidance, the second half; ModelError for other numbers."""
    if rows not in (images, 2 * images):
        raise ModelError(f"a UNet pass of {rows} rows is none of {images} images, with guidance or without")
    return slice(rows - images, rows)


@contextmanager
def projected_once(layers: Iterable[nn.Module], text: Tensor, cache: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Reuses outputs of the projections ``to_k`` and ``to_v`` of a text inside the context; adds missing ones.

    The text is known by identity; another one is projected in every pass.
    """

    def project(layer: nn.Module, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if hidden is not text:
            return forward(hidden)
        if layer not in cache:
            cache[layer] = forward(hidden)
        return cache[layer].clone()  # foreign hooks may work in place

    replaced = [(layer, vars(layer).get("forward")) for layer in layers]
    for layer, _ in replaced:
        layer.forward = partial(project, layer, layer.forward)
    try:
        yield
    finally:
        for layer, own in replaced:
            del layer.forward
            if own is not None:
                layer.forward = own
