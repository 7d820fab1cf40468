"""Attention rescaling: cross-attention drawn to the start of the prompt and kept from its padding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion, conditional_rows
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Positive


@dataclass(eq=False)
class AttentionRescaling(Method):
    """Masks the padding tokens and multiplies the start token's logit, in all cross-attention (Ren et al. 2024).

    In place of logits z = q k / sqrt(d) the softmax takes -inf for tokens after the end of the prompt, and C z for its
    start token. As in the public code the mask, with the length of the prompt, holds for unconditional rows as well,
    the factor for conditional rows alone. The public code takes every other row as conditional, which is right for one
    image at a time; here it is the second half of a batch. Attention is computed step by step, which differs from fused
    attention by rounding; a factor of 1 without mask leaves it alone.

    Where the start token's logits are negative, a factor above 1 lowers them, and one below 1 draws attention to the
    start. This is so in most layers of the embedded model, where no factor does much.
    """

    title = "Attention rescaling"
    summary = "cross-attention drawn to the start token, padding masked"
    touches = "cross-attention"
    sourcing = "public code; formulas second hand"
    citation = cite("ren2024unveiling")
    needs = frozenset({"uncompiled"})
    limits = (
        "its factor is that of CLIP's begin token, which T5 lacks, in cross-attention, which is reached in UNets alone"
    )

    #: C. Default of the public script: 1; its published command takes 1.25, others publish 1.1 to 1.5.
    factor: Positive = 1.25
    mask: bool = True  #: Whether tokens after the end token are masked.
    mask_end: bool = False  #: Whether the end token is masked with them, for which ``mask`` must be set.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_end and not self.mask:
            raise ConfigError("AttentionRescaling masks the end token with the padding only: set mask=true as well")

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        if self.factor == 1 and not self.mask:
            yield batch
            return
        lengths = torch.tensor([len(model.tokens(prompt.text)) - self.mask_end for prompt in batch.prompts])

        def rescale(layer: str, logits: Tensor) -> Tensor:
            if self.mask:
                tokens = torch.arange(logits.shape[-1], device=logits.device)
                padding = tokens >= lengths.to(logits.device).repeat(len(logits) // len(lengths))[:, None]
                logits = logits.masked_fill(padding[:, None, None], -math.inf)
            factors = torch.ones(logits.shape[0], logits.shape[-1], device=logits.device)
            factors[conditional_rows(len(logits), len(lengths)), 0] = self.factor
            return logits * factors[:, None, None]

        with model.edit_attention(rescale):
            yield batch
