"""Similarity to training images, and to the image that the same seed gives without mitigation."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_bench.metrics.base import BenchMetric
from nemo_bench.metrics.spaces import ImageSpace


class _Comparison(BenchMetric):
    """A metric whose range is that of its space."""

    def __init__(self, space: ImageSpace) -> None:
        super().__init__(space)
        self.lower, self.upper = space.bounds
        self.citation = space.citation


class TrainingImage(_Comparison):
    """How alike an image and its prompt's training image are; of several references the one most alike counts.

    Args:
        space: What is compared.
    """

    family = "memorization"
    needs = frozenset({"images", "references"})

    def __init__(self, space: ImageSpace) -> None:
        super().__init__(space)
        self.title = f"{space.title} to training image"
        self.description = f"{space.description}, to the prompt's own training image, best reference"

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Far from the training image is better."""
        return self.space.is_distance

    def score(self, images: Tensor, references: Tensor) -> Tensor:  # type: ignore[override]
        """(S,) values; see :meth:`ImageSpace.nearest`."""
        return self.space.nearest(images, references)


class NearestTrainingImage(_Comparison):
    """How alike an image and the nearest of all known training images are: a method can swap one copy for another.

    Args:
        space: What is compared.
    """

    family = "memorization"
    needs = frozenset({"images", "pool"})

    def __init__(self, space: ImageSpace) -> None:
        super().__init__(space)
        self.title = f"{space.title} to nearest"
        self.description = (
            f"{space.description}, to the most similar of all reference images of the prompt list, "
            "whichever prompt they belong to"
        )

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Far from all training images is better."""
        return self.space.is_distance

    def score(self, images: Tensor, pool: Tensor) -> Tensor:  # type: ignore[override]
        """(S,) values; see :meth:`ImageSpace.nearest`."""
        return self.space.nearest(images, pool)


class MemorizationRate(BenchMetric):
    """Share of images that are more like their training image than a threshold.

    Args:
        space: What is compared.
        threshold: Similarity above which, or distance below which, an image counts as memorized.
    """

    family = "memorization"
    needs = frozenset({"images", "references"})
    higher_is_better = False
    lower, upper = 0.0, 1.0

    def __init__(self, space: ImageSpace, threshold: float) -> None:
        super().__init__(space)
        self.threshold = threshold
        beyond = f"{'below' if space.is_distance else 'above'} {threshold:g}"
        self.title = f"Memorized ({space.title} {'<' if space.is_distance else '>'} {threshold:g})"
        self.description = f"share of images {beyond} in {space.description}, to the prompt's best reference"
        self.citation = space.citation

    def score(self, images: Tensor, references: Tensor) -> Tensor:  # type: ignore[override]
        """(S,) ones for memorized images, zeros for others, nan where the similarity is not finite."""
        values = self.space.nearest(images, references)
        memorized = values < self.threshold if self.space.is_distance else values > self.threshold
        return memorized.double().where(values.isfinite(), torch.nan)


class Change(_Comparison):
    """How alike an image and the image of the same seed without mitigation are.

    Where a prompt is memorized the image should change, where it is not it should stay: neither way is better.

    Args:
        space: What is compared.
    """

    family = "change"
    needs = frozenset({"images", "unmitigated"})

    def __init__(self, space: ImageSpace) -> None:
        super().__init__(space)
        self.title = f"{space.title} to unmitigated"
        self.description = f"{space.description}, to the image of the same seed without mitigation"

    def score(self, images: Tensor, unmitigated: Tensor) -> Tensor:  # type: ignore[override]
        """(S,) values; see :meth:`ImageSpace.pair`."""
        return self.space.pair(images, unmitigated)
