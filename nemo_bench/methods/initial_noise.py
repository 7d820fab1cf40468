"""Starting noise that is moved so that the prompt adds less to the predicted noise (Han et al. 2025).

Both methods are published with guidance 7. By their size, the numbers published for Stable Diffusion 2.0 are those of
velocities, which ``of="prediction"`` takes. Noise is sqrt(abar) times as large: 0.076 at the first timestep of Stable
Diffusion, 0.15 at that of the embedded model. The latter shows little of either method: its training images attract
nearly all noise, even where the first half of sampling is unconditional.

Nothing is published for transformers. There the noise is moved at the ratio of signal to noise of Stable Diffusion's
first step, since flow matching begins with noise alone, on which what a prompt adds does not depend; for flow matching
that is a difference of velocities, there 14 times that of noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, GRADIENT_MEMORY, Conditioning, Diffusion, guided_from
from nemo_bench.diffusion.noise import norms, unit
from nemo_bench.methods.base import Batch, Method
from nemo_bench.methods.descent import check_precision, descend
from nemo_bench.records.citations import cite
from nemo_bench.records.io import batched
from nemo_bench.records.ranges import Index, NotNegative, Positive

Of = Literal["noise", "prediction"]  # The predicted noise, or the network's own prediction, which may be velocity.


@dataclass(eq=False)
class AdjustedNoise(Method):
    """Moves the noise down the text-conditional noise without gradients, then guides late: the batch-wise method.

    With d(x) for the noise that the prompt adds for x at the first timestep, each of ``rounds`` takes
    u = radius d(x) / |d(x)| and x <- x - rate (d(x + u) - d(x)). Norms are those of single images. Sampling is
    unconditional until guidance starts.
    """

    title = "Adjusted initial noise"
    summary = "starting noise moved down the text-conditional noise without gradients, guidance late"
    touches = "starting noise and guidance"
    sourcing = "paper and public code"
    citation = cite("han2025adjusting")
    families = frozenset(FAMILIES)
    makes_passes = True
    needs = frozenset({"guidance"})

    rounds: Index = 2
    #: Length of u; it should grow with the root of the size of a latent: 16,384 numbers for Stable Diffusion 1.4.
    radius: NotNegative = 50.0
    rate: NotNegative = 0.7  #: Step size. Published: 0.7.
    #: Guidance starts where the timestep is at most this, one of Stable Diffusion; other families start at the same
    #: ratio of signal to noise. 900 leaves the first five of 50 steps unconditional.
    timestep: Annotated[float, Field(ge=0, le=1000)] = 900.0
    of: Of = "noise"  #: d is a difference of predicted noise, or of the network's own predictions.

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        latents = self._adjusted(model, batch).to(batch.latents.dtype)
        yield replace(batch, latents=latents, rule=guided_from(model.schedule.like(self.timestep), 0.0))

    @torch.no_grad()
    def _adjusted(self, model: Diffusion, batch: Batch) -> Tensor:
        latents = batch.latents.float()
        for _ in range(self.rounds):
            here = added_noise(model, latents, batch.text, self.of)
            ahead = added_noise(model, latents + self.radius * unit(here), batch.text, self.of)
            latents = latents - self.rate * (ahead - here)
        return latents


@dataclass(eq=False)
class OptimizedNoise(Method):
    """Minimizes the norm of the text-conditional noise by AdamW on the starting noise: the per-sample method.

    Each image has its own norm and number of steps. AdamW's decay of 0.01 is part of the method: it keeps the noise
    from growing. Updates are made in single precision.
    """

    title = "Optimized initial noise"
    summary = "starting noise of each image, optimized so that its prompt adds little to the first predicted noise"
    touches = "starting noise"
    sourcing = "paper and public code"
    citation = cite("han2025adjusting")
    families = frozenset(FAMILIES)
    makes_passes = True
    needs = frozenset({"gradients"})

    #: Largest norm that suffices. Published for Stable Diffusion 1.4: 0.9 (0.7 to 1.5 tried).
    target: Annotated[float, Field(ge=0)] = 0.9
    steps: Index = 1000  #: AdamW steps at most.
    rate: Positive = 0.01
    of: Of = "noise"  #: The norm is that of predicted noise, or of the network's own predictions.

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        check_precision(self.title, model.dtype)
        found: list[Tensor] = []
        notes: list[dict[str, Any]] = []
        # Each image takes two rows.
        for images in batched(range(len(batch.latents)), max(1, self.batch_size // (2 * GRADIENT_MEMORY))):
            loss = partial(self._loss, model, batch.text.rows(images))
            start = batch.latents[list(images)]
            end = descend(start, loss, target=self.target, steps=self.steps, rate=self.rate)
            found.append(end.values)
            notes += end.notes
        yield replace(batch, latents=torch.cat(found).to(batch.latents), notes=tuple(notes))

    def _loss(self, model: Diffusion, text: Conditioning, rows: Sequence[int], latents: Tensor) -> Tensor:
        return norms(added_noise(model, latents, text.rows(rows), self.of))[:, None]


def added_noise(model: Diffusion, latents: Tensor, text: Conditioning, of: Of) -> Tensor:
    """Noise, or prediction, that prompts add at the first timestep; float32, in the shape of the latents."""
    timestep = model.schedule.difference_timestep(0)
    noised = model.schedule.noised(latents, timestep)
    added = model.text_noise(noised.to(model.dtype), timestep, text)
    return model.prediction(added, timestep) if of == "prediction" else added
