"""The two protocols of NeMo: that of the paper, and that of its public scripts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_bench.diffusion import Diffusion, Measure

SEEDS = 10
"""Published number of seeds a prompt for noise differences."""
Velocity = Literal["converted", "raw"]
"""Prediction of a model that predicts velocity: noise converted from the velocity, or the velocity itself."""


@dataclass(frozen=True)
class Protocol:
    """The differences between the paper and the public scripts of Hintersdorf et al. (2024).

    A protocol concerns localizing. Images start from generators of their own in any case, so that methods stay paired.
    """

    name: str  #: Name in settings and records.
    #: Step of 50 DDIM steps whose timestep the noise is predicted at; the latent is always the initial one.
    step: int = 0
    #: Whether all prompts start from one batch of noise, drawn by a generator with seed 1; otherwise every prompt and
    #: seed has its own generator.
    shared_noise: bool = False
    #: Whether a candidate that is outlier and among the most active is listed, and tested, twice.
    duplicates: bool = False
    #: Whether the network runs under autocast on a GPU: float16 a UNet, bfloat16 a transformer, which overflows else.
    autocast: bool = False
    #: Guidance scale of the prediction for the calibrated threshold, with the two halves swapped: conditional + scale
    #: (unconditional - conditional). None for the conditional prediction.
    calibration_guidance: float | None = None
    guidance: float | None = None  #: The same for localizing.
    similarity: Measure = "fixed"  #: Variant of the similarity, see :data:`nemo_bench.diffusion.Measure`.
    velocity: Velocity = "converted"  #: Prediction of a model that predicts velocity.

    def changed(
        self, similarity: Measure | None = None, velocity: Velocity | None = None, guidance: float | None = None
    ) -> Protocol:
        """Replaces the arguments that are not None."""
        changes: dict[str, Any] = {"similarity": similarity, "velocity": velocity, "guidance": guidance}
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    @property
    def of_threshold(self) -> dict[str, Any]:
        """The parts of the protocol that the calibrated threshold depends on."""
        return {"protocol": self.name, "similarity": self.similarity, "velocity": self.velocity}

    def latents(self, model: Diffusion, seeds: Sequence[int]) -> Tensor:
        """Draws starting noise of one prompt, (S, channels, height, width), by S seeds or by their number if shared."""
        if not self.shared_noise:
            return model.latents(seeds)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn((len(seeds), *model.latent_shape), generator=generator)
        return noise.to(model.device, model.dtype)

    def precision(self, model: Diffusion) -> AbstractContextManager[None]:
        """Autocast if the protocol asks for it and the model is on a GPU."""
        if self.autocast and model.device.type == "cuda":
            return torch.autocast("cuda", torch.float16 if model.family.network == "unet" else torch.bfloat16)
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
