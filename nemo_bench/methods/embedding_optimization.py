"""Optimization of the encoded prompt, so that it adds less to the noise predicted for pure noise."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion
from nemo_bench.diffusion.noise import norms
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.methods.descent import check_precision, descend
from nemo_bench.prompts.data import seeds_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt, Record

Measure = Callable[[Sequence[int], Tensor], Tensor]
"""Values of some images, given their numbers and embeddings (n, tokens, channels): (n,)."""
Optimized = tuple[Tensor, Record]
"""An embedding, (tokens, channels), and what is told of it."""


class OptimizedEmbedding(Method):
    """Follows the gradient of a value of the images of a prompt, by AdamW on its embedding.

    The first token, the start, gets no gradient; AdamW's decay moves it, and padding, as in the public script. Of SDXL
    the pooled embedding stays as it is.

    Args:
        target: The embedding is left as it is where the value is at most this, and optimized until it is.
        steps: Steps at most.
        rate: Learning rate.
        images: All images of a prompt share an embedding, optimized once on the starting noise of its first so many
            images; None gives every image one of its own.

    Raises:
        ConfigError: A number is out of range.
    """

    makes_passes = True
    needs = frozenset({"gradients"})

    def __init__(self, target: float, steps: int, rate: float, images: int | None) -> None:
        if not (target > -math.inf and steps >= 0 and 0 < rate < math.inf and (images is None or images >= 1)):
            msg = f"given target={target}, steps={steps}, rate={rate}, images={images}"
            raise ConfigError(
                f"optimizing embeddings needs steps of 0 or more, a rate above 0 and 1 image or more, {msg}"
            )
        self.target, self.steps, self.rate, self.images = target, steps, rate, images
        self._known: WeakKeyDictionary[Diffusion, dict[Prompt, Optimized]] = WeakKeyDictionary()

    @abstractmethod
    def measure(self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Measure:
        """Prepares what is made small, without gradients.

        Args:
            model: The model.
            prompts: Prompts of N images.
            text: Their conditioning.
            latents: Their starting noise.

        Returns:
            Gives the values of some of the images for other embeddings.
        """

    def together(self, values: Tensor) -> Tensor:
        """One value for the images that share an embedding: their mean.

        Args:
            values: (embeddings, images).

        Returns:
            (embeddings,).
        """
        return values.mean(1)

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        check_precision(self.title, model.dtype)
        if self.images is None:
            found = self._optimize(model, batch.prompts, batch.text, batch.latents[:, None])
        else:
            self.prepare_prompts(model, batch.prompts)
            found = [self._known[model][prompt] for prompt in batch.prompts]
        text = torch.stack([embedding.to(batch.text.text) for embedding, _ in found])
        yield replace(batch, text=replace(batch.text, text=text), notes=tuple(note for _, note in found))

    def prepare_prompts(self, model: Diffusion, prompts: Sequence[Prompt]) -> None:
        """See :meth:`Method.prepare_prompts`."""
        if self.images is None:
            return
        known = self._known.setdefault(model, {})
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            latents = torch.stack([model.latents(seeds_of(p, "generate", range(self.images))) for p in new])
            found = self._optimize(model, new, model.encode([p.text for p in new]), latents)
            known.update(zip(new, found, strict=True))

    def _optimize(
        self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor
    ) -> list[Optimized]:
        """Optimizes one embedding a row, on the starting noise of its images, (N, images, channels, height, width)."""
        images = latents.shape[1]
        size = max(1, self.batch_size // GRADIENT_MEMORY // images)
        found: list[Optimized] = []
        for first in range(0, len(prompts), size):
            rows = range(first, min(first + size, len(prompts)))
            found += self._optimize_together(model, [prompts[i] for i in rows], text.rows(rows), latents[list(rows)])
        return found

    def _optimize_together(
        self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor
    ) -> list[Optimized]:
        images = latents.shape[1]
        owner = [row for row in range(len(prompts)) for _ in range(images)]
        measure = self.measure(model, [prompts[row] for row in owner], text.rows(owner), latents.flatten(0, 1))

        def loss(rows: Sequence[int], values: Tensor) -> Tensor:
            embeddings = torch.cat([values[:, :1].detach(), values[:, 1:]], 1).repeat_interleave(images, 0)
            numbers = [row * images + image for row in rows for image in range(images)]
            return self.together(measure(numbers, embeddings).view(len(rows), images))[:, None]

        end = descend(text.text, loss, target=self.target, steps=self.steps, rate=self.rate)
        notes = ({"steps": taken, "reached": there} for taken, there in zip(end.steps, end.reached, strict=True))
        return list(zip(end.values.cpu(), notes, strict=True))


@torch.no_grad()
def noises_of(
    model: Diffusion, text: Conditioning, latents: Tensor, timestep: int
) -> Callable[[Sequence[int], Tensor], tuple[Tensor, Tensor]]:
    """Predicts the unconditional noise of N images, once.

    Returns:
        Gives, for the numbers of n images and other embeddings of them, their unconditional noise and what the
        embeddings add to it, through which gradients go; (n, channels, height, width) each.
    """
    unconditional = model.predict_noise(latents, timestep, model.unconditional(len(latents)))

    def noises(images: Sequence[int], embeddings: Tensor) -> tuple[Tensor, Tensor]:
        # Indexing copies, and copies of what was made in inference mode take part in gradients.
        rows = list(images)
        own = replace(text.rows(rows), text=embeddings.to(text.text.dtype))
        return unconditional[rows], model.predict_noise(latents[rows], timestep, own) - unconditional[rows]

    return noises


class EmbeddingOptimization(OptimizedEmbedding):
    """Optimizes the embedding of a prompt until it adds little to the noise predicted (Wen et al. 2024, section 4).

    The value is the magnitude, the norm of conditional minus unconditional noise, at the first timestep and on the
    starting noise, averaged over the images that share the embedding. The public script shares one among the four
    images of a prompt and takes one norm over all of them, which is twice as large.

    Where no target is published for a model, take one that prompts that are not memorized stay below, so that their
    images stay as they are.

    Args:
        target: At most this magnitude is enough. None: 1.5, or with ``legacy_batch_norm`` the published 3, which is the
            same for four images of equal magnitude. Others publish (as a norm over n images) 1 to 5 for n = 5, 5 for
            n = 10 and 1 for n = 1; models that predict velocity have other magnitudes.
        steps: AdamW steps at most.
        rate: Learning rate.
        images: See :class:`OptimizedEmbedding`; None is the n = 1 of Chen et al. 2025.
        legacy_batch_norm: One norm over all images that share an embedding, as the public script has it.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "Prompt-embedding optimization"
    summary = "the encoded prompt, optimized to add less to the first predicted noise"
    touches = "encoded prompt"
    sourcing = "public code"
    citation = cite("wen2024detecting")

    def __init__(
        self,
        target: float | None = None,
        steps: int = 10,
        rate: float = 0.05,
        images: int | None = 4,
        legacy_batch_norm: bool = False,
    ) -> None:
        published = 3.0 if legacy_batch_norm else 1.5
        super().__init__(published if target is None else target, steps, rate, images)
        self.legacy_batch_norm = legacy_batch_norm

    def measure(self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Measure:
        """See :meth:`OptimizedEmbedding.measure`."""
        noises = noises_of(model, text, latents, model.timestep())
        return lambda images, embeddings: norms(noises(images, embeddings)[1])

    def together(self, values: Tensor) -> Tensor:
        """See :meth:`OptimizedEmbedding.together`."""
        return values.norm(dim=1) if self.legacy_batch_norm else super().together(values)
