"""Attention rescaling: cross-attention drawn to the start of the prompt and kept from its padding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_bench.diffusion import Diffusion, conditional_rows
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.records.citations import cite


class AttentionRescaling(Method):
    """Masks the padding tokens and multiplies the start token's logit, in all cross-attention (Ren et al. 2024).

    With logits z = q k / sqrt(d) the softmax takes -inf in place of z for tokens after the end of the prompt, and C z
    for its start token. The mask holds for the unconditional rows as well, with the length of the prompt, as in the
    public code; the factor for the conditional rows alone. There, the conditional rows are taken to be every other one,
    which is true of one image at a time; here they are the second half of any batch. Attention is
    computed step by step, which differs from fused attention by rounding; a factor of 1 without mask leaves it alone.

    Where the start token's logits are negative, a factor above 1 lowers them, and one below 1 draws attention to the
    start. So it is in most layers of the embedded model, where no factor does much.

    Args:
        factor: C, above 0. The public script has 1 unless told otherwise; the published command takes 1.25, others
            publish 1.1 to 1.5.
        mask: Whether tokens after the end token are masked.
        mask_end: Whether the end token is masked with them.

    Raises:
        ConfigError: The factor is out of range, or ``mask_end`` is set without ``mask``.
    """

    title = "Attention rescaling"
    summary = "cross-attention drawn to the start token, padding masked"
    touches = "cross-attention"
    sourcing = "public code; formulas second hand"
    citation = cite("ren2024unveiling")
    needs = frozenset({"uncompiled"})

    def __init__(self, factor: float = 1.25, mask: bool = True, mask_end: bool = False) -> None:
        if not 0 < factor < math.inf:
            raise ConfigError(f"attention_rescaling needs a factor above 0, given {factor}")
        if mask_end and not mask:
            raise ConfigError("attention_rescaling masks the end token with the padding only: set mask=true as well")
        self.factor, self.mask, self.mask_end = factor, mask, mask_end

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`.

        Raises:
            ModelError: The UNet is compiled.
        """
        if self.factor == 1 and not self.mask:
            yield batch
            return
        lengths = torch.tensor([len(model.tokens(prompt.text)) - self.mask_end for prompt in batch.prompts])

        def edit(layer: str, logits: Tensor) -> Tensor:
            conditional = conditional_rows(len(logits), len(lengths))
            if self.mask:
                tokens = torch.arange(logits.shape[-1], device=logits.device)
                beyond = tokens >= lengths.to(logits.device).repeat(len(logits) // len(lengths))[:, None]
                logits = logits.masked_fill(beyond[:, None, None], -math.inf)
            factors = torch.ones(logits.shape[0], logits.shape[-1], device=logits.device)
            factors[conditional, 0] = self.factor
            return logits * factors[:, None, None]

        with model.edit_attention(edit):
            yield batch
