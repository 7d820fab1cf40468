"""Classifier-free guidance as methods see and change it: a step of sampling, and rules for the noise it takes off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nemo_bench.signals import norms


@dataclass(frozen=True)
class Step:
    """One step of guided sampling, before its noise is taken off.

    Attributes:
        number: From 0, the noisiest.
        timestep: Training timestep, 0 to 999.
        scale: Guidance scale of the model.
        latents: Noisy latents of N images, (N, channels, height, width).
        unconditional: Noise predicted for the empty prompt, float32, of that shape.
        conditional: Noise predicted for the prompt, likewise.
    """

    number: int
    timestep: int
    scale: float
    latents: Tensor
    unconditional: Tensor
    conditional: Tensor

    @property
    def difference(self) -> Tensor:
        """What the prompt adds to the predicted noise, (N, channels, height, width)."""
        return self.conditional - self.unconditional

    @property
    def magnitude(self) -> Tensor:
        """L2 norm of :attr:`difference`, one an image, (N,) (Wen et al. 2024, section 3)."""
        return norms(self.difference)

    def guided(self, scale: float | Tensor) -> Tensor:
        """Noise under another guidance scale.

        Args:
            scale: One for all images, or (N,).

        Returns:
            The unconditional noise plus ``scale`` times :attr:`difference`.
        """
        if isinstance(scale, Tensor):
            scale = scale.to(self.unconditional)[:, None, None, None]
        return self.unconditional + scale * self.difference


Rule = Callable[[Step], Tensor]
"""Gives the noise that a step takes off, (N, channels, height, width)."""


def guided_from(timestep: float, before: float) -> Rule:
    """A rule by which guidance starts late.

    Args:
        timestep: The model's own scale counts where the timestep is at most this.
        before: The scale until then.
    """
    return lambda step: step.guided(step.scale if step.timestep <= timestep else before)
