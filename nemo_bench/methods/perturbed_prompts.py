"""Perturbations of the prompt: random tokens, random numbers, repeated words, noise on its embedding.

Somepalli et al. 2023; defaults are those of the public script ``sd_mitigation.py``. All random choices for an image
follow from the seed of its starting noise, so that neither batches nor processes change them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, Conditioning, Diffusion
from nemo_bench.methods.base import Batch, Method
from nemo_bench.records.citations import cite
from nemo_bench.records.io import digest, seed_of
from nemo_bench.records.ranges import Index, NotNegative

TOKENS = 49400  # Ids below this are drawn, as in the public script, of larger vocabularies too.


@dataclass(eq=False)
class Insertion(Method):
    """Inserts words at uniformly drawn gaps of the prompt, both ends included, one after another.

    Single spaces separate words. The text encoder cuts a prompt that grows too long; records keep the whole text.
    """

    touches = "prompt text"
    families = frozenset(FAMILIES)
    sourcing = "public code"
    citation = cite("somepalli2023understanding")

    times: Index = 4  #: Number of words.
    seed: int = 0  #: Another seed draws other words.

    @abstractmethod
    def draw(self, random: Random, model: Diffusion, words: list[str]) -> str:
        """Draws one word, given those of the original prompt."""

    def perturbed(self, model: Diffusion, text: str, seed: int) -> str:
        """The prompt of one image, by the seed of its starting noise."""
        random = Random(int(digest([type(self).__name__, self.seed, seed]), 16))
        original = text.split(" ")
        words = list(original)
        for _ in range(self.times):
            word = self.draw(random, model, original)
            words.insert(random.randint(0, len(words)), word)
            words = " ".join(words).split(" ")
        return " ".join(words)

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        rows = zip(batch.prompts, batch.seeds, strict=True)
        texts = [self.perturbed(model, prompt.text, seed) for prompt, seed in rows]
        yield replace(batch, text=model.encode(texts), notes=tuple({"text": text} for text in texts))


class RandomTokens(Insertion):
    """Inserts random tokens of the vocabulary (RTA); a decoded token can be half a word or white space.

    Nothing is published for transformers: tokens are those of the tokenizer that records show, T5's in FLUX and PixArt
    and Gemma's in Sana, and the text with them goes to all encoders.
    """

    title = "Random token addition"
    summary = "random tokens inserted into the prompt"

    @override
    def draw(self, random: Random, model: Diffusion, words: list[str]) -> str:
        tokenizer = getattr(model.pipeline, model.family.segments(model.pipeline)[0].tokenizer)
        # The last two of CLIP's vocabulary are special tokens; others have them among the first.
        count = min(TOKENS, len(tokenizer) - 2)
        drawn = random.randrange(count)
        while drawn in tokenizer.all_special_ids:
            drawn = random.randrange(count)
        return str(tokenizer.decode([drawn]))


class RandomNumbers(Insertion):
    """Inserts random numbers below 100,000 (RNA)."""

    title = "Random number addition"
    summary = "random numbers inserted into the prompt"

    @override
    def draw(self, random: Random, model: Diffusion, words: list[str]) -> str:
        return str(random.randrange(100_000))


class RepeatedWords(Insertion):
    """Inserts words of the prompt again (CWR)."""

    title = "Caption word repetition"
    summary = "words of the prompt repeated at random places"

    @override
    def draw(self, random: Random, model: Diffusion, words: list[str]) -> str:
        return random.choice(words)


@dataclass(eq=False)
class EmbeddingNoise(Method):
    """Adds Gaussian noise to the encoded prompt (GNI), and by default, as the public script does, to the empty one.

    Pooled embeddings stay as they are. The published scale does next to nothing in the embedded model, whose
    embeddings have a standard deviation of 1, as in the comparison of Chen et al. (2024, AMG).

    Nothing is published for transformers. There the scale is ``relative``, since embeddings of T5 and Gemma are of
    other sizes than CLIP's; padding that the network does not see stays as it is, and so do the zeros that widen CLIP's
    states in Stable Diffusion 3.
    """

    title = "Gaussian noise on embeddings"
    families = frozenset(FAMILIES)
    summary = "Gaussian noise on the encoded prompt"
    touches = "encoded prompt"
    sourcing = "public code"
    citation = cite("somepalli2023understanding")

    scale: NotNegative = 0.1  #: Standard deviation of the noise.
    both: bool = True  #: Whether the unconditional embedding gets its own noise as well.
    seed: int = 0  #: Another seed draws other noise.
    #: Whether the scale is in standard deviations of each prompt's embedding, those of CLIP and T5 apart; ours.
    relative: bool = False

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        text = self._noisy(model, batch.text, batch.seeds, "conditional")
        empty = self._noisy(model, model.unconditional(len(text)), batch.seeds, "unconditional") if self.both else None
        yield replace(batch, text=text, unconditional=empty)

    def _noisy(self, model: Diffusion, text: Conditioning, seeds: Sequence[int], half: str) -> Conditioning:
        generators = [torch.Generator().manual_seed(seed_of([half, self.seed, seed])) for seed in seeds]
        noise = torch.stack([torch.randn(text.text.shape[1:], generator=generator) for generator in generators])
        used = model.family.used(text)
        scale = self.scale * self._deviations(model, text.text, used) if self.relative else self.scale
        return replace(text, text=torch.where(used, text.text + scale * noise.to(text.text), text.text))

    def _deviations(self, model: Diffusion, text: Tensor, used: Tensor) -> Tensor:
        """Standard deviation of what the network takes, of each row and the positions of each tokenizer."""
        deviations = torch.zeros_like(text[..., :1])
        for segment in model.family.segments(model.pipeline):
            for row in range(len(text)):
                deviations[row, segment.span] = text[row, segment.span][used[row, segment.span]].std()
        return deviations
