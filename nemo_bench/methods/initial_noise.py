"""Starting noise that is moved to where the prompt adds less to the noise predicted (Han et al. 2025).

Both ways are published with guidance 7. By their size, the numbers published for Stable Diffusion 2.0 are those of
velocities, which ``of="prediction"`` takes. Noise is sqrt(abar) times as large: 0.076 at the first timestep of Stable
Diffusion, 0.15 at that of the embedded model. The latter shows little of either way: its training images draw in nearly
all noise, even where the first half of sampling is unconditional.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion, guided_from
from nemo_bench.diffusion.noise import norms, unit
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.methods.descent import Descent, check_precision, descend
from nemo_bench.records.citations import cite

Of = Literal["noise", "prediction"]
"""What a prompt adds to: the noise predicted, or what the network itself predicts, which may be velocity."""
_CITATION = cite("han2025adjusting")


class AdjustedNoise(Method):
    """Moves the noise down the text-conditional noise without gradients, then guides late: the batch-wise way.

    With d(x) for what the prompt adds to the noise predicted for x at the first timestep, each round takes
    u = radius d(x) / |d(x)| and x <- x - rate (d(x + u) - d(x)). Norms are those of single images. Sampling is
    unconditional until guidance starts.

    Args:
        rounds: How often, at least 0.
        radius: Length of u, at least 0. It should grow with the root of how many numbers a latent has: 16,384 for
            Stable Diffusion 1.4.
        rate: At least 0. Published: 0.7.
        timestep: Guidance starts where the timestep is at most this, 0 to 1000; 900 leaves the first five of 50 steps
            unconditional.
        of: What d is a difference of: the noise predicted, or what the network itself predicts.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "Adjusted initial noise"
    summary = "starting noise moved down the text-conditional noise without gradients, guidance late"
    touches = "starting noise and guidance"
    sourcing = "paper and public code"
    citation = _CITATION
    makes_passes = True
    needs = frozenset({"guidance"})

    def __init__(
        self, rounds: int = 2, radius: float = 50.0, rate: float = 0.7, timestep: float = 900.0, of: Of = "noise"
    ) -> None:
        if not (rounds >= 0 and 0 <= radius < math.inf and 0 <= rate < math.inf and 0 <= timestep <= 1000):
            msg = f"given rounds={rounds}, radius={radius}, rate={rate}, timestep={timestep}"
            raise ConfigError(f"adjusted_noise needs numbers of 0 or more and a timestep of at most 1000, {msg}")
        self.rounds, self.radius, self.rate, self.timestep, self.of = rounds, radius, rate, timestep, of

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        latents = self._adjusted(model, batch).to(batch.latents.dtype)
        yield replace(batch, latents=latents, rule=guided_from(self.timestep, 0.0))

    @torch.no_grad()
    def _adjusted(self, model: Diffusion, batch: Batch) -> Tensor:
        timestep, latents = model.timestep(), batch.latents.float()

        def added(noise: Tensor) -> Tensor:
            return _added(model, noise, timestep, batch.text, self.of)

        for _ in range(self.rounds):
            here = added(latents)
            latents = latents - self.rate * (added(latents + self.radius * unit(here)) - here)
        return latents


class OptimizedNoise(Method):
    """Follows the gradient of the text-conditional noise's norm by AdamW on the noise: the per-sample way.

    Each image has a norm, a step count and an end of its own; records tell whether it reached the target. AdamW's decay
    of 0.01 is part of the method: it keeps the noise from growing. Updates are made in single precision.

    Args:
        target: The noise is left as it is where the norm is at most this, and optimized until it is. Published for
            Stable Diffusion 1.4: 0.9 (0.7 to 1.5 tried).
        steps: AdamW steps at most.
        rate: Learning rate.
        of: What the norm is of: what a prompt adds to the noise predicted, or to what the network itself predicts.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "Optimized initial noise"
    summary = "starting noise of each image, optimized so that its prompt adds little to the first predicted noise"
    touches = "starting noise"
    sourcing = "paper and public code"
    citation = _CITATION
    makes_passes = True
    needs = frozenset({"gradients"})

    def __init__(self, target: float = 0.9, steps: int = 1000, rate: float = 0.01, of: Of = "noise") -> None:
        if not (target >= 0 and steps >= 0 and 0 < rate < math.inf):
            msg = f"given target={target}, steps={steps}, rate={rate}"
            raise ConfigError(f"optimized_noise needs a target and steps of 0 or more and a rate above 0, {msg}")
        self.target, self.steps, self.rate, self.of = target, steps, rate, of

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        check_precision(self.title, model.dtype)
        # Each image takes two rows.
        size = max(1, self.batch_size // (2 * GRADIENT_MEMORY))
        parts, notes = [], []
        for first in range(0, len(batch.latents), size):
            rows = range(first, min(first + size, len(batch.latents)))
            end = self._optimize(model, batch, rows)
            parts.append(end.values)
            notes += [{"steps": n, "reached": there} for n, there in zip(end.steps, end.reached, strict=True)]
        yield replace(batch, latents=torch.cat(parts).to(batch.latents), notes=tuple(notes))

    def _optimize(self, model: Diffusion, batch: Batch, rows: Sequence[int]) -> Descent:
        timestep, text = model.timestep(), batch.text.rows(rows)

        def loss(open_rows: Sequence[int], latents: Tensor) -> Tensor:
            return norms(_added(model, latents, timestep, text.rows(open_rows), self.of))[:, None]

        return descend(batch.latents[list(rows)], loss, target=self.target, steps=self.steps, rate=self.rate)


def _added(model: Diffusion, latents: Tensor, timestep: int, text: Conditioning, of: Of) -> Tensor:
    """What prompts add to predictions from latents, float32, shaped as they are."""
    added = model.text_noise(latents.to(model.dtype), timestep, text)
    return model.prediction(added, timestep) if of == "prediction" else added
