"""The two ways to run NeMo: as the paper describes it, and as its public scripts do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_bench.diffusion import Diffusion

SEEDS = 10
"""Seeds a prompt for noise differences, as published."""


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
    """

    name: str
    step: int = 0
    shared_noise: bool = False
    duplicates: bool = False
    autocast: bool = False
    calibration_guidance: float | None = None

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
REFERENCE = Protocol("reference", step=1, shared_noise=True, duplicates=True, autocast=True, calibration_guidance=7.0)
PROTOCOLS = {protocol.name: protocol for protocol in (PAPER, REFERENCE)}
