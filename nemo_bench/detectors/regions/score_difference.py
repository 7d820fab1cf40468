"""Where the prompt changes the score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import View
from nemo_bench.detectors.regions.base import RegionLocalizer
from nemo_bench.diffusion.noise import score_difference
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class ScoreDifference(RegionLocalizer):
    """Square of the score difference in the last step, summed over channels (Kim and Lee 2026).

    With e_c and e_u the noises predicted for the prompt and for the empty one, it is |e_c - e_u|^2 / sigma^2 of each
    place, which the paper has stand in for the curvature difference at the end of sampling. It takes no derivatives.
    """

    title = "Score difference"
    summary = "where the prompt changes the score in the last step"
    sourcing = "public code and abstract"
    citation = cite("kim2026localizing")

    seeds: Count = 4

    @override
    def heat(self, view: View) -> Tensor:
        return score_difference(view.step.difference, (1 - view.model.signal(view.timestep)) ** 0.5).square().sum(1)
