"""A mitigation that breaks some of the images it is given, as one that diverges does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.methods import Batch, Method


class Spoils(Method):
    """Embeddings of some prompts become nan, in every row or in every second one; else nothing is mitigated."""

    title = "Spoils"
    summary = "breaks"

    def __init__(self, prompts: Sequence[str], every: int = 1) -> None:
        self.spoilt, self.every = set(prompts), every

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        wrong = [p.id in self.spoilt and row % self.every == self.every - 1 for row, p in enumerate(batch.prompts)]
        text = batch.text.text.masked_fill(torch.tensor(wrong)[:, None, None], torch.nan)
        yield replace(batch, text=Conditioning(text, batch.text.pooled))
