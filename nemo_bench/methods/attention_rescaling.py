"""Attention rescaling: cross-attention drawn to the start of the prompt and kept from its padding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import UNETS, Diffusion, conditional_rows
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Positive


@dataclass(eq=False)
class AttentionRescaling(Method):
    """Masks the padding tokens and multiplies the start token's logit, in all attention to text (Ren et al. 2024).

    In place of logits z = q k / sqrt(d) the softmax takes -inf for tokens after the end of the prompt, and C z for its
    start token. As in the public code the mask, with the length of the prompt, holds for unconditional rows as well,
    the factor for conditional rows alone. The public code takes every other row as conditional, which is right for one
    image at a time; here it is the second half of a batch. Attention is computed step by step, which differs from fused
    attention by rounding; a factor of 1 without mask leaves it alone.

    Nothing is published for transformers; for Stable Diffusion 3 and Sana it is our adaptation, with the start token of
    CLIP or Gemma. The padding of each encoder is masked, which in Sana it is anyway. With joint attention the logits
    are those of the picture's positions for the text's, among those for the picture itself.

    Where the start token's logits are negative, a factor above 1 lowers them, and one below 1 draws attention to the
    start. This is so in most layers of the embedded model, where no factor does much.
    """

    title = "Attention rescaling"
    summary = "attention drawn to the start token, padding masked"
    touches = "attention to text"
    sourcing = "public code; formulas second hand; transformers: ours"
    citation = cite("ren2024unveiling")
    needs = frozenset({"uncompiled"})
    families = UNETS | {"StableDiffusion3Pipeline", "SanaPipeline"}
    limits = "its factor is that of a begin token, which T5 lacks"

    #: C. Default of the public script: 1; its published command takes 1.25, others publish 1.1 to 1.5.
    factor: Positive = 1.25
    mask: bool = True  #: Whether tokens after the end token are masked.
    #: Whether the end token is masked with them, for which ``mask`` must be set; for UNets alone.
    mask_end: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_end and not self.mask:
            raise ConfigError("AttentionRescaling masks the end token with the padding only: set mask=true as well")

    @override
    def check(self, family: str, guidance: float, dtype: str, *, compiled: bool = False) -> None:
        super().check(family, guidance, dtype, compiled=compiled)
        if self.mask_end and family not in UNETS:
            msg = f"{self.title}: mask_end=true masks CLIP's end token, of UNets alone, given a {family}"
            raise ModelError(f"{msg}; leave it out")

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        if self.factor == 1 and not self.mask:
            yield batch
            return
        images, padding = len(batch.prompts), self._padding(model, batch)

        def rescale(layer: str, logits: Tensor) -> Tensor:
            if self.mask:
                masked = padding.to(logits.device).repeat(len(logits) // images, 1)
                logits = logits.masked_fill(masked[:, None, None], -math.inf)
            factors = torch.ones(logits.shape[0], logits.shape[-1], device=logits.device)
            factors[conditional_rows(len(logits), images), model.begins] = self.factor
            return logits * factors[:, None, None]

        with model.edit_attention(rescale):
            yield batch

    def _padding(self, model: Diffusion, batch: Batch) -> Tensor:
        """Which positions are masked, (images, tokens)."""
        if batch.text.mask is not None:
            return batch.text.mask == 0
        lengths = torch.tensor([len(model.tokens(prompt.text)) - self.mask_end for prompt in batch.prompts])
        return torch.arange(batch.text.text.shape[1]) >= lengths[:, None]
