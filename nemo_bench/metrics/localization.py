"""What is known of a prompt without its images: memorization score, training loss, neurons, how many are true ones."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
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


class TrainingLoss(BenchMetric):
    """The training loss of a prompt's pictures with the method applied, at noise and timesteps that never change.

    A memorized prompt's pictures are its training images, another prompt's those of ``prompts.controls``, on which the
    model was not trained: the loss of the one that is below that of the other is what was memorized. It is measured
    where ``loss_draws`` says over how many draws.
    """

    title = "Training loss"
    description = (
        "training loss of the prompt's training images, or of held-out pictures where it is not memorized, at fixed "
        "noise and timesteps with the mitigation applied"
    )
    citation = "Ghosal et al. 2025"
    family = "memorization"
    per = "prompt"
    role = "training_loss"
    needs = frozenset({"loss"})
    lower = 0.0

    @override
    def score(self, loss: float) -> Tensor:
        return torch.tensor([loss], dtype=torch.float64)


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


class _OfTruth(BenchMetric):
    """A comparison with the neurons that are known to memorize a prompt; other prompts have no score."""

    citation = "Chang et al. 2024, section 4"
    family = "localization"
    per = "prompt"
    higher_is_better = True
    lower, upper = 0.0, 1.0
    computed_by: ClassVar[str]  #: Module and name below ``torchmetrics.functional``, imported when needed.

    @property
    def function(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The function of torchmetrics, of a prediction for each neuron and whether it is a true one."""
        return pkgutil.resolve_name(f"torchmetrics.functional.{self.computed_by}")


class _OfSet(_OfTruth):
    """A comparison of the neurons switched off with the true ones."""

    needs = frozenset({"localization", "truth"})

    @override
    def score(self, localization: Neurons, truth: Neurons) -> Tensor:
        both = [(layer, index) for layer, ids in (localization | truth).items() for index in ids]
        found = torch.tensor([index in localization.get(layer, ()) for layer, index in both])
        true = torch.tensor([index in truth.get(layer, ()) for layer, index in both])
        return self.function(found.int(), true.int())[None].double()


class NeuronPrecision(_OfSet):
    """Share of the neurons switched off that are true ones."""

    title = "Precision"
    description = "share of the neurons switched off that are known to memorize the prompt; 0 where none are off"
    role = "precision"
    computed_by = "classification:binary_precision"


class NeuronRecall(_OfSet):
    """Share of the true neurons that are switched off."""

    title = "Recall"
    description = "share of the neurons known to memorize the prompt that are switched off"
    role = "recall"
    computed_by = "classification:binary_recall"


class NeuronF1(_OfSet):
    """Harmonic mean of precision and recall of the neurons switched off."""

    title = "F1"
    description = "harmonic mean of precision and recall of the neurons switched off"
    role = "f1"
    computed_by = "classification:binary_f1_score"


class _OfRanking(_OfTruth):
    """A judgement of where a localizer ranks the true neurons."""

    needs = frozenset({"ranking", "truth"})

    @override
    def score(self, ranking: Mapping[str, NDArray[np.int64]], truth: Neurons) -> Tensor:
        places = torch.cat([torch.from_numpy(own) for own in ranking.values()])
        true = torch.cat([
            torch.tensor([index in truth.get(layer, ()) for index in range(len(own))]) for layer, own in ranking.items()
        ])  # fmt: skip
        # Above 0: torchmetrics takes what has no such score for not retrieved.
        return self.function((len(places) - places).float(), true)[None].double()


class RecallAtTrueNumber(_OfRanking):
    """Share of the true neurons among as many that are ranked highest."""

    title = "Recall at true number"
    description = "share of the n neurons known to memorize the prompt among the n ranked highest"
    role = "recall_at_true_number"
    computed_by = "retrieval:retrieval_r_precision"


class NeuronAveragePrecision(_OfRanking):
    """Mean precision of the ranking at each true neuron."""

    title = "Average precision"
    description = "mean, over the neurons known to memorize the prompt, of the share of such neurons down to its rank"
    role = "average_precision"
    computed_by = "retrieval:retrieval_average_precision"
