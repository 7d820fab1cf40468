"""Neurons in random order: what can be had by chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.localization.localizers.base import Inputs, Ranker
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import seed_of
from nemo_bench.records.ranges import Index


@dataclass(eq=False, kw_only=True)
class RandomOrder(Ranker):
    """Scores that are drawn for each prompt."""

    title = "Random order"
    summary = "neurons in random order: what is found by chance (control)"
    sourcing = "a control"

    seed: Index = 0  #: Seed of the draw.

    @override
    def score(self, model: Diffusion, prompt: Prompt, inputs: Inputs) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(["random order", self.seed, prompt.id]))
        return {layer: torch.rand(width, generator=generator) for layer, width in model.masks.widths.items()}
