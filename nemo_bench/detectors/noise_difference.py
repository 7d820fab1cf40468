"""How alike the first predictions are over seeds: NeMo's memorization score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from nemo_bench.detectors.base import Detector, Finding, View, check_counts
from nemo_bench.diffusion import Diffusion
from nemo_bench.localization import (
    PAPER,
    PROTOCOLS,
    noise_differences,
    pair_similarities,
    pair_values,
    scaled_difference,
)
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


class NoiseDifference(Detector):
    """SSIM between the noise differences of all pairs of seeds (Hintersdorf et al. 2024, section 3.1).

    A noise difference is the noise predicted at the first of 50 DDIM steps for the prompt alone, minus the noise that
    went in, scaled to [0, 1] by channel. Where a prompt is memorized, every noise is led to the same image. How
    differences are compared is a setting of the model, ``model.similarity``. One pass an image. Noises are those of
    generated images; a run's memorization score has others. The public scripts predict at the second of the 50
    timesteps, from one batch of noise for all prompts and, on a GPU, under float16 autocast; they compare velocities as
    they are, and all pairs of a prompt with one data range.

    Args:
        seeds: Starting noises a prompt, at least 2.
        pairs: ``"mean"`` over pairs, the memorization score, or ``"max"``, which gates NeMo's localization.
        protocol: ``"paper"``, or ``"reference"`` for step, noise, precision and similarity of the public scripts; see
            :class:`nemo_bench.localization.Protocol`.

    Raises:
        ConfigError: There are fewer than two seeds.
    """

    title = "Noise difference"
    summary = "SSIM between first-step noise differences of seeds, NeMo's memorization score"
    sourcing = "paper and public code"
    citation = cite("hintersdorf2024nemo")

    def __init__(
        self,
        seeds: int = 10,
        pairs: Literal["mean", "max"] = "mean",
        protocol: Literal["paper", "reference"] = "paper",
    ) -> None:
        check_counts(self.title, seeds, least=2)
        self.seeds, self.pairs, self.protocol = seeds, pairs, PROTOCOLS[protocol]

    def fits(self, model: Diffusion) -> None:
        """See :meth:`Detector.fits`."""
        model.similarity.check(model.latent_shape[1:], self.protocol.similarity)

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        model, protocol = view.model, self.protocol
        if protocol == PAPER and model.timestep() == view.timestep:
            return {"difference": scaled_difference(view.conditional, view.latents)}
        # What all prompts start from is drawn at once for all seeds.
        latents = protocol.latents(model, range(self.seeds))[view.seeds] if protocol.shared_noise else view.latents
        return {"difference": noise_differences(model, view.text, latents, protocol)}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`."""
        pairs = pair_values(pair_similarities(seen[0]["difference"], model.similarity, self.protocol.similarity))
        return Finding(float(pairs.mean() if self.pairs == "mean" else pairs.max()))
