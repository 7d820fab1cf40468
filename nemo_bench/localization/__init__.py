"""Localization of memorization: noise differences, activation statistics, and the search of NeMo."""

from nemo_bench.localization.calibration import (
    ENCODED,
    Calibration,
    activation_moments,
    activation_statistics,
    activations,
    is_readable,
    merge_statistics,
    name_layers,
    pair_scores,
    read_statistics,
    save_moments,
    threshold,
    thresholds,
    write_statistics,
)
from nemo_bench.localization.nemo import LAST_K, NemoSettings, Threshold, localize
from nemo_bench.localization.noise_differences import (
    noise_differences,
    pair_similarities,
    pair_values,
    scaled_difference,
    similarity,
)
from nemo_bench.localization.protocol import PAPER, PROTOCOLS, REFERENCE, SEEDS, Protocol, Velocity

__all__ = [
    "ENCODED",
    "LAST_K",
    "PAPER",
    "PROTOCOLS",
    "REFERENCE",
    "SEEDS",
    "Calibration",
    "NemoSettings",
    "Protocol",
    "Threshold",
    "Velocity",
    "activation_moments",
    "activation_statistics",
    "activations",
    "is_readable",
    "localize",
    "merge_statistics",
    "name_layers",
    "noise_differences",
    "pair_scores",
    "pair_similarities",
    "pair_values",
    "read_statistics",
    "save_moments",
    "scaled_difference",
    "similarity",
    "threshold",
    "thresholds",
    "write_statistics",
]
