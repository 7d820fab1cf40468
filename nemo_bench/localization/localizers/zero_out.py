"""Zero-out: each neuron off by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.localization.localizers.attribution import Attribution
from nemo_bench.localization.objectives import Objective
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.io import batched


@dataclass(eq=False, kw_only=True)
class ZeroOut(Attribution):
    """How much the loss rises with one neuron off, the others on.

    It takes a UNet pass for every neuron and draw; rows of a batch have different neurons off.
    """

    title = "Zero-out"
    summary = "how much the loss of the prompt rises with one neuron off at a time"
    citation = cite("chang2024localization")
    sourcing = "paper and public code, for feed-forward neurons of language models; our adaptation"

    @override
    def least_passes(self, widths: Mapping[str, int]) -> int:
        return self.samples * (1 + sum(widths.values()))

    @override
    @torch.no_grad()
    def attribute(self, objective: Objective, prompt: Prompt) -> Mapping[str, Tensor]:
        model, draws = objective.model, range(objective.samples)
        widths = model.masks.widths
        none = torch.cat([objective.losses(part) for part in batched(draws, objective.batch_size)])
        neurons = [Neurons({layer: [index]}) for layer, width in widths.items() for index in range(width)]
        values = []
        for part in batched(list(product(neurons, draws)), objective.batch_size):
            with model.block([blocked for blocked, _ in part]):
                values.append(objective.losses([draw for _, draw in part]))
        rises = (torch.cat(values).unflatten(0, (len(neurons), len(draws))) - none).mean(1)
        return dict(zip(widths, rises.split(list(widths.values())), strict=True))
