"""How far a single step takes pure noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nemo_bench.detectors.base import Detector, Finding, View, check_counts, check_finite
from nemo_bench.diffusion import Diffusion
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


class OneStep(Detector):
    """Mean squared distance between the initial noise and the latent after one step to the end (Webster 2023).

    The public white-box attack samples with one step of Heun's method on a Karras schedule, which goes from the largest
    noise level to 0 at once. Heun's correction falls away where the next level is 0, so the latent that it reaches is
    the guided estimate of the clean one, and the distance is the mean square of the guided noise times the noise level,
    in units where the noise level is what noise is multiplied by (14.6 for Stable Diffusion).

    Args:
        seeds: Images a prompt.
        guidance: Scale of guidance; the public code leaves its pipeline's 7.5.

    Raises:
        ConfigError: There are no seeds, or the scale is not finite.
    """

    title = "One-step attack"
    summary = "how far one step takes the initial noise, Webster's white-box attack"
    sourcing = "public code"
    citation = cite("webster2023reproducible")

    def __init__(self, seeds: int = 1, guidance: float = 7.5) -> None:
        check_counts(self.title, seeds)
        check_finite(self.title, guidance=guidance)
        self.seeds, self.guidance = seeds, guidance

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        model = view.model
        last = model.training_timesteps - 1
        signal = model.signal(last)
        # Noise alone, at the scale that the network knows: where latents are multiplied by the root of their signal.
        noise = (view.latents.float() * (1 - signal) ** 0.5).to(view.latents.dtype)
        unconditional = model.predict_noise(noise, last, model.unconditional(len(noise)))
        guided = unconditional + self.guidance * (model.predict_noise(noise, last, view.text) - unconditional)
        return {"distance": guided.square().mean((1, 2, 3)) * (1 - signal) / signal}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`."""
        return Finding(float(seen[0]["distance"].mean()))
