"""Metrics, each a torchmetrics Metric with declared needs, range and direction."""

from nemo_bench.metrics.alignment import Alignment, ClipJudge
from nemo_bench.metrics.base import BenchMetric
from nemo_bench.metrics.diversity import Diversity
from nemo_bench.metrics.localization import MemorizationScore, NeuronCount
from nemo_bench.metrics.similarity import NearestTrainingImageSSIM, TrainingImageSSIM, best_ssim

__all__ = [
    "Alignment",
    "BenchMetric",
    "ClipJudge",
    "Diversity",
    "MemorizationScore",
    "NearestTrainingImageSSIM",
    "NeuronCount",
    "TrainingImageSSIM",
    "best_ssim",
]
