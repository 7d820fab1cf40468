"""Detectors of memorized prompts, one file each."""

from nemo_bench.detectors.anisotropy import Anisotropy
from nemo_bench.detectors.attention_entropy import AttentionEntropy, LayerEntropy
from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.detectors.bright_ending import BrightEnding
from nemo_bench.detectors.hessian_difference import HessianDifference
from nemo_bench.detectors.intrinsic_dimension import IntrinsicDimension
from nemo_bench.detectors.magnitude import Magnitude
from nemo_bench.detectors.noise_difference import NoiseDifference
from nemo_bench.detectors.one_step import OneStep
from nemo_bench.detectors.score_dynamics import ScoreDynamics
from nemo_bench.detectors.sharpness import Sharpness
from nemo_bench.detectors.tiled_l2 import TiledL2
from nemo_bench.detectors.token_significance import TokenSignificance
from nemo_bench.detectors.watch import watch

__all__ = [
    "Anisotropy",
    "AttentionEntropy",
    "BrightEnding",
    "Detector",
    "DetectorScore",
    "HessianDifference",
    "IntrinsicDimension",
    "LayerEntropy",
    "Magnitude",
    "NoiseDifference",
    "Observed",
    "OneStep",
    "ScoreDynamics",
    "Sharpness",
    "TiledL2",
    "TokenSignificance",
    "View",
    "watch",
]
