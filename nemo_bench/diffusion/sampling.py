"""Sampling of images: predict, combine by guidance or by a method's rule, step the scheduler, decode at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from nemo_bench.diffusion.attention import projected_once
from nemo_bench.diffusion.families import Conditioning
from nemo_bench.diffusion.noise import norms
from nemo_bench.errors import ModelError

if TYPE_CHECKING:
    from nemo_bench.diffusion.model import Diffusion


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


class Generated(NamedTuple):
    """Images, and which of them failed.

    Attributes:
        images: In [0, 1], float32, (N, 3, height, width); nan throughout where an image failed.
        failed: The reason, one an image; None where the image is finite.
    """

    images: Tensor
    failed: tuple[str | None, ...]


class Sampling:
    """Sampling of N images, one step at a time, by the model's DDIM scheduler and its scale of guidance.

    Without a rule the images are those of the diffusers pipeline, bit for bit in float32.

    Args:
        model: The model.
        text: Conditioning of N rows.
        latents: Starting noise, (N, channels, height, width).
        unconditional: What guidance leads away from, of N rows; None for that of the model.

    Attributes:
        latents: Noisy latents of the step to come, shaped as the starting noise.
        number: Number of the step to come, from 0, the noisiest.

    Example:
        >>> sampling = Sampling(model, model.encode(["a red circle"]), model.latents([0]))
        >>> for _ in range(model.steps):
        ...     sampling.predict()
        ...     sampling.advance()
        >>> images = sampling.decode().images
    """

    def __init__(
        self, model: Diffusion, text: Conditioning, latents: Tensor, unconditional: Conditioning | None = None
    ) -> None:
        self.model = model
        self.latents = latents
        self.number = 0
        self._scheduler = model.scheduler_of(model.steps)
        self._is_guided = model.guidance > 1
        if self._is_guided:
            text = (unconditional or model.unconditional(len(text))).followed_by(text)
        self._text = text
        self._output: Tensor | None = None
        self._finite: list[Tensor] = []
        self._projected: dict[nn.Module, Tensor] = {}

    @property
    def timestep(self) -> int:
        """Training timestep of the step to come."""
        return int(self._scheduler.timesteps[self.number])

    @torch.no_grad()
    def predict(self) -> None:
        """Predicts, in one UNet pass for both halves, what :attr:`step` and :meth:`advance` take."""
        latents = torch.cat([self.latents] * 2) if self._is_guided else self.latents
        # A compiled network can't take what was computed outside of it.
        layers = () if self.model.compiled else self.model.text_projections
        with projected_once(layers, self._text.text, self._projected):
            self._output = self.model.network_output(latents, self._scheduler.timesteps[self.number], self._text)

    @property
    def step(self) -> Step:
        """The step predicted, its predictions converted to noise.

        Raises:
            ModelError: The model samples without guidance.
            NotFiniteError: No noise follows from what the network predicts at this timestep.
        """
        model, timestep = self.model, self.timestep
        if not self._is_guided:
            msg = f"model.guidance={model.guidance:g}: what looks at steps or changes them needs model.guidance above 1"
            raise ModelError(msg)
        unconditional, conditional = (model.noise(half, timestep, self.latents) for half in self._predicted().chunk(2))
        return Step(self.number, timestep, model.guidance, self.latents, unconditional, conditional)

    @torch.no_grad()
    def advance(self, noise: Tensor | None = None) -> None:
        """Takes the noise of a step off.

        Args:
            noise: As a rule gives it, shaped as the latents; None for the noise under the model's guidance. Images for
                which both are equal get the network's own output, since converting there and back rounds.
        """
        output = self._predicted()
        if self._is_guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + self.model.guidance * (conditional - unconditional)
        if noise is not None:
            replaced = self.model.prediction(noise, self.timestep, self.latents).to(output.dtype)
            is_changed = (noise != self.step.guided(self.model.guidance)).flatten(1).any(1)
            output = torch.where(is_changed[:, None, None, None], replaced, output)
        timestep = self._scheduler.timesteps[self.number]
        self.latents = self._scheduler.step(output, timestep, self.latents, return_dict=False)[0]
        self._finite.append(_are_finite(self.latents))
        self._output = None
        self.number += 1

    def _predicted(self) -> Tensor:
        if self._output is None:
            raise ModelError(f"step {self.number} was not predicted; call predict() before each advance()")
        return self._output

    @torch.no_grad()
    def decode(self) -> Generated:
        """The images of the latents after the last step, and the reason where one failed."""
        self._projected.clear()  # decoding needs the memory
        pixels = self.model.decode(self.latents)
        by_step, decoded = torch.stack(self._finite).tolist(), _are_finite(pixels).tolist()
        failed = tuple(self._failure([row[image] for row in by_step], decoded[image]) for image in range(len(pixels)))
        images = pixels.clamp(0, 1)
        images[[image for image, reason in enumerate(failed) if reason]] = torch.nan
        return Generated(images, failed)

    def _failure(self, steps: Sequence[bool], pixels: bool) -> str | None:
        """Why an image failed, given whether its latents after each step, and its pixels, are finite."""
        if not all(steps):
            dtype = _name(self.model.dtype)
            return f"latents are not finite after step {steps.index(False) + 1} of {len(steps)}, in {dtype}"
        if not pixels:
            return f"pixels are not finite, decoded from finite latents in {_name(self.model.decoding_dtype)}"
        return None


@torch.no_grad()
def sample(
    model: Diffusion,
    text: Conditioning,
    latents: Tensor,
    unconditional: Conditioning | None = None,
    rule: Rule | None = None,
) -> Generated:
    """Samples one image a row.

    Args:
        model: The model.
        text: See :class:`Sampling`.
        latents: Likewise.
        unconditional: Likewise.
        rule: Gives the noise of each step in place of guidance.

    Raises:
        ModelError: There is a rule, and the model samples without guidance.
    """
    sampling = Sampling(model, text, latents, unconditional)
    for _ in range(model.steps):
        sampling.predict()
        sampling.advance(rule(sampling.step) if rule else None)
    return sampling.decode()


def _are_finite(values: Tensor) -> Tensor:
    """Whether all numbers of each row are finite, (N,)."""
    return values.isfinite().flatten(1).all(1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
