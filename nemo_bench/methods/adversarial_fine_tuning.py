"""Adversarial fine-tuning: weights fitted against searches for embeddings that bring training images back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion, fitted_picture
from nemo_bench.errors import counted
from nemo_bench.methods.base import Batch, Fit, Setup
from nemo_bench.methods.embedding_search import RATE, SAMPLES, STEPS, random_embeddings, search_embeddings
from nemo_bench.methods.fitted_weights import FittedWeights, Pictures, finite_norm, generated_pictures, kept_pictures
from nemo_bench.methods.no_mitigation import NoMitigation
from nemo_bench.methods.wanda import Wanda
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.io import batched, seed_of
from nemo_bench.records.ranges import Count, Index, Positive, Share

log = logging.getLogger(__name__)


@dataclass(eq=False)
class AdversarialFineTuning(FittedWeights):
    """Fits all weights of the UNet so that no embedding brings training images back (Kowalczuk et al. 2026).

    Each update takes some memorized prompts and searches, under the present weights, for embeddings y that bring the
    first training image of each back, as ``nemo-bench audit`` does. The loss is that of training on surrogates with
    these embeddings, plus that on as many pictures to keep with their own prompts. A surrogate is the image that the
    model gives for the memorized prompt once it is pruned by :class:`Wanda`. An epoch takes each memorized prompt once.

    The authors' code could not be read. Their paper gives loss, surrogates and five epochs, according to notes on it;
    learning rate, batch, AdamW without clipping, the embedding that a search starts from and one surrogate a prompt are
    ours. Pictures to keep are those of ``keep``, or images that the model generates for its prompts; the source takes
    LAION.

    The training images are seen, so results are not to be ranked beside mitigations that see prompts alone.
    """

    title = "Adversarial fine-tuning (fitted on training images)"
    summary = "weights fitted so that embeddings found by a search give other images than the training images"
    sourcing = "notes on the paper"
    citation = cite("kowalczuk2026finding")

    epochs: Count = 5
    rate: Positive = 1e-5
    batch: Count = 8  #: Memorized prompts of an update, and as many pictures to keep.
    ratio: Share = 0.01  #: ``ratio`` of :class:`Wanda`, for surrogates.
    agreement: Annotated[float, Field(ge=0, lt=1)] = 0.0  #: ``agreement`` of :class:`Wanda`.
    steps: Count = STEPS  #: Of a search.
    search_rate: Positive = RATE
    samples: Count = SAMPLES  #: Noisy pictures of a step of a search.
    start: Literal["prompt", "random"] = "prompt"  #: What a search starts from.
    seed: Index = 0

    @override
    def fit(self, model: Diffusion, setup: Setup) -> Fit:
        self.batch_size = setup.batch_size
        kept, forgotten = self.sides(setup.prompts)
        keep = kept_pictures(model, kept, setup.batch_size)
        log.info("%s: %s, %s to keep", self.title, counted(len(forgotten), "memorized prompt"), len(keep.latents))
        wanda = Wanda(ratio=self.ratio, agreement=self.agreement)
        wanda.setup(model, Setup(prompts=forgotten, batch_size=setup.batch_size))
        with wanda.pruning():
            surrogates = generated_pictures(model, forgotten, setup.batch_size)
        return AdversarialFit(self, model, forgotten, surrogates, keep)

    @override
    def least_passes(self, prompts: Sequence[Prompt], image: int) -> int:
        _, forgotten = self.sides(prompts)
        pruning = len(forgotten) + 1  # images by which Wanda compares memorized prompts with the empty one
        # A search, then a surrogate and a picture to keep, each forward and back.
        each = 2 * self.steps * self.samples + 2 * 2
        images = (pruning + len(forgotten)) * image  # and one surrogate each
        return self.kept_passes(prompts, image) + images + self.epochs * len(forgotten) * each


class AdversarialFit(Fit):
    """The updates of one fit; each depends on its number and the present weights alone.

    Args:
        method: The method.
        model: The model.
        prompts: Memorized prompts, each with a training image.
        surrogates: The picture to give in place of each one's, and its encoded prompt.
        kept: Pictures to keep.
    """

    def __init__(
        self, method: AdversarialFineTuning, model: Diffusion, prompts: Sequence[Prompt], surrogates: Pictures,
        kept: Pictures,
    ) -> None:  # fmt: skip
        self.parts = -(-len(prompts) // method.batch)  # updates of an epoch
        super().__init__(model.network, method.epochs * self.parts, method.rate)
        self.method = method
        self.model = model
        self.prompts = prompts
        self.surrogates = surrogates
        self.kept = kept
        pictures = [fitted_picture(prompt.references[0], model.image_size)[None] for prompt in prompts]
        self.training_images = torch.cat([model.encode_images(picture) for picture in pictures])

    def chosen(self, number: int) -> list[int]:
        """Places of the memorized prompts of an update: each once an epoch, in an order of that epoch."""
        epoch, part = divmod(number, self.parts)
        order = torch.randperm(len(self.prompts), generator=self._generator("order", epoch)).tolist()
        first = part * self.method.batch
        rows: list[int] = order[first : first + self.method.batch]
        return rows

    def adversarial(self, number: int) -> Conditioning:
        """What searches under the present weights find for the training images of an update."""
        method, model, rows = self.method, self.model, self.chosen(number)
        prompts = tuple(self.prompts[row] for row in rows)
        seeds = tuple(seed_of(["adversarial", method.seed, number, prompt.id]) for prompt in prompts)
        text = self.surrogates.text.rows(rows)
        start = text if method.start == "prompt" else random_embeddings(model, text, seeds)
        batch = Batch(prompts, start, model.latents(seeds), seeds, (Neurons(),) * len(rows))
        plain = NoMitigation()
        plain.setup(model, Setup(batch_size=method.batch_size))
        found = search_embeddings(
            model, plain, batch, self.training_images[rows],
            steps=method.steps, rate=method.search_rate, samples=method.samples,
        )  # fmt: skip
        return found.text

    @override
    def gradients(self, number: int) -> list[Tensor]:
        rows, weights = self.chosen(number), [*self.network.parameters()]
        generator = self._generator("update", number)
        kept = torch.randint(len(self.kept.latents), (len(rows),), generator=generator).tolist()
        keep = self.kept.rows(kept)
        clean = torch.cat([self.surrogates.latents[rows], keep.latents])
        text = self.adversarial(number).followed_by(keep.text)
        timesteps = torch.randint(self.model.training_timesteps, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        gradients = [torch.zeros_like(weight) for weight in weights]
        for part in batched(range(len(clean)), max(1, self.method.batch_size // GRADIENT_MEMORY)):
            own = list(part)
            losses = self.model.training_losses(clean[own], timesteps[own].to(clean.device), noise[own], text.rows(own))
            # The mean over rows of either sort, of which there are equally many.
            own_gradients = torch.autograd.grad(losses.sum() / len(rows), weights)
            for total, found in zip(gradients, own_gradients, strict=True):
                total += found
        finite_norm(gradients, f"update {number + 1} of {self.updates}")
        return gradients

    def _generator(self, what: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(["adversarial", what, self.method.seed, number]))
