"""Localizers of regions: where in its images a prompt is memorized, one file each."""

from nemo_bench.detectors.regions.base import RegionLocalizer
from nemo_bench.detectors.regions.bright_ending import EndAttention
from nemo_bench.detectors.regions.curvature_difference import CurvatureDifference
from nemo_bench.detectors.regions.score_difference import ScoreDifference

__all__ = ["CurvatureDifference", "EndAttention", "RegionLocalizer", "ScoreDifference"]
