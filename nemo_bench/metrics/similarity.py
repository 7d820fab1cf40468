"""Similarity to training images."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from nemo_bench.metrics.base import BenchMetric

CHUNK = 16
"""References compared at a time, so that memory does not grow with their number."""


def best_ssim(images: Tensor, references: Tensor) -> Tensor:
    """SSIM of every image to the reference it is most like.

    Args:
        images: (S, 3, H, W) in [0, 1].
        references: (R, 3, H, W) in [0, 1].

    Returns:
        (S,) values in [-1, 1]; empty if there is no reference.
    """
    if not len(references):
        return images.new_empty(0)
    return torch.stack([max(_ssim(image, some).max() for some in references.split(CHUNK)) for image in images])


def _ssim(image: Tensor, references: Tensor) -> Tensor:
    values = structural_similarity_index_measure(
        image.expand_as(references), references, data_range=1.0, reduction="none"
    )
    return values.reshape(-1)  # type: ignore[union-attr]


class TrainingImageSSIM(BenchMetric):
    """SSIM to the prompt's training image, the best over its references."""

    title = "SSIM to training image"
    description = (
        "SSIM (Gaussian window 11, sigma 1.5, data range 1) to the prompt's own training image, best reference"
    )
    citation = "Wang et al. 2004; used for memorization in Hintersdorf et al. 2024, supplement"
    needs = frozenset({"images", "references"})
    higher_is_better = False
    lower, upper = -1.0, 1.0

    def score(self, images: Tensor, references: Tensor) -> Tensor:  # type: ignore[override]
        """See :func:`best_ssim`."""
        return best_ssim(images, references)


class NearestTrainingImageSSIM(BenchMetric):
    """SSIM to the nearest of all known training images: a method can swap one copy for another."""

    title = "SSIM to nearest"
    description = "SSIM to the most similar of all reference images of the prompt list, whichever prompt they belong to"
    citation = "Wang et al. 2004"
    needs = frozenset({"images", "pool"})
    higher_is_better = False
    lower, upper = -1.0, 1.0

    def score(self, images: Tensor, pool: Tensor) -> Tensor:  # type: ignore[override]
        """See :func:`best_ssim`."""
        return best_ssim(images, pool)
