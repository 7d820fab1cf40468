"""Attention attenuation: cross-attention to the tokens that stand out is weakened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import FiniteFloat
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, UNETS, Diffusion, conditional_rows
from nemo_bench.methods.base import Batch, Method
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import NotNegative

BLOCKS = {"down+mid": ("down_blocks.", "mid_block."), "mid": ("mid_block.",), "all": ("",)}
"""Beginnings of the module paths of the layers that are attenuated, by setting."""
TINY = 1e-6  # Added to a standard deviation, as in the public code.


@dataclass(eq=False)
class AttentionAttenuation(Method):
    """Multiplies the logits of tokens that stand out, in the cross-attention of prompts (Zhao et al. 2026).

    In every step, layer, image and head, M_j is the largest logit of token j over all pixels, and m and s are the mean
    and the unbiased standard deviation of M_j over all tokens but the start token, padding included. Tokens with
    (M_j - m) / (s + 1e-6) above the threshold are spikes; the softmax takes ``factor`` times their logits. The start
    token is never one. Unconditional rows stay as they are. With the published thresholds near 0 about half of all
    tokens are spikes; 3, as the word suggests, is hardly ever reached.

    Nothing is published for transformers; there it is our adaptation, in all layers. Padding that the network masks is
    no token, and T5 has no start token. With joint attention the logits are those of the picture's positions for the
    text's, among those for the picture itself.

    A factor below 1 raises the attention to a spike where its logit is negative: ``raised`` in the notes of an image is
    the share of such logits among those of spikes, ``spikes`` the share of spikes among tokens. In the embedded model
    neither is rare, so it can't show the effect. Attention is computed step by step, which differs from fused attention
    by rounding, and holds the logits of a layer in memory; a factor of 1 leaves it alone.
    """

    title = "Attention attenuation"
    summary = "cross-attention weakened to the tokens that stand out"
    touches = "attention to text"
    sourcing = "public code; paper second hand; transformers: ours"
    families = frozenset(FAMILIES)
    citation = cite("zhao2026attention")
    needs = frozenset({"uncompiled"})

    #: Standard deviations above the mean from which a token is a spike. The public command takes 0.01, within
    #: :class:`GUARD` 0.1.
    threshold: FiniteFloat = 0.01
    factor: NotNegative = 0.3  #: On the logits of spikes; published for all cases.
    #: Layers of a UNet: the seven of the down path and the middle in Stable Diffusion 1.x, as published, those of the
    #: middle, or all. In transformers it is all.
    blocks: Literal["down+mid", "mid", "all"] = "down+mid"
    #: What spikes are found by: the largest ``"logit"``, as in the public code, or ``"probability"``, the paper's
    #: statistic, which the paper reads from a plain pass, but here is that of the attenuated one.
    measure: Literal["logit", "probability"] = "logit"

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        attenuation = Attenuation(self, len(batch.prompts))
        with attenuation.applied(model):
            yield replace(batch, notes=attenuation.notes)


class Attenuation:
    """The edit of one batch.

    Attributes:
        active: Whether logits are edited; plain predictions are made without.
        notes: What the spikes of each image were, filled in at the end; none where a factor of 1 leaves them alone.
    """

    def __init__(self, method: AttentionAttenuation, images: int) -> None:
        self.method = method
        self.images = images
        self.active = True
        self.notes: tuple[dict[str, float], ...] = tuple({} for _ in range(images)) if method.factor != 1 else ()
        self._begins: Sequence[int] = ()
        self._counts = torch.zeros(images, 4, dtype=torch.long)

    @contextmanager
    def applied(self, model: Diffusion) -> Iterator[None]:
        """Edits the attention of a model inside the context."""
        if self.method.factor == 1:
            yield
            return
        self._begins = model.begins
        is_unet = model.family.pipeline_class in UNETS
        with model.edit_attention(self._edit, BLOCKS[self.method.blocks if is_unet else "all"]):
            yield
        for note, (spikes, tokens, raised, logits) in zip(self.notes, self._counts.tolist(), strict=True):
            note["spikes"] = round(spikes / max(tokens, 1), 4)
            note["raised"] = round(raised / max(logits, 1), 4)

    def _edit(self, layer: str, logits: Tensor) -> Tensor:
        if not self.active:
            return logits
        rows = conditional_rows(len(logits), self.images)
        own = logits[rows]
        is_spike = spikes(own, self.method.threshold, self.method.measure, self._begins)
        self._count(own, is_spike)
        edited = logits.clone()
        edited[rows] = torch.where(is_spike[:, :, None], self.method.factor * own, own)
        return edited

    def _count(self, logits: Tensor, is_spike: Tensor) -> None:
        found = is_spike.sum((1, 2))
        tokens = _candidates(logits, self._begins).sum((1, 2))
        raised = ((logits < 0).sum(2) * is_spike).sum((1, 2))
        counts = torch.stack([found, tokens, raised, found * logits.shape[2]], 1)
        self._counts = self._counts.to(counts.device) + counts


def spikes(logits: Tensor, threshold: float, measure: str = "logit", begins: Sequence[int] = (0,)) -> Tensor:
    """Finds the tokens that stand out in attention to text (Zhao et al. 2026).

    Args:
        logits: (N, heads, queries, tokens); those of masked padding are -inf.
        threshold: Standard deviations above the mean.
        measure: ``"logit"`` or ``"probability"``, compared by its largest value over queries.
        begins: Positions of start tokens.

    Returns:
        Booleans, (N, heads, tokens); false for start tokens and masked padding, and where there is one token alone.
    """
    counted = _candidates(logits, begins)
    number = counted.sum(-1, keepdim=True)
    largest = (logits if measure == "logit" else logits.softmax(-1)).amax(2).masked_fill(~counted, 0)
    mean = largest.sum(-1, keepdim=True) / number
    deviation = (largest - mean).masked_fill(~counted, 0)
    std = (deviation.square().sum(-1, keepdim=True) / (number - 1)).sqrt()
    return counted & (deviation / (std + TINY) > threshold)


def _candidates(logits: Tensor, begins: Sequence[int]) -> Tensor:
    """Tokens that may be spikes, (N, heads, tokens)."""
    found = logits.amax(2) > -torch.inf
    found[..., list(begins)] = False
    return found
