"""SAIL: starting noise where the probability landscape of the prompt is smooth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Adam

from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion
from nemo_bench.diffusion.noise import norms, score_difference, unit
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.methods.descent import Loss, check_precision, descend
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Record
from nemo_bench.records.io import digest

_RAISE, _EVERY = 0.1, 3
"""The public code raises its target by so much every third restart."""


class SAIL(Method):
    """Optimizes candidates for an image's starting noise until one is smooth enough (Jeon et al. 2025, section 5).

    With d(x) for what the prompt adds to the noise predicted for x at the first timestep, the loss of a candidate is
    |d(x + delta d(x) / |d(x)|)| + alpha |x|, as in the public code, whose targets belong to it. For models that predict
    velocity its d is what the prompt adds to the score, s(x): the negative over the noise level, a step the other way.
    The paper states another loss: |s(x + delta s(x)) - s(x)|^2 + alpha |x|^2; no targets for it are published. Where no
    candidate gets there, the search starts again with fresh noise, and every third time the target is raised by 0.1.

    Otherwise than in the public code, where the images of a prompt are the first of eight candidates in common to be
    accepted, every image has candidates of its own, its own starting noise first: images stay paired with those of
    other methods, and one whose noise is smooth enough at once stays as it is. Restarts draw fresh noise each time,
    where the code repeats its seed and takes what it accepted twice; and they end, with the best candidate found.
    Records tell whether the target was reached.

    The embedded model shows little of it: its training images draw in nearly all noise, even where the first half of
    sampling is unconditional.

    Args:
        target: Enough for a candidate. None: 8.2 for ``objective="code"`` (7.6 to 9 tried; with alpha 0.05 and
            latents of 16,384 numbers, 6.4 of it is the noise's own norm). For another model take what prompts that are
            not memorized start below.
        alpha: Weight of the norm of the noise.
        candidates: How many an image has, at least 1; 2 are the eight of the public code shared out over its four
            images.
        steps: Adam steps at most until the search starts again.
        rate: Learning rate.
        restarts: How often it starts again at most; without end in the public code.
        objective: ``"code"`` or ``"paper"``.
        delta: How far along the direction.
        legacy_stale_direction: Take the direction at the noise that the steps started from, as the public code does by
            mistake; otherwise at the candidate as it is. Gradients go through it either way.
        form: ``"noise"`` or, as in the public code for models that predict velocity, ``"score"``; see above. It does
            not matter to the paper's objective.
        legacy_moving: Let accepted noise take all ``steps``. In the public code it is a view of what the optimizer goes
            on moving, until enough images are accepted; here images are searched for one by one.

    Raises:
        ConfigError: A number is out of range, or the paper's objective has no target.
    """

    title = "SAIL"
    summary = "starting noise optimized to where the prompt's probability landscape is smooth"
    touches = "starting noise"
    sourcing = "paper and public code"
    citation = cite("jeon2025understanding")
    makes_passes = True
    needs = frozenset({"gradients"})

    def __init__(
        self,
        target: float | None = None,
        alpha: float = 0.05,
        candidates: int = 2,
        steps: int = 10,
        rate: float = 0.05,
        restarts: int = 3,
        objective: Literal["code", "paper"] = "code",
        delta: float = 1.0,
        legacy_stale_direction: bool = False,
        form: Literal["noise", "score"] = "noise",
        legacy_moving: bool = False,
    ) -> None:
        if objective == "paper" and target is None:
            raise ConfigError("sail needs a target for objective=paper, since none is published")
        if not (alpha >= 0 and delta >= 0 and 0 < rate < math.inf and candidates >= 1 and steps >= 1 and restarts >= 0):
            raise ConfigError(
                "sail needs alpha, delta and restarts of 0 or more, a rate above 0, at least 1 candidate and 1 step, "
                f"given alpha={alpha}, delta={delta}, restarts={restarts}, rate={rate}, candidates={candidates}, "
                f"steps={steps}"
            )
        self.target = 8.2 if target is None else target
        self.alpha, self.candidates, self.steps, self.rate, self.restarts = alpha, candidates, steps, rate, restarts
        self.objective, self.delta, self.form = objective, delta, form
        self.legacy_stale_direction, self.legacy_moving = legacy_stale_direction, legacy_moving

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        check_precision(self.title, model.dtype)
        # Each candidate takes two rows, twice.
        size = max(1, self.batch_size // (4 * GRADIENT_MEMORY * self.candidates))
        found: list[tuple[Tensor, Record]] = []
        for first in range(0, len(batch.latents), size):
            found += self._search(model, batch, range(first, min(first + size, len(batch.latents))))
        latents = torch.stack([noise for noise, _ in found]).to(batch.latents)
        yield replace(batch, latents=latents, notes=tuple(note for _, note in found))

    def _search(self, model: Diffusion, batch: Batch, images: Sequence[int]) -> list[tuple[Tensor, Record]]:
        """Starting noise of some images, and what is told of it."""
        best: dict[int, tuple[float, Tensor, Record]] = {}
        open_images = list(images)
        for restart in range(self.restarts + 1):
            start = torch.stack([self._draw(model, batch, image, restart) for image in open_images])
            target = self.target + _RAISE * (restart // _EVERY)
            search = partial(
                descend,
                start,
                self._loss(model, batch.text.rows(open_images), start),
                steps=self.steps,
                rate=self.rate,
                optimizer=Adam,
            )
            end = search(target=target)
            values = search(target=-math.inf).values if self.legacy_moving else end.values
            for row, image in enumerate(open_images):
                # The first candidate that is there; where none is, the best.
                enough = (end.losses[row] <= target).nonzero()
                chosen = int(enough[0]) if len(enough) else int(end.losses[row].argmin())
                value, reached = float(end.losses[row, chosen]), end.reached[row]
                if reached or image not in best or value < best[image][0]:
                    note = {"restarts": restart, "steps": end.steps[row], "candidate": chosen, "reached": reached}
                    best[image] = value, values[row, chosen], note
            open_images = [image for image in open_images if not best[image][2]["reached"]]
            if not open_images:
                break
        return [best[image][1:] for image in images]

    def _draw(self, model: Diffusion, batch: Batch, image: int, restart: int) -> Tensor:
        """Candidates of one image, (candidates, channels, height, width)."""
        seeds = [int(digest(["sail", batch.seeds[image], restart, i]), 16) >> 1 for i in range(self.candidates)]
        drawn = model.latents(seeds)
        if restart == 0:
            drawn[0] = batch.latents[image]
        return drawn

    def _loss(self, model: Diffusion, text: Conditioning, start: Tensor) -> Loss:
        timestep = model.timestep()
        signal = model.signal(timestep)

        in_score = self.objective == "paper" or self.form == "score"

        def added(latents: Tensor, rows: Sequence[int]) -> Tensor:
            each = text.rows([row for row in rows for _ in range(self.candidates)])
            noise = model.text_noise(latents.to(model.dtype), timestep, each)
            return score_difference(noise, signal) if in_score else noise

        def loss(rows: Sequence[int], values: Tensor) -> Tensor:
            latents = values.flatten(0, 1)
            origin = latents
            if self.legacy_stale_direction:
                # Where the steps started from, with the gradient of where they are.
                origin = start[list(rows)].flatten(0, 1) + (latents - latents.detach())
            here = added(origin, rows)
            if self.objective == "code":
                losses = norms(added(latents + self.delta * unit(here), rows)) + self.alpha * norms(latents)
            else:
                ahead = added(latents + self.delta * here, rows)
                losses = norms(ahead - here).square() + self.alpha * norms(latents).square()
            return losses.view(len(rows), self.candidates)

        return loss
