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
    """The predictions of one step of guided sampling."""

    number: int  #: 0 is the noisiest.
    timestep: float  #: Training timestep, 0 to 999; of flow matching, 1000 times the share of the noise.
    scale: float  #: Guidance scale of the model.
    latents: Tensor  #: Noisy latents of N images, (N, channels, height, width).
    #: Noise predicted for the empty prompt, float32, shaped as the latents; of flow matching, velocity.
    unconditional: Tensor
    conditional: Tensor  #: The same for the prompt.

    @property
    def difference(self) -> Tensor:
        """Text-conditional noise: conditional minus unconditional, (N, channels, height, width)."""
        return self.conditional - self.unconditional

    @property
    def magnitude(self) -> Tensor:
        """L2 norm of the text-conditional noise of each image, (N,) (Wen et al. 2024, section 3)."""
        return norms(self.difference)

    def guided(self, scale: float | Tensor) -> Tensor:
        """Noise under another guidance scale, one for all images or one an image, (N,)."""
        if isinstance(scale, Tensor):
            scale = scale.to(self.unconditional)[:, None, None, None]
        return self.unconditional + scale * self.difference


Rule = Callable[[Step], Tensor]
"""Gives the noise that a step removes, (N, channels, height, width)."""


def guided_from(timestep: float, before: float) -> Rule:
    """A rule with the guidance scale ``before`` until a timestep, and the scale of the model from there on."""
    return lambda step: step.guided(step.scale if step.timestep <= timestep else before)


class Generated(NamedTuple):
    """Generated images."""

    images: Tensor  #: In [0, 1], float32, (N, 3, height, width); all nan for a failed image.
    failed: tuple[str | None, ...]  #: For each image the reason why it failed, or None.


class Sampling:
    """Samples N images step by step, by the model's DDIM schedule and guidance scale.

    Without a rule the images equal those of the diffusers pipeline, bit for bit in float32.

    Args:
        text: Conditioning of N rows.
        latents: Starting noise, (N, channels, height, width).
        unconditional: Conditioning of N rows that guidance leads away from; None for that of the model.

    Attributes:
        latents: Noisy latents of the current step, shaped as the starting noise.
        number: Number of the current step; 0 is the noisiest.
        output: Output of the network in the current step, with guidance the unconditional rows before the conditional
            ones; None before :meth:`predict`.

    Example:
        >>> images = Sampling(model, model.encode(["a red circle"]), model.latents([0])).run().images
    """

    def __init__(
        self, model: Diffusion, text: Conditioning, latents: Tensor, unconditional: Conditioning | None = None
    ) -> None:
        self.model = model
        self.latents = latents
        self.number = 0
        self.output: Tensor | None = None
        self._scheduler = model.schedule.with_steps(model.steps, model.device)
        # The scheduler's own are on the device: to read one waits for all that is computed there.
        self._timesteps: list[float] = self._scheduler.timesteps.tolist()
        self._is_guided = model.guidance > 1
        if self._is_guided:
            text = (unconditional or model.unconditional(len(text))).followed_by(text)
        self._text = text
        self._finite: list[Tensor] = []
        self._projected: dict[nn.Module, Tensor] = {}

    @property
    def timestep(self) -> float:
        """Training timestep of the current step."""
        return self._timesteps[self.number]

    @torch.no_grad()
    def predict(self) -> None:
        """Makes the predictions of the current step, in as many passes as the pipeline does."""
        model, timestep = self.model, self._scheduler.timesteps[self.number]
        if self._is_guided and not model.stacked:
            size = len(self.latents)
            halves = [self._text.rows(range(start, start + size)) for start in (0, size)]
            self.output = torch.cat([model.network_output(self.latents, timestep, half) for half in halves])
            return
        latents = torch.cat([self.latents] * 2) if self._is_guided else self.latents
        # A compiled network can't use tensors that were computed outside of it.
        layers = () if model.compiled else model.text_projections
        with projected_once(layers, self._text.text, self._projected):
            self.output = model.network_output(latents, timestep, self._text)

    @property
    def step(self) -> Step:
        """The predictions of the current step, converted to noise.

        Raises:
            ModelError: The model samples without guidance, or :meth:`predict` was not called.
            NotFiniteError: The network predicts velocity, and latents of this timestep are pure noise.
        """
        model = self.model
        if not self._is_guided:
            msg = f"model.guidance={model.guidance:g}: what looks at steps or changes them needs model.guidance above 1"
            raise ModelError(msg)
        halves = self._predicted().chunk(2)
        unconditional, conditional = (model.noise(half, self.timestep, self.latents) for half in halves)
        return Step(self.number, self.timestep, model.guidance, self.latents, unconditional, conditional)

    @torch.no_grad()
    def advance(self, noise: Tensor | None = None) -> None:
        """Removes the noise of the current step: that of a rule, or None for that under the model's guidance.

        Images for which both are equal are stepped by the network's own output, since conversion rounds.
        """
        output = self._predicted()
        if self._is_guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + self.model.guidance * (conditional - unconditional)
        if noise is not None:
            replaced = self.model.prediction(noise, self.timestep, self.latents).to(output.dtype)
            is_changed = (noise != self.step.guided(self.model.guidance)).flatten(1).any(1)
            output = torch.where(is_changed[:, None, None, None], replaced, output)
        self.latents = self._scheduler.step(output, self.timestep, self.latents, return_dict=False)[0]
        self._finite.append(_are_finite(self.latents))
        self.output = None
        self.number += 1

    def _predicted(self) -> Tensor:
        if self.output is None:
            raise ModelError(f"step {self.number} was not predicted; call predict() before each advance()")
        return self.output

    @torch.no_grad()
    def run(self, rule: Rule | None = None) -> Generated:
        """Samples all steps, by a rule in place of guidance if there is one; ModelError without guidance."""
        for _ in range(self.model.steps):
            self.predict()
            self.advance(rule(self.step) if rule else None)
        return self.decode()

    @torch.no_grad()
    def decode(self) -> Generated:
        """Decodes the latents after the last step."""
        self._projected.clear()  # decoding needs the memory
        pixels = self.model.decode(self.latents)
        finite_steps = torch.stack(self._finite, 1).tolist()
        failed = tuple(map(self._failure, finite_steps, _are_finite(pixels).tolist()))
        images = pixels.clamp(0, 1)
        images[[image for image, reason in enumerate(failed) if reason]] = torch.nan
        return Generated(images, failed)

    def _failure(self, finite_steps: Sequence[bool], finite_pixels: bool) -> str | None:
        """The reason why an image failed, or None."""
        if not all(finite_steps):
            step = f"step {finite_steps.index(False) + 1} of {len(finite_steps)}"
            return f"latents are not finite after {step}, in {str(self.model.dtype).removeprefix('torch.')}"
        if not finite_pixels:
            dtype = str(self.model.decoding_dtype).removeprefix("torch.")
            return f"pixels are not finite, decoded from finite latents in {dtype}"
        return None


def _are_finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1)
