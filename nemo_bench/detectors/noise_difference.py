"""NeMo's memorization score: similarity of the first predictions of several seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench import localization
from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import FAMILIES, Diffusion
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


@dataclass(eq=False)
class NoiseDifference(Detector):
    """SSIM between the noise differences of all pairs of seeds (Hintersdorf et al. 2024, section 3.1).

    A noise difference is the noise predicted for the prompt alone at the first of 50 DDIM steps, minus the input noise,
    scaled to [0, 1] by channel. For a memorized prompt every noise leads to the same image. ``model.similarity`` sets
    how differences are compared. One pass an image. Noises are those of generated images; the memorization score of a
    run uses others. The public scripts predict at the second of the 50 timesteps, from one batch of noise for all
    prompts and, on a GPU, under float16 autocast; they compare velocities without conversion, and all pairs of a prompt
    with one data range. For flow matching a noise difference is the negated clean prediction, see
    :func:`nemo_bench.localization.noise_differences`.
    """

    title = "Noise difference"
    summary = "SSIM between first-step noise differences of seeds, NeMo's memorization score"
    sourcing = "paper and public code; transformers: ours"
    citation = cite("hintersdorf2024nemo")
    families = frozenset(FAMILIES)

    seeds: Annotated[int, Field(ge=2)] = 10
    #: ``"mean"`` over pairs, the memorization score, or ``"max"``, the gate of NeMo's localization.
    pairs: Literal["mean", "max"] = "mean"
    #: ``"paper"``, or ``"reference"`` for step, noise, precision and similarity of the public scripts; see
    #: :class:`nemo_bench.localization.Protocol`.
    protocol: Literal["paper", "reference"] = "paper"

    @property
    def noise_protocol(self) -> localization.Protocol:
        """How it takes noise differences."""
        return localization.PROTOCOLS[self.protocol]

    @override
    def check_model(self, model: Diffusion) -> None:
        model.similarity.check(model.latent_shape[1:], self.noise_protocol.similarity)

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        model, protocol = view.model, self.noise_protocol
        latents, schedule = view.latents, model.schedule
        if self.protocol == "paper" and schedule.difference_timestep(0) == view.timestep:
            difference = schedule.difference(view.conditional, view.timestep, latents)
            return {"difference": localization.scaled_difference(difference)}
        if protocol.shared_noise:
            # One draw for all seeds, which all prompts share.
            latents = protocol.latents(model, range(self.seeds))[view.seeds]
        return {"difference": localization.noise_differences(model, view.text, latents, protocol)}

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        differences, kind = observed[0]["difference"], self.noise_protocol.similarity
        pairs = localization.pair_values(localization.pair_similarities(differences, model.similarity, kind))
        return DetectorScore(float(pairs.mean() if self.pairs == "mean" else pairs.max()))
