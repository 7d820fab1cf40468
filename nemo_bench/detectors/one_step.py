"""Distance that a single denoising step covers from pure noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import FiniteFloat
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, View
from nemo_bench.diffusion import FAMILIES
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class OneStep(Detector):
    """Mean squared distance between the initial noise and the latent after one step to the end (Webster 2023).

    The public white-box attack samples with one step of Heun's method on a Karras schedule, which goes from the largest
    noise level to 0 at once. Heun's correction vanishes where the next level is 0, so the resulting latent is the
    guided estimate of the clean one, and the distance is the mean square of the guided noise times the noise level,
    in units where the noise level is the factor of the noise (14.6 for Stable Diffusion).

    Nothing is published for transformers. A step of flow matching from pure noise to the end is the velocity there, so
    the distance is the mean square of the guided velocity. FLUX is guided by what it was distilled from, so its setting
    is ``guidance=1``, the prompt alone.
    """

    title = "One-step attack"
    summary = "how far one step takes the initial noise, Webster's white-box attack"
    sourcing = "public code"
    families = frozenset(FAMILIES)
    citation = cite("webster2023reproducible")

    seeds: Count = 1
    guidance: FiniteFloat = 7.5  #: Scale of guidance; the public code uses its pipeline's 7.5.

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        model = view.model
        last = model.schedule.noisiest
        signal = model.signal(last)
        # Pure noise at the scale of the network's inputs, whose signal part is multiplied by the root of signal.
        noise = (view.latents.float() * (1 - signal) ** 0.5).to(view.latents.dtype)
        guided = model.predict_noise(noise, last, view.text)
        if self.guidance != 1:
            unconditional = model.predict_noise(noise, last, model.unconditional(len(noise)))
            guided = unconditional + self.guidance * (guided - unconditional)
        squares = guided.square().mean((1, 2, 3))
        return {"distance": squares if model.schedule.quantity == "velocity" else squares * (1 - signal) / signal}
