"""Local intrinsic dimension of what a prompt generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import FAMILIES, Diffusion
from nemo_bench.diffusion.dimension import intrinsic_dimension, noise_along, probes
from nemo_bench.diffusion.schedule import NOISE_STEPS
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class IntrinsicDimension(Detector):
    """Negative local intrinsic dimension by FLIPD (Kamkari et al. 2024; Ross et al. 2025).

    A memorized image is a point of few dimensions. With latents x of D elements at timestep t, guided noise
    e = e_u + g (e_c - e_u) and sigma_t^2 = 1 - abar_t, the dimension is D - sigma_t tr(de/dx) + |e|^2; the trace is
    estimated by v^T (de/dx) v with Gaussian v, drawn once for all images, so that only the order of scores counts, and
    values below 0 occur. Images are flat as well without being memorized, such as on a plain background;
    ``difference`` takes from the dimension without the prompt that with it, as in no source.

    The public code takes the trace of g (e_c - e_u) alone, since its unconditional noise is a constant there, and
    leaves D out. Derivatives are forward-mode ones.

    Nothing is published for transformers. The timestep there has the same ratio of signal to noise; for flow matching
    noise is what follows from the velocity, and sigma_t is s.
    """

    title = "Intrinsic dimension (FLIPD)"
    summary = "how few dimensions the generated image has around it"
    sourcing = "public code and abstracts"
    families = frozenset(FAMILIES)
    citation = cite("kamkari2024geometric")
    derives = True

    seeds: Count = 1
    #: Where: ``"clean"``, the clean latents predicted in the last step, scaled to the timestep without noise, as the
    #: estimator is defined; or ``"running"``, the latents of sampling at that step, as in the public code on
    #: memorization.
    at: Literal["clean", "running"] = "clean"
    #: Which of 50 steps, from 0, has the timestep, as in the public code. ``"clean"`` takes that timestep whatever the
    #: number of steps; ``"running"`` of N steps the one numbered ``step`` N / 50, rounded down.
    step: Annotated[int, Field(ge=0, lt=NOISE_STEPS)] = 40
    probes: Count = 1  #: Vectors v, whose estimates are averaged.
    difference: bool = False  #: Whether the score is the dimension without the prompt minus that with it, unguided.
    legacy_trace: bool = False  #: Whether the trace is that of the public code.
    steps: int | None = field(default=None, init=False)

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        model = view.model
        if self.at == "running":
            is_there = view.number == self.step * model.steps // NOISE_STEPS
            latents, timestep = view.latents, view.timestep
        else:
            is_there = view.number == model.steps - 1
            timestep = model.timestep(self.step)
            noise = view.step.guided(model.guidance)
            clean = model.schedule.clean(noise, view.timestep, view.latents)
            latents = (model.schedule.mixture(timestep)[0] * clean).to(view.latents.dtype)
        return {"dimension": self._dimensions(view, latents, timestep)} if is_there else {}

    def _dimensions(self, view: View, latents: Tensor, timestep: float) -> Tensor:
        """The dimension of each row, or the difference of dimensions; the mean over probes."""
        model = view.model
        deviation, scale = model.schedule.mixture(timestep)[1], model.guidance
        text = model.unconditional(len(latents)).followed_by(view.text)
        found = []
        for direction in probes(model, self.probes):
            noise, slope = noise_along(model, torch.cat([latents, latents]), timestep, text, direction)
            (empty, own), (empty_slope, own_slope) = noise.chunk(2), slope.chunk(2)
            if self.difference:
                without = intrinsic_dimension(empty, empty_slope, direction, deviation)
                found.append(intrinsic_dimension(own, own_slope, direction, deviation) - without)
                continue
            guided_slope = scale * (own_slope - empty_slope) + (0 if self.legacy_trace else empty_slope)
            found.append(intrinsic_dimension(empty + scale * (own - empty), guided_slope, direction, deviation))
        return torch.stack(found).mean(0)

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        (dimension,) = (float(step["dimension"].mean()) for step in observed if step)
        return DetectorScore(-dimension, {"dimension": dimension})
