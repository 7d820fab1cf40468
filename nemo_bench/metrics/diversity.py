"""Diversity of the images of a prompt."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from nemo_bench.metrics.base import BenchMetric
from nemo_bench.metrics.networks import Network
from nemo_bench.metrics.spaces import ImageSpace


class Diversity(BenchMetric):
    """Average pairwise distance, or one minus similarity, of the images of a prompt; none for a single image."""

    citation = "pairwise form as D_SSCD in Hintersdorf et al. 2024, section 4"
    family = "diversity"
    per = "prompt"
    needs = frozenset({"images"})
    higher_is_better = True

    def __init__(self, space: ImageSpace, average: Literal["mean", "median"] = "mean") -> None:
        super().__init__(space)
        self.average = average
        self.lower, self.upper = space.bounds
        if not space.is_distance:
            low, high = space.bounds
            self.lower = None if high is None else 1 - high
            self.upper = None if low is None else 1 - low
        one_minus = "" if space.is_distance else "one minus "
        self.title = f"{space.title} diversity"
        self.description = f"{one_minus}{average} over the pairs of seeds of a prompt of: {space.description}"

    @override
    def score(self, images: Tensor) -> Tensor:
        count = len(images)
        if count < 2:
            return images.new_empty(0)
        rows, columns = torch.triu_indices(count, count, 1, device=images.device)
        values = self.space.compare(images, images)[rows, columns]
        average = values.mean() if self.average == "mean" else values.quantile(0.5)
        return (average if self.space.is_distance else 1 - average).reshape(1)


class Vendi(BenchMetric):
    """Vendi score: the effective number of different images among a prompt's seeds (Friedman and Dieng 2023).

    The cosine similarity of a network is the kernel.
    """

    citation = "Friedman and Dieng 2023"
    family = "diversity"
    per = "prompt"
    needs = frozenset({"images"})
    higher_is_better = True
    lower = 1.0

    def __init__(self, space: Network) -> None:
        super().__init__(space)
        self.title = f"Vendi score ({space.title})"
        self.description = (
            "exponential of the entropy of the eigenvalues of the similarity matrix, divided by their number, of the "
            f"seeds of a prompt: {space.description}"
        )

    @override
    def score(self, images: Tensor) -> Tensor:
        unit = F.normalize(images.double())
        shares = torch.linalg.eigvalsh(unit @ unit.T / len(images)).clamp(min=0)
        return torch.special.entr(shares).sum().exp().reshape(1)
