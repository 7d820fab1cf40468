"""Change of the prompt's predicted noise between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import FAMILIES, Diffusion
from nemo_bench.diffusion.noise import norms
from nemo_bench.errors import ModelError
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count, Index


@dataclass(eq=False)
class ScoreDynamics(Detector):
    """Squared norm of the change of the noise predicted for a prompt, from one step to the next (anonymous code, 2026).

    Sampling is guided; the conditional noise alone is compared, the mean over images. It is large for every prompt
    whose first steps are large, so compare it with the magnitude. Published with 50 steps; with fewer each step is
    larger, and so is the score.

    Nothing is published for transformers; for flow matching noise is what follows from the velocity, at step 0 the
    latents themselves.
    """

    title = "Score dynamics (DSM)"
    summary = "how much the noise predicted for the prompt changes between two early steps"
    sourcing = "public code; there is no paper yet"
    families = frozenset(FAMILIES)
    citation = cite("anonymous2026early")

    seeds: Count = 1
    first: Index = 1  #: The step, from 0, from which the noise changes to the next one; published: 0 and 1.
    steps: int = field(default=3, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps = self.first + 2

    @override
    def check_model(self, model: Diffusion) -> None:
        if model.steps < self.steps:
            msg = f"{self.title} compares steps {self.first + 1} and {self.steps}, given model.steps={model.steps}"
            raise ModelError(f"{msg}; set first to {max(model.steps - 2, 0)} at most, or take more steps")

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        if view.number < self.first:
            return {}
        return {"noise": view.model.schedule.noise_of(view.conditional, view.timestep, view.latents)}

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        before, after = observed[-2]["noise"], observed[-1]["noise"]
        return DetectorScore(float(norms(after - before).square().mean()))
