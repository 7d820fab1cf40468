"""Magnitude at high noise and direction at low noise, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from nemo_bench.detectors.base import Detector, Finding, View, check_counts, check_finite
from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.noise import LATE, mean_cosine, norms
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt

AngleOf = Literal["noise", "prediction"]
Sides = Literal["unconditional_difference", "conditional_difference", "unconditional_conditional"]


class Anisotropy(Detector):
    """Weighted sum of the magnitude and of an angle, without sampling (Asthana and Belagiannis 2026).

    Both are taken on pure noise, however many steps generate: the magnitude at the timestep of the first of 50 DDIM
    steps (981 for Stable Diffusion), the angle at that of the third last (41). The angle is the cosine over channels
    between two predictions at each position, then the mean over positions. Both are means over images. Of models that
    predict velocity it is the magnitude of the predicted noise; the public code takes that of the score, larger by less
    than 1%. Its angle is that of velocities, ``angle_of="prediction"``; of noise it can have the other sign. Its option
    to divide predictions by their L1 or L2 norms first, off by default, is left out.

    Weights are those of the public code for Stable Diffusion 1.4. The paper fits them on 20 memorized prompts by
    logistic regression and finds 1 and 1 to work as well; its first weight is that of the angle.

    Args:
        seeds: Images a prompt.
        norm_weight: Of the magnitude.
        angle_weight: Of the angle.
        angle_between: Which predictions: ``"unconditional_difference"`` as published, unconditional noise and what the
            prompt adds to it; ``"conditional_difference"`` and ``"unconditional_conditional"`` are other modes of the
            public code.
        angle_of: Between what: the noise predicted, or what the network itself predicts, which may be velocity.

    Raises:
        ConfigError: There are no seeds, or a weight is not finite.
    """

    title = "Anisotropy"
    summary = "first-step magnitude plus the angle of the text-conditional noise at low noise"
    sourcing = "public code"
    citation = cite("asthana2026detecting")

    def __init__(
        self,
        seeds: int = 1,
        norm_weight: float = 1.0,
        angle_weight: float = 2.0,
        angle_between: Sides = "unconditional_difference",
        angle_of: AngleOf = "noise",
    ) -> None:
        check_counts(self.title, seeds)
        check_finite(self.title, norm_weight=norm_weight, angle_weight=angle_weight)
        self.seeds, self.norm_weight, self.angle_weight, self.angle_between = (
            seeds,
            norm_weight,
            angle_weight,
            angle_between,
        )
        self.angle_of = angle_of

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        first, first_empty = view.noises(view.model.timestep())
        late = view.model.timestep(LATE)
        conditional, unconditional = view.noises(late)
        if self.angle_of == "prediction":
            conditional, unconditional = (
                view.model.prediction(noise, late, view.latents) for noise in (conditional, unconditional)
            )
        sides = {
            "unconditional": unconditional,
            "conditional": conditional,
            "difference": conditional - unconditional,
        }
        one, other = self.angle_between.split("_")
        return {"norm": norms(first - first_empty), "angle": mean_cosine(sides[one], sides[other])}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`; ``norm`` and ``angle`` are its two terms before they are weighted."""
        details = {name: float(seen[0][name].mean()) for name in ("norm", "angle")}
        return Finding(self.norm_weight * details["norm"] + self.angle_weight * details["angle"], details)
