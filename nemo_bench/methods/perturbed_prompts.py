"""Perturbations of the prompt: random tokens, random numbers, repeated words, noise on its embedding.

Somepalli et al. 2023; defaults are those of the public script ``sd_mitigation.py``. Every image draws its own, from the
seed of its starting noise, so that neither batches nor processes change it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random

import torch

from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.records.citations import cite
from nemo_bench.records.io import digest

_CITATION = cite("somepalli2023understanding")
_TOKENS, _NUMBERS = 49400, 100_000
"""Ids of CLIP's vocabulary that the public script draws from, without the special ones, and numbers; both exclusive."""


class Insertion(Method):
    """Inserts words at uniformly drawn gaps of the prompt, both ends included, one after another.

    Words are what single spaces separate. The end of a prompt that grows longer than the text encoder reads is cut off;
    records tell the whole text.

    Args:
        times: How many words, at least 0.
        seed: Another seed draws other words.

    Raises:
        ConfigError: ``times`` is negative.
    """

    touches = "prompt text"
    sourcing = "public code"
    citation = _CITATION

    def __init__(self, times: int = 4, seed: int = 0) -> None:
        if times < 0:
            raise ConfigError(f"inserting words needs times of 0 or more, given {times}")
        self.times, self.seed = times, seed

    @abstractmethod
    def draw(self, random: Random, model: Diffusion, words: list[str]) -> str:
        """Draws one word.

        Args:
            random: Where to draw from.
            model: The model, for its vocabulary.
            words: Words of the prompt as it was given.
        """

    def perturbed(self, model: Diffusion, text: str, seed: int) -> str:
        """The prompt of one image.

        Args:
            model: The model.
            text: The prompt as it was given.
            seed: Seed of the image's starting noise.
        """
        random, given = Random(int(digest([type(self).__name__, self.seed, seed]), 16)), text.split(" ")
        words = list(given)
        for _ in range(self.times):
            word = self.draw(random, model, given)
            words.insert(random.randint(0, len(words)), word)
            words = " ".join(words).split(" ")
        return " ".join(words)

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        rows = zip(batch.prompts, batch.seeds, strict=True)
        texts = [self.perturbed(model, prompt.text, seed) for prompt, seed in rows]
        yield replace(batch, text=model.encode(texts), notes=tuple({"text": text} for text in texts))


class RandomTokens(Insertion):
    """Inserts random tokens of the vocabulary (RTA); a decoded token can be half a word or white space."""

    title = "Random token addition"
    summary = "random tokens inserted into the prompt"

    def draw(self, random: Random, model: Diffusion, words: list[str]) -> str:
        """See :meth:`Insertion.draw`."""
        tokenizer = model.pipeline.tokenizer
        return str(tokenizer.decode([random.randrange(min(_TOKENS, tokenizer.bos_token_id))]))


class RandomNumbers(Insertion):
    """Inserts random numbers below 100,000 (RNA)."""

    title = "Random number addition"
    summary = "random numbers inserted into the prompt"

    def draw(self, random: Random, model: Diffusion, words: list[str]) -> str:
        """See :meth:`Insertion.draw`."""
        return str(random.randrange(_NUMBERS))


class RepeatedWords(Insertion):
    """Inserts words of the prompt again (CWR)."""

    title = "Caption word repetition"
    summary = "words of the prompt repeated at random places"

    def draw(self, random: Random, model: Diffusion, words: list[str]) -> str:
        """See :meth:`Insertion.draw`."""
        return random.choice(words)


class EmbeddingNoise(Method):
    """Adds Gaussian noise to the encoded prompt (GNI), and by default, as the public script does, to the empty one.

    Of SDXL the pooled embedding stays as it is. The published scale does next to nothing in the embedded model, as in
    the comparison of Chen et al. (2024, AMG); the spread of the embeddings themselves is 1 there.

    Args:
        scale: Standard deviation of the noise, at least 0.
        both: Whether the unconditional embedding gets noise of its own as well.
        seed: Another seed draws other noise.

    Raises:
        ConfigError: The scale is out of range.
    """

    title = "Gaussian noise on embeddings"
    summary = "Gaussian noise on the encoded prompt"
    touches = "encoded prompt"
    sourcing = "public code"
    citation = _CITATION

    def __init__(self, scale: float = 0.1, both: bool = True, seed: int = 0) -> None:
        if not 0 <= scale < math.inf:
            raise ConfigError(f"embedding_noise needs a finite scale of 0 or more, given {scale}")
        self.scale, self.both, self.seed = scale, both, seed

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        text = self._noisy(batch.text, batch.seeds, "conditional")
        empty = self._noisy(model.unconditional(len(text)), batch.seeds, "unconditional") if self.both else None
        yield replace(batch, text=text, unconditional=empty)

    def _noisy(self, text: Conditioning, seeds: Sequence[int], half: str) -> Conditioning:
        drawn = [torch.Generator().manual_seed(int(digest([half, self.seed, seed]), 16) >> 1) for seed in seeds]
        noise = torch.stack([torch.randn(text.text.shape[1:], generator=generator) for generator in drawn])
        return replace(text, text=text.text + self.scale * noise.to(text.text))
