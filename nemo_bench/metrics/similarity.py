"""Similarity to training images, and to the image that the same seed gives without mitigation."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.metrics.base import BenchMetric
from nemo_bench.metrics.spaces import ImageSpace, Pool


class _Comparison(BenchMetric):
    """A comparison of each image with others, in the range of its space."""

    name: ClassVar[str]
    others: ClassVar[str]

    def __init__(self, space: ImageSpace) -> None:
        super().__init__(space)
        self.title = f"{space.title} to {self.name}"
        self.description = f"{space.description}, to {self.others}"
        self.citation = space.citation
        self.lower, self.upper = space.bounds
        if self.family == "memorization":  # far from training images is better
            self.higher_is_better = space.is_distance


class ReferenceMetric(BenchMetric):
    """A metric of comparisons with the prompt's own training images, which all such metrics of a space share."""

    family = "memorization"
    needs = frozenset({"images", "references"})

    @abstractmethod
    def judge(self, values: Tensor) -> Tensor:
        """Scores, (S,), by the comparisons of S images with R training images in the space, (S, R)."""

    @override
    def score(self, images: Tensor, references: Tensor) -> Tensor:
        return self.judge(self.space.compare(images, references))


class TrainingImage(_Comparison, ReferenceMetric):
    """Similarity of an image to its prompt's training image; of several references the most similar one counts."""

    name, others = "training image", "the prompt's own training image, best reference"
    role = "training_similarity"

    @override
    def judge(self, values: Tensor) -> Tensor:
        return self.space.best(values)


class NearestTrainingImage(_Comparison):
    """Similarity of an image to the nearest of all known training images: a method can swap one copy for another."""

    name = "nearest"
    others = "the most similar of all reference images of the prompt list, whichever prompt they belong to"
    family = "memorization"
    role = "nearest_training_similarity"
    needs = frozenset({"images", "pool"})
    by_image = True

    @override
    def score(self, images: Tensor, pool: Tensor | Pool, known: Tensor | None = None) -> Tensor:
        prepared = self.space.pool(pool) if isinstance(pool, Tensor) else pool
        return prepared.nearest(images, known)[0]


class Change(_Comparison):
    """Similarity of an image to the image of the same seed without mitigation.

    Images of memorized prompts should change, others should stay: neither direction is better.
    """

    name, others = "unmitigated", "the image of the same seed without mitigation"
    family = "change"
    needs = frozenset({"images", "unmitigated"})
    by_image = True

    @override
    def score(self, images: Tensor, unmitigated: Tensor) -> Tensor:
        return self.space.pair(images, unmitigated)


class MemorizationRate(ReferenceMetric):
    """Share of images whose similarity to their training image is above a threshold, or whose distance is below it.

    It is nan where that is not finite.
    """

    role = "memorization_rate"
    higher_is_better = False
    lower, upper = 0.0, 1.0

    def __init__(self, space: ImageSpace, threshold: float) -> None:
        super().__init__(space)
        self.threshold = threshold
        sign, word = ("<", "below") if space.is_distance else (">", "above")
        self.title = f"Memorized ({space.title} {sign} {threshold:g})"
        self.description = (
            f"share of images {word} {threshold:g} in {space.description}, to the prompt's best reference"
        )
        self.citation = space.citation

    @override
    def judge(self, values: Tensor) -> Tensor:
        best = self.space.best(values)
        memorized = best < self.threshold if self.space.is_distance else best > self.threshold
        return memorized.double().where(best.isfinite(), torch.nan)
