"""Where memorization sits: noise differences, activation statistics, and NeMo's search."""

from nemo_bench.localization.calibration import Calibration, activation_statistics, activations, threshold
from nemo_bench.localization.nemo import NemoSettings, localize
from nemo_bench.localization.noise import noise_differences, pair_similarities, pair_values, similarity

__all__ = [
    "Calibration",
    "NemoSettings",
    "activation_statistics",
    "activations",
    "localize",
    "noise_differences",
    "pair_similarities",
    "pair_values",
    "similarity",
    "threshold",
]
