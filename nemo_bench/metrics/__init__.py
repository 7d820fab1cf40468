"""Metrics, each with declared fields, space, range and direction."""

from nemo_bench.metrics.alignment import Alignment
from nemo_bench.metrics.base import FIELDS, BenchMetric
from nemo_bench.metrics.clip import OpenClip
from nemo_bench.metrics.distribution import FID, KID, MiFID, SetMetric
from nemo_bench.metrics.diversity import Diversity, Vendi
from nemo_bench.metrics.localization import (
    MemorizationScore,
    NeuronAveragePrecision,
    NeuronCount,
    NeuronF1,
    NeuronPrecision,
    NeuronRecall,
    RecallAtTrueNumber,
    TrainingLoss,
)
from nemo_bench.metrics.masked import MaskedSSIM, Segmenter
from nemo_bench.metrics.networks import LPIPS, SSCD, Inception, Network
from nemo_bench.metrics.roc import detection
from nemo_bench.metrics.similarity import Change, MemorizationRate, NearestTrainingImage, TrainingImage
from nemo_bench.metrics.spaces import SSIM, ImageSpace, MultiscaleSSIM, PixelDistance, Pixels, TiledDistance

__all__ = [
    "FID",
    "FIELDS",
    "KID",
    "LPIPS",
    "SSCD",
    "SSIM",
    "Alignment",
    "BenchMetric",
    "Change",
    "Diversity",
    "ImageSpace",
    "Inception",
    "MaskedSSIM",
    "MemorizationRate",
    "MemorizationScore",
    "MiFID",
    "MultiscaleSSIM",
    "NearestTrainingImage",
    "Network",
    "NeuronAveragePrecision",
    "NeuronCount",
    "NeuronF1",
    "NeuronPrecision",
    "NeuronRecall",
    "OpenClip",
    "PixelDistance",
    "Pixels",
    "RecallAtTrueNumber",
    "Segmenter",
    "SetMetric",
    "TiledDistance",
    "TrainingImage",
    "TrainingLoss",
    "Vendi",
    "detection",
]
