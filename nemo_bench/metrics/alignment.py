"""Alignment of images with their prompt."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from nemo_bench.metrics.base import BenchMetric
from nemo_bench.metrics.clip import OpenClip


class Alignment(BenchMetric):
    """Cosine of image and text embedding, always against the original prompt."""

    citation = "Radford et al. 2021; Hessel et al. 2021"
    family = "alignment"
    needs = frozenset({"images", "text"})
    higher_is_better = True
    lower, upper = -1.0, 1.0

    def __init__(self, space: OpenClip) -> None:
        super().__init__(space)
        self.title = f"{space.title} alignment"
        self.description = f"{space.description}, of image and original prompt"

    @override
    def score(self, images: Tensor, text: Tensor) -> Tensor:
        return F.cosine_similarity(images, text[None])
