"""Cross-attention as methods and detectors see and change it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from nemo_bench.errors import ModelError

_PART = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
Edit = Callable[[str, Tensor], Tensor]
"""Gives the logits that a layer's softmax takes, from its module path and its own logits, float32, (N, heads, queries,
tokens); queries are the pixels of the layer row by row."""


@contextmanager
def edit_attention(layers: Mapping[str, Attention], edit: Edit) -> Iterator[None]:
    """Computes attention step by step while the context is open, with its logits as they are edited.

    It replaces fused attention, which has no logits to look at, and differs from it by rounding.

    Args:
        layers: Attention layers by module path; see :func:`cross_attentions`.
        edit: Called in every pass of every layer.
    """
    kept = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.set_processor(AttnProcessor())
            layer.get_attention_scores = partial(_scores, layer, name, edit)
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(kept[name])
            layer.__dict__.pop("get_attention_scores", None)


def _scores(
    layer: Attention, name: str, edit: Edit, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Stands in for diffusers' ``Attention.get_attention_scores``; rows and heads share the first dimension."""
    logits = layer.scale * (query.float() @ key.float().transpose(1, 2))
    edited = edit(name, logits.unflatten(0, (-1, layer.heads)))
    return edited.softmax(-1).flatten(0, 1).to(query.dtype)


def cross_attentions(unet: nn.Module, blocks: str | tuple[str, ...] = "") -> dict[str, Attention]:
    """The cross-attention layers of a UNet by module path, in network order: down, middle, up.

    Args:
        unet: A diffusers UNet.
        blocks: Beginning of their paths, such as ``"down_blocks.0."``, or several.

    Raises:
        ModelError: There is none.
    """
    found = [(n, m) for n, m in unet.named_modules() if n.endswith("attn2") and n.startswith(blocks)]
    if not found:
        raise ModelError(f"the UNet has no cross-attention in its {blocks or 'blocks'}")

    def order(name: str) -> list[int]:
        return [_PART.get(name.split(".")[0], 3), *map(int, re.findall(r"\d+", name))]

    return dict(sorted(found, key=lambda layer: order(layer[0])))


def conditional_attention(logits: Tensor, images: int) -> Tensor:
    """How much images look at each token: probabilities of their conditional rows, the mean over heads.

    Args:
        logits: What an :data:`Edit` is given.
        images: Number N of images that are generated.

    Returns:
        (N, queries, tokens); sums over tokens are 1.

    Raises:
        ModelError: See :func:`conditional_rows`.
    """
    return logits[conditional_rows(len(logits), images)].softmax(-1).mean(1)


def conditional_rows(rows: int, images: int) -> slice:
    """Which rows of a UNet pass are conditional: all or, with guidance, the second half.

    Args:
        rows: Rows of the pass.
        images: Images that are generated.

    Raises:
        ModelError: The pass has neither one row an image nor two.
    """
    if rows not in (images, 2 * images):
        raise ModelError(f"a UNet pass of {rows} rows is none of {images} images, with guidance or without")
    return slice(rows - images, rows)


@contextmanager
def projected_once(layers: Iterable[nn.Module], text: Tensor, projected: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Takes keys and values of a text from earlier passes while the context is open.

    Args:
        layers: Projections of the text, ``to_k`` and ``to_v`` of cross-attention.
        text: What they project, the very tensor that the UNet is given; other text is projected as ever.
        projected: The outputs known so far, by layer; those missing are added.
    """

    def project(layer: nn.Module, plainly: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if hidden is not text:
            return plainly(hidden)
        if layer not in projected:
            projected[layer] = plainly(hidden)
        return projected[layer].clone()  # hooks of others may work in place

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
