"""What localizing and the noise differences say of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_bench.metrics.base import BenchMetric
from nemo_bench.records.data import Neurons, Record


class MemorizationScore(BenchMetric):
    """Mean pairwise similarity of the noise differences of a prompt's seeds, with the method applied."""

    title = "Memorization score"
    description = "mean pairwise SSIM of first-step noise differences among seeds, with the mitigation applied"
    citation = "Hintersdorf et al. 2024, section 3.1"
    family = "memorization"
    per = "prompt"
    needs = frozenset({"localization"})
    higher_is_better = False
    lower, upper = -1.0, 1.0

    def score(self, localization: Record) -> Tensor:  # type: ignore[override]
        """(1,) value in [-1, 1]; empty where measuring it failed."""
        scores = [localization["memorization"]] if "memorization" in localization else []
        return torch.tensor(scores, dtype=torch.float64)


class NeuronCount(BenchMetric):
    """Number of neurons switched off for a prompt."""

    title = "Neurons"
    description = "number of value neurons switched off for the prompt"
    citation = "Hintersdorf et al. 2024, section 4"
    family = "localization"
    per = "prompt"
    needs = frozenset({"localization"})
    lower = 0.0

    def score(self, localization: Record) -> Tensor:  # type: ignore[override]
        """(1,) count; empty where localizing failed."""
        counts = [Neurons(localization["neurons"]).count] if "neurons" in localization else []
        return torch.tensor(counts, dtype=torch.float64)
