"""Alignment of images with their prompt."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nemo_bench.metrics.base import BenchMetric
from nemo_bench.metrics.networks import OpenClip


class Alignment(BenchMetric):
    """Cosine of image and text embedding, always against the original prompt.

    Args:
        space: The open_clip model.
    """

    family = "alignment"
    needs = frozenset({"images", "text"})
    higher_is_better = True
    lower, upper = -1.0, 1.0

    def __init__(self, space: OpenClip) -> None:
        super().__init__(space)
        self.title = f"{space.title} alignment"
        self.description = f"{space.description}, of image and original prompt"
        self.citation = "Radford et al. 2021; Hessel et al. 2021"

    def score(self, images: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        """Cosines, (S,) in [-1, 1]."""
        return F.cosine_similarity(images, text[None])
