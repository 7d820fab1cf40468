"""One metric or more of every class, and the fields that they need."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_bench.metrics import (
    FID,
    KID,
    SSIM,
    Alignment,
    BenchMetric,
    Change,
    Diversity,
    MaskedSSIM,
    MemorizationRate,
    MemorizationScore,
    MiFID,
    NearestTrainingImage,
    NeuronAveragePrecision,
    NeuronCount,
    NeuronF1,
    NeuronPrecision,
    NeuronRecall,
    OpenClip,
    PixelDistance,
    RecallAtTrueNumber,
    Segmenter,
    TiledDistance,
    TrainingImage,
    TrainingLoss,
    Vendi,
)
from nemo_bench.records.data import Neurons, Prompt


class LeftHalf(Segmenter):
    """Takes the left half of every picture for the foreground."""

    def __call__(self, pictures: Tensor) -> Tensor:
        found = torch.zeros(len(pictures), *pictures.shape[2:], dtype=torch.bool)
        found[:, :, : pictures.shape[3] // 2] = True
        return found


CLIP = OpenClip("local-dir:anywhere")
"""A space whose network is never loaded."""
PIXELS = [SSIM(), PixelDistance(), TiledDistance()]
METRICS: list[BenchMetric] = [
    *(kind(space) for kind in (TrainingImage, NearestTrainingImage, Change) for space in PIXELS),
    *(MemorizationRate(space, 0.3) for space in PIXELS),
    TrainingImage(CLIP),
    Change(CLIP),
    Alignment(CLIP),
    Diversity(CLIP),
    Diversity(SSIM(), "median"),
    Diversity(PixelDistance()),
    Vendi(CLIP),
    FID(CLIP),
    KID(CLIP, subsets=3),
    MiFID(CLIP),
    MemorizationScore(),
    TrainingLoss(),
    NeuronCount(),
    NeuronPrecision(),
    NeuronRecall(),
    NeuronF1(),
    RecallAtTrueNumber(),
    NeuronAveragePrecision(),
    MaskedSSIM("inside", segmenter=LeftHalf()),
    MaskedSSIM("outside", segmenter=LeftHalf()),
]


class Sample(NamedTuple):
    seed: int
    images: int


SAMPLES = [Sample(1, 3), Sample(2, 2), Sample(3, 2)]


def title(metric: BenchMetric) -> str:
    return metric.title


def pictures(count: int, seed: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size + 4, generator=torch.Generator().manual_seed(seed))


def unit(*rows: tuple[float, ...]) -> Tensor:
    return F.normalize(torch.tensor(rows), dim=-1)


def fields(metric: BenchMetric, sample: Sample) -> dict[str, Any]:
    """The fields of a prompt that a metric needs, as its space embeds them."""
    seed = sample.seed
    counts = {"images": sample.images, "references": 2, "pool": 4, "unmitigated": sample.images, "real": 5, "text": 1}
    values: dict[str, Any] = {
        "memorization": 0.1 * seed,
        "loss": 0.2 * seed,
        "localization": Neurons({"mid": list(range(seed))}),
        "ranking": {"down": np.array([3, 1]), "mid": np.array([0, 4, 2])},
        "truth": Neurons({"mid": [0, 2]}),
        "prompt": Prompt("p", "text"),
    }
    if metric.space == CLIP:
        numbers = torch.Generator().manual_seed(seed)
        values |= {name: torch.randn(count, 4, generator=numbers) for name, count in counts.items()}
        values["text"] = values["text"][0]
    else:
        values |= {name: pictures(count, 10 * seed + place) for place, (name, count) in enumerate(counts.items())}
    return {name: values[name] for name in metric.needs}
