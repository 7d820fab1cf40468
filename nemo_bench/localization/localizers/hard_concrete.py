"""Hard concrete pruning: random masks that are often exactly 0 or 1, with a penalty on the chance not to be 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.localization.localizers.learned_masks import LearnedMasks, Parameters
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Positive

STRETCH = 1.2
"""Length of the interval that masks are stretched to before they are clipped to [0, 1]."""
BELOW = 0.1
"""Its part below 0."""
EDGE = 1e-4
"""Smallest distance of random numbers from 0 and 1."""


@dataclass(eq=False, kw_only=True)
class HardConcrete(LearnedMasks):
    """Hard concrete masks (Louizos et al. 2018); the score of a neuron is its mask without noise, before stretching."""

    title = "Hard concrete"
    summary = "random masks on neurons, learned with a penalty on those not at 0: what has to stay on for the prompt"
    citation = cite("chang2024localization")
    sourcing = "paper and public code, for feed-forward neurons of language models; our adaptation"

    rate: Positive = 0.1
    weight: Positive = 10.0
    beta: Positive = 0.67  #: Temperature; the smaller, the more masks are 0 or 1.
    mask_p: Annotated[float, Field(gt=0, lt=1)] = 0.5  #: Mask without noise at the start.

    @override
    def start(self, width: int) -> Tensor:
        return torch.full((width,), start_of(self.mask_p))

    @override
    def draw(self, width: int, generator: torch.Generator) -> Tensor:
        return EDGE + (1 - 2 * EDGE) * torch.rand(width, generator=generator)

    @override
    def mask(self, learned: Tensor, drawn: Tensor) -> Tensor:
        return hard_concrete(learned, drawn, self.beta)

    @override
    def penalty(self, learned: Parameters) -> Tensor:
        return torch.stack([chance_of_any(values, self.beta).mean() for values in learned.values()]).mean()

    @override
    def scores(self, learned: Parameters) -> Parameters:
        return {layer: values.sigmoid() for layer, values in learned.items()}


def start_of(mask: float) -> float:
    """The parameter whose mask without noise is ``mask``, in (0, 1)."""
    chance = (mask + BELOW) / STRETCH
    return math.log(chance / (1 - chance))


def hard_concrete(learned: Tensor, drawn: Tensor, beta: float) -> Tensor:
    """Masks in [0, 1] by parameters and uniform random numbers in (0, 1), alike in shape."""
    smooth = ((drawn.logit() + learned) / beta).sigmoid()
    return (STRETCH * smooth - BELOW).clamp(0, 1)


def chance_of_any(learned: Tensor, beta: float) -> Tensor:
    """Chance of each mask to be above 0."""
    return (learned - beta * math.log(BELOW / (STRETCH - BELOW))).sigmoid()
