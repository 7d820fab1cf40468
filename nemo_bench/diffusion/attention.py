"""Attention of pictures to text: the cross-attention of a UNet, logits of attention, and edits of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from nemo_bench.errors import ModelError

_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
Edit = Callable[[str, Tensor], Tensor]
"""Changes attention logits: takes the module path of a layer and its logits, float32, (N, heads, queries, tokens), and
gives the logits that enter the softmax. Queries are the positions of the picture row by row, tokens those of the text.
Logits of padding that the network masks are -inf."""
MASKED = -9e3
"""Where padding is masked by a bias: diffusers adds -10000 to its logits, which bfloat16 rounds."""


class Crossing(NamedTuple):
    """Where the picture attends to text in an attention layer."""

    queries: slice = slice(None)  #: Positions of the picture.
    keys: slice = slice(None)  #: Positions of the text.


EVERYWHERE = Crossing()
"""Cross-attention: keys are those of the text alone."""


@contextmanager
def edit_attention(layers: Mapping[str, nn.Module], edit: Edit, crossing: Crossing = EVERYWHERE) -> Iterator[None]:
    """Edits the logits of attention layers inside the context, once a layer in every pass.

    Plain attention takes the place of fused attention, which has no logits; the two differ by rounding.
    """

    def forward(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with (plain := _PlainAttention(partial(edit, name), crossing)):
            output = original(*args, **kwargs)
        if not plain.called:
            raise ModelError(f"{name}: its attention is none of PyTorch's, so its logits can't be reached")
        return output

    with _forwards(layers, forward):
        yield


class _PlainAttention(TorchFunctionMode):
    """Computes attention step by step inside the context, with edited logits."""

    def __init__(self, edit: Callable[[Tensor], Tensor], crossing: Crossing) -> None:
        super().__init__()
        self.called = False
        self._edit, self._crossing = edit, crossing

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.called = True
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p or is_causal or enable_gqa:
            raise ModelError(
                "attention with dropout, causal mask or shared keys can't be edited; leave this method out"
            )
        logits = (query.shape[-1] ** -0.5 if scale is None else scale) * (query.float() @ key.float().transpose(-1, -2))
        if attn_mask is not None:
            masked = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask <= MASKED
            logits = (logits if attn_mask.dtype == torch.bool else logits + attn_mask).masked_fill(masked, -torch.inf)
        if self._crossing == EVERYWHERE:
            logits = self._edit(logits)
        else:
            places = (..., *self._crossing)
            edited = self._edit(logits[places])
            logits = logits.clone()
            logits[places] = edited
        return logits.softmax(-1).to(value.dtype) @ value


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

    def project(layer: nn.Module, original: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if hidden is not text:
            return original(hidden)
        if layer not in cache:
            cache[layer] = original(hidden)
        return cache[layer].clone()  # foreign hooks may work in place

    with _forwards({layer: layer for layer in layers}, project):
        yield


@contextmanager
def _forwards(layers: Mapping[Any, nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the forward of layers inside the context; the new one gets the layer's key and its own forward first."""
    replaced = [(layer, vars(layer).get("forward")) for layer in layers.values()]
    for key, layer in layers.items():
        layer.forward = partial(forward, key, layer.forward)
    try:
        yield
    finally:
        for layer, own in replaced:
            del layer.forward
            if own is not None:
                layer.forward = own
