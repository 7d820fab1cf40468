"""The two ways to run NeMo: as the paper describes it, and as its public scripts do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_bench.diffusion import Diffusion, Measure

SEEDS = 10
"""Seeds a prompt for noise differences, as published."""
Velocity = Literal["converted", "raw"]
"""What a model that predicts velocity counts with: the noise that follows from it, or the velocity as it is."""


@dataclass(frozen=True)
class Protocol:
    """Where the paper's text and the public scripts of Hintersdorf et al. (2024) differ.

    A protocol concerns localizing. Images start from generators of their own in any case, so that methods stay paired.

    Attributes:
        name: Name in settings and records.
        step: Which of 50 DDIM steps gives the timestep of the noise prediction; the latent is always the initial one.
        shared_noise: All prompts start from one batch, drawn at once by a generator seeded with 1; otherwise every
            prompt and seed has a generator of its own.
        duplicates: A candidate that is both outlier and among the most active is listed, and tested, twice.
        autocast: On a GPU the UNet runs under float16 autocast.
        calibration_guidance: Scale of the guided prediction from which the threshold is calibrated, with the two halves
            swapped: conditional + scale (unconditional - conditional). None for the conditional prediction.
        guidance: The same while localizing.
        similarity: How noise differences are compared, see :data:`nemo_bench.diffusion.Measure`.
        velocity: What noise differences of a model that predicts velocity are taken from: the ``"converted"`` noise,
            or the ``"raw"`` velocity.
    """

    name: str
    step: int = 0
    shared_noise: bool = False
    duplicates: bool = False
    autocast: bool = False
    calibration_guidance: float | None = None
    guidance: float | None = None
    similarity: Measure = "fixed"
    velocity: Velocity = "converted"

    def changed(
        self, similarity: Measure | None = None, velocity: Velocity | None = None, guidance: float | None = None
    ) -> Protocol:
        """The same protocol but for what is given."""
        return replace(
            self,
            similarity=similarity or self.similarity,
            velocity=velocity or self.velocity,
            guidance=self.guidance if guidance is None else guidance,
        )

    @property
    def of_threshold(self) -> dict[str, Any]:
        """What of the protocol decides the calibrated threshold."""
        return {"protocol": self.name, "similarity": self.similarity, "velocity": self.velocity}

    def latents(self, model: Diffusion, seeds: Sequence[int]) -> Tensor:
        """Starting noise of one prompt.

        Args:
            model: The model.
            seeds: Generator seeds of the prompt, S of them; shared noise depends on their number alone.

        Returns:
            Standard normal noise, (S, channels, height, width).
        """
        if not self.shared_noise:
            return model.latents(seeds)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn((len(seeds), *model.latent_shape), generator=generator)
        return noise.to(model.device, model.dtype)

    def precision(self, model: Diffusion) -> AbstractContextManager[None]:
        """Opens float16 autocast where the protocol asks for it and the model is on a GPU."""
        if self.autocast and model.device.type == "cuda":
            return torch.autocast("cuda", torch.float16)
        return nullcontext()


PAPER = Protocol("paper")
REFERENCE = Protocol(
    "reference",
    step=1,
    shared_noise=True,
    duplicates=True,
    autocast=True,
    calibration_guidance=7.0,
    similarity="published",
    velocity="raw",
)
PROTOCOLS = {protocol.name: protocol for protocol in (PAPER, REFERENCE)}
