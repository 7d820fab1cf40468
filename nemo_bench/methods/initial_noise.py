"""Starting noise that is moved to where the prompt adds less to the noise predicted (Han et al. 2025).

Both ways are published with guidance 7. The text-conditional noise is that of predicted noise for all models. By their
size, the numbers published for Stable Diffusion 2.0 are those of velocities instead, sqrt(abar) of which is noise:
divide its rate of the batch-wise way by that, and multiply its targets of the per-sample way by it. It is 0.076 at the
first timestep of Stable Diffusion and 0.15 at that of the embedded model. The latter shows little of either way: its
training images draw in nearly all noise, even where the first half of sampling is unconditional.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from nemo_bench.diffusion import GRADIENT_MEMORY, Diffusion, guided_from
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.methods.descent import Descent, check_precision, descend
from nemo_bench.signals import norms, unit

_CITATION = """@inproceedings{han2025adjusting,
  title = {Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion Models},
  author = {Han, Hyeonggeun and Kim, Sehwan and Joo, Hyungjun and Hong, Sangwoo and Lee, Jungwoo},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025},
  eprint = {2510.08625},
  archivePrefix = {arXiv}
}"""


class AdjustedNoise(Method):
    """Moves the noise down the text-conditional noise without gradients, then guides late: the batch-wise way.

    With d(x) for what the prompt adds to the noise predicted for x at the first timestep, each round takes
    u = radius d(x) / |d(x)| and x <- x - rate (d(x + u) - d(x)). Norms are those of single images. Sampling is
    unconditional until guidance starts.

    Args:
        rounds: How often, at least 0. Published: 2 for Stable Diffusion 1.4, 4 for 2.0.
        radius: Length of u, at least 0. Published: 50 and 30, for latents of 16,384 numbers; it grows with the root of
            their number, so that 50 are 18 for the embedded model.
        rate: At least 0. Published: 0.7.
        timestep: Guidance starts where the timestep is at most this, 0 to 1000. Published: 900, so that the first five
            of 50 steps are unconditional, and 917.449.

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

    def __init__(self, rounds: int = 2, radius: float = 50.0, rate: float = 0.7, timestep: float = 900.0) -> None:
        if not (rounds >= 0 and 0 <= radius < math.inf and 0 <= rate < math.inf and 0 <= timestep <= 1000):
            msg = f"given rounds={rounds}, radius={radius}, rate={rate}, timestep={timestep}"
            raise ConfigError(f"adjusted_noise needs numbers of 0 or more and a timestep of at most 1000, {msg}")
        self.rounds, self.radius, self.rate, self.timestep = rounds, radius, rate, timestep

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        adjusted = replace(batch, latents=self._adjusted(model, batch).to(batch.latents.dtype))
        with model.guide(guided_from(self.timestep, 0.0)):
            yield adjusted

    @torch.no_grad()
    def _adjusted(self, model: Diffusion, batch: Batch) -> Tensor:
        timestep, latents = model.timestep(), batch.latents.float()

        def added(noise: Tensor) -> Tensor:
            return model.text_noise(noise.to(model.dtype), timestep, batch.text)

        for _ in range(self.rounds):
            here = added(latents)
            latents = latents - self.rate * (added(latents + self.radius * unit(here)) - here)
        return latents


class OptimizedNoise(Method):
    """Follows the gradient of the text-conditional noise's norm by AdamW on the noise: the per-sample way.

    Each image has a norm, a step count and an end of its own; records tell whether it reached the target. AdamW's decay
    of 0.01 is part of the method: it keeps the noise from growing. Updates are made in single precision.

    Args:
        target: The noise is left as it is where the norm is at most this, and optimized until it is. Published: 0.9 for
            Stable Diffusion 1.4 (0.7 to 1.5 tried), 5 to 20 for 2.0.
        steps: AdamW steps at most.
        rate: Learning rate. Published: 0.01, and 0.1 for Stable Diffusion 2.0.

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

    def __init__(self, target: float = 0.9, steps: int = 1000, rate: float = 0.01) -> None:
        if not (target >= 0 and steps >= 0 and 0 < rate < math.inf):
            msg = f"given target={target}, steps={steps}, rate={rate}"
            raise ConfigError(f"optimized_noise needs a target and steps of 0 or more and a rate above 0, {msg}")
        self.target, self.steps, self.rate = target, steps, rate

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
            added = model.text_noise(latents.to(model.dtype), timestep, text.rows(open_rows))
            return norms(added)[:, None]

        return descend(batch.latents[list(rows)], loss, target=self.target, steps=self.steps, rate=self.rate)
