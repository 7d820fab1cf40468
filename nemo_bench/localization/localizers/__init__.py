"""Localizers: which value neurons memorize a prompt? One file each; NeMo, attributions, pruning and controls."""

from nemo_bench.localization.localizers.activation import Activation
from nemo_bench.localization.localizers.attribution import Attribution
from nemo_bench.localization.localizers.base import Inputs, Localizer, Ranker, Scores, ranks
from nemo_bench.localization.localizers.hard_concrete import HardConcrete
from nemo_bench.localization.localizers.integrated_gradients import IntegratedGradients
from nemo_bench.localization.localizers.learned_masks import LearnedMasks
from nemo_bench.localization.localizers.nemo import NemoLocalizer
from nemo_bench.localization.localizers.outlier_score import OutlierScore
from nemo_bench.localization.localizers.random_order import RandomOrder
from nemo_bench.localization.localizers.slimming import Slimming
from nemo_bench.localization.localizers.true_neurons import TrueNeurons
from nemo_bench.localization.localizers.zero_out import ZeroOut

__all__ = [
    "Activation",
    "Attribution",
    "HardConcrete",
    "Inputs",
    "IntegratedGradients",
    "LearnedMasks",
    "Localizer",
    "NemoLocalizer",
    "OutlierScore",
    "RandomOrder",
    "Ranker",
    "Scores",
    "Slimming",
    "TrueNeurons",
    "ZeroOut",
    "ranks",
]
