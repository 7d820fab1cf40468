"""Optimization of the encoded prompt, so that it adds less to the noise predicted for pure noise."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, GRADIENT_MEMORY, Conditioning, Diffusion
from nemo_bench.diffusion.noise import norms
from nemo_bench.methods.base import Batch, Method, Setup
from nemo_bench.methods.descent import check_precision, descend
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched
from nemo_bench.records.ranges import Count, Index, Positive

Measure = Callable[[Sequence[int], Tensor], Tensor]
"""Values of n images, given their numbers and embeddings (n, tokens, channels): (n,)."""
Optimized = tuple[Tensor, dict[str, Any]]  # An embedding, (tokens, channels), and its notes.
Target = Annotated[float, Field(gt=float("-inf"))]  # Any number but nan and minus infinity.


@dataclass(eq=False)
class OptimizedEmbedding(Method):
    """Minimizes a value of the images of a prompt by AdamW on the prompt's embedding.

    The first token, the start, gets no gradient; AdamW's decay moves it, and padding, as in the public script of Wen et
    al. (2024). Pooled embeddings stay as they are.

    Nothing is published for transformers. There begin tokens of CLIP and Gemma get no gradient, and T5 has none; nor do
    padding that the network does not see, and the zeros that widen CLIP's states in Stable Diffusion 3.
    """

    touches = "encoded prompt"
    families = frozenset(FAMILIES)
    makes_passes = True
    needs = frozenset({"gradients"})

    target: Target | None = 1.5  #: Largest value that suffices; None: all steps are taken.
    steps: Index = 10  #: AdamW steps at most.
    rate: Positive = 0.05  #: Learning rate.
    #: All images of a prompt share one embedding, optimized on the starting noise of its first ``images`` images; None
    #: gives every image its own.
    images: Count | None = 4
    _optimized: dict[Prompt, Optimized] = field(default_factory=dict, init=False)

    @abstractmethod
    def measure(self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Measure:
        """Prepares, without gradients, the function to minimize for N images of these prompts, texts and noise."""

    def pool(self, values: Tensor) -> Tensor:
        """The value of each embedding, (embeddings,), from those of its images, (embeddings, images): their mean."""
        return values.mean(1)

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        self._optimized = {}

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        check_precision(self.title, model.dtype)
        if self.images is None:
            optimized = self._optimize(model, batch.prompts, batch.text, batch.latents[:, None])
        else:
            self.prepare_prompts(model, batch.prompts)
            optimized = [self._optimized[prompt] for prompt in batch.prompts]
        text = torch.stack([embedding.to(batch.text.text) for embedding, _ in optimized])
        yield replace(batch, text=replace(batch.text, text=text), notes=tuple(note for _, note in optimized))

    @override
    def prepare_prompts(self, model: Diffusion, prompts: Sequence[Prompt]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._optimized]
        if new and self.images is not None:
            latents = torch.stack([model.latents(seeds_of(p, "generate", range(self.images))) for p in new])
            optimized = self._optimize(model, new, model.encode([p.text for p in new]), latents)
            self._optimized.update(zip(new, optimized, strict=True))

    def _optimize(
        self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor
    ) -> list[Optimized]:
        """Optimizes one embedding per row on the noise of its images, (rows, images, channels, height, width)."""
        images = latents.shape[1]
        found: list[Optimized] = []
        for part in batched(range(len(prompts)), max(1, self.batch_size // GRADIENT_MEMORY // images)):
            owners = [row for row in part for _ in range(images)]
            noise = latents[list(part)].flatten(0, 1)
            measure = self.measure(model, [prompts[row] for row in owners], text.rows(owners), noise)
            free = model.family.used(text.rows(part))
            free[:, model.begins] = False
            loss = partial(self._loss, measure, images, free)
            target = -math.inf if self.target is None else self.target
            end = descend(text.rows(part).text, loss, target=target, steps=self.steps, rate=self.rate)
            notes = end.notes if self.target is not None else ({"steps": taken} for taken in end.steps)
            found += zip(end.values.cpu(), notes, strict=True)
        return found

    def _loss(self, measure: Measure, images: int, free: Tensor, rows: Sequence[int], values: Tensor) -> Tensor:
        embeddings = torch.where(free[list(rows)], values, values.detach()).repeat_interleave(images, 0)
        numbers = [row * images + image for row in rows for image in range(images)]
        return self.pool(measure(numbers, embeddings).view(len(rows), images))[:, None]


@torch.no_grad()
def noises_of(
    model: Diffusion, text: Conditioning, latents: Tensor, timestep: float
) -> Callable[[Sequence[int], Tensor], tuple[Tensor, Tensor]]:
    """Predicts the unconditional noise of N images, once.

    Returns:
        A function of the numbers of n images and embeddings for them: their unconditional noise, and the noise that the
        embeddings add to it, with gradients; (n, channels, height, width) each.
    """
    unconditional = model.predict_noise(latents, timestep, model.unconditional(len(latents)))

    def noises(images: Sequence[int], embeddings: Tensor) -> tuple[Tensor, Tensor]:
        # Indexing copies, and copies of tensors made in inference mode take part in gradients.
        rows = list(images)
        own = replace(text.rows(rows), text=embeddings.to(text.text.dtype))
        return unconditional[rows], model.predict_noise(latents[rows], timestep, own) - unconditional[rows]

    return noises


@dataclass(eq=False)
class EmbeddingOptimization(OptimizedEmbedding):
    """Optimizes a prompt's embedding until it adds little to the predicted noise (Wen et al. 2024, section 4).

    The value is the magnitude, the norm of conditional minus unconditional noise, at the first timestep and on the
    starting noise, averaged over the images that share the embedding (``images=None`` is the n = 1 of Chen et al.
    2025). The public script shares one among the four images of a prompt and takes one norm over all of them, which is
    twice as large. Where no target is published for a model, take one above the magnitudes of prompts that are not
    memorized, so that their images stay as they are. For flow matching the magnitude is that of velocities, of another
    scale.
    """

    title = "Prompt-embedding optimization"
    summary = "the encoded prompt, optimized to add less to the first predicted noise"
    sourcing = "public code"
    citation = cite("wen2024detecting")

    #: Largest magnitude that suffices. None: 1.5, or with ``legacy_batch_norm`` the published 3, which is the same for
    #: four images of equal magnitude. Others publish (as a norm over n images) 1 to 5 for n = 5, 5 for n = 10 and 1 for
    #: n = 1; models that predict velocity have other magnitudes.
    target: Target | None = None
    #: Take one norm over all images that share an embedding, as the public script does.
    legacy_batch_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None:
            self.target = 3.0 if self.legacy_batch_norm else 1.5

    @override
    def measure(self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Measure:
        noises = noises_of(model, text, latents, model.timestep())
        return lambda images, embeddings: norms(noises(images, embeddings)[1])

    @override
    def pool(self, values: Tensor) -> Tensor:
        return values.norm(dim=1) if self.legacy_batch_norm else super().pool(values)
