"""Slimming: a factor on each neuron, with a penalty on its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.localization.localizers.learned_masks import LearnedMasks, Parameters
from nemo_bench.records.citations import cite


@dataclass(eq=False, kw_only=True)
class Slimming(LearnedMasks):
    """Factors that start at 1 and are clipped to [0, 1] where they are used; the penalty is their mean size.

    A neuron's score is its factor at the end. Factors between 0 and 1 are common, which a set of neurons leaves out.
    """

    title = "Slimming"
    summary = "factors on neurons, learned with a penalty on their size: what has to stay on for the prompt"
    citation = cite("chang2024localization")
    sourcing = "paper and public code, for feed-forward neurons of language models; our adaptation"

    @override
    def start(self, width: int) -> Tensor:
        return torch.ones(width)

    @override
    def mask(self, learned: Tensor, drawn: Tensor) -> Tensor:
        return learned.clamp(0, 1)

    @override
    def penalty(self, learned: Parameters) -> Tensor:
        return torch.cat(list(learned.values())).abs().mean()

    @override
    def scores(self, learned: Parameters) -> Parameters:
        return learned
