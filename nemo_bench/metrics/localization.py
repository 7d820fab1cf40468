"""Memorization score and number of neurons of a prompt, from its localization."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.metrics.base import BenchMetric
from nemo_bench.records.data import Neurons


class MemorizationScore(BenchMetric):
    """Mean pairwise similarity of the noise differences of a prompt's seeds, with the method applied."""

    title = "Memorization score"
    description = "mean pairwise SSIM of first-step noise differences among seeds, with the mitigation applied"
    citation = "Hintersdorf et al. 2024, section 3.1"
    family = "memorization"
    per = "prompt"
    role = "memorization_score"
    needs = frozenset({"memorization"})
    higher_is_better = False
    lower, upper = -1.0, 1.0

    @override
    def score(self, memorization: float) -> Tensor:
        return torch.tensor([memorization], dtype=torch.float64)


class NeuronCount(BenchMetric):
    """Number of neurons switched off for a prompt."""

    title = "Neurons"
    description = "number of value neurons switched off for the prompt"
    citation = "Hintersdorf et al. 2024, section 4"
    family = "localization"
    per = "prompt"
    role = "neuron_count"
    needs = frozenset({"localization"})
    lower = 0.0

    @override
    def score(self, localization: Neurons) -> Tensor:
        return torch.tensor([localization.count], dtype=torch.float64)
