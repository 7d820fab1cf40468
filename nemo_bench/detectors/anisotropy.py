"""Magnitude at high noise and direction at low noise, together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import FiniteFloat
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import FAMILIES, Diffusion
from nemo_bench.diffusion.noise import LATE, mean_cosine, norms
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count

Sides = Literal["unconditional_difference", "conditional_difference", "unconditional_conditional"]


@dataclass(eq=False)
class Anisotropy(Detector):
    """Weighted sum of the magnitude and of an angle, without sampling (Asthana and Belagiannis 2026).

    Both are computed on pure noise, whatever the number of steps: the magnitude at the timestep of the first of 50 DDIM
    steps (981 for Stable Diffusion), the angle at that of the third last (41). The angle is the cosine over channels
    between two predictions, the mean over positions. The details have ``norm`` and ``angle``, means over images, before
    they are weighted. For models that predict velocity the magnitude is that of the predicted noise; the public code
    takes that of the score, larger by less than 1%. Its angle is that of velocities, ``angle_of="prediction"``; that of
    noise can have the other sign. Its option to divide predictions by their norms first, off by default, is left out.

    Weights are those of the public code for Stable Diffusion 1.4. The paper fits them on 20 memorized prompts by
    logistic regression and finds 1 and 1 to work as well; its first weight is that of the angle.

    Nothing is published for transformers. The late timestep has the ratio of signal to noise of Stable Diffusion's 41;
    for flow matching the magnitude is that of velocities, and the angle between noises that follow from them. Weights
    are to be fitted anew, by ``norm`` and ``angle`` of the details.
    """

    title = "Anisotropy"
    summary = "first-step magnitude plus the angle of the text-conditional noise at low noise"
    sourcing = "public code"
    families = frozenset(FAMILIES)
    citation = cite("asthana2026detecting")

    seeds: Count = 1
    norm_weight: FiniteFloat = 1.0  #: Weight of the magnitude.
    angle_weight: FiniteFloat = 2.0  #: Weight of the angle.
    #: Which predictions: ``"unconditional_difference"`` as published, unconditional noise and the difference between
    #: conditional and unconditional noise; the others are modes of the public code.
    angle_between: Sides = "unconditional_difference"
    #: ``"noise"``, or ``"prediction"`` for the output of the network, which may be velocity.
    angle_of: Literal["noise", "prediction"] = "noise"

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        late = view.model.timestep(LATE)
        first_conditional, first_unconditional = _noises(view, view.model.timestep())
        conditional, unconditional = _noises(view, late)
        convert = view.model.prediction if self.angle_of == "prediction" else view.model.schedule.noise_of
        conditional, unconditional = (convert(each, late, view.latents) for each in (conditional, unconditional))
        sides = {
            "unconditional": unconditional,
            "conditional": conditional,
            "difference": conditional - unconditional,
        }
        one, other = self.angle_between.split("_")
        return {"norm": norms(first_conditional - first_unconditional), "angle": mean_cosine(sides[one], sides[other])}

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        norm = float(observed[0]["norm"].mean())
        angle = float(observed[0]["angle"].mean())
        return DetectorScore(self.norm_weight * norm + self.angle_weight * angle, {"norm": norm, "angle": angle})


def _noises(view: View, timestep: float) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional noise predicted at a timestep from the latents of a view; its own are shared."""
    if timestep == view.timestep:
        return view.conditional, view.unconditional
    model, empty = view.model, view.model.unconditional(len(view.latents))
    conditional = model.predict_noise(view.latents, timestep, view.text)
    return conditional, model.predict_noise(view.latents, timestep, empty)
