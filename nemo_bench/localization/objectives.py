"""What neurons are held responsible for: losses of a prompt that rise where a neuron that memorizes it is switched off.

All draws of noise and timesteps follow from the prompt's id, and are the same for every set of neurons that is tried.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Conditioning, Diffusion, fitted_picture
from nemo_bench.diffusion.noise import norms
from nemo_bench.errors import NotFiniteError
from nemo_bench.localization.noise_differences import noise_differences, similarity
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched

ObjectiveName = Literal["replay", "magnitude", "noise_difference"]
"""``replay``: the training loss of the prompt's training image at noisy timesteps. ``magnitude``: minus the norm of
text-conditional noise at the noisiest step. ``noise_difference``: minus the similarity of noise differences to those
with nothing switched off, which is what NeMo watches. The last two need no training image."""


class Objective(ABC):
    """A loss of one prompt over S draws, in passes of conditional rows alone.

    Args:
        model: The model, nothing blocked.
        prompt: The prompt.
        samples: S.
        batch_size: Rows of a pass without gradients, at most.

    Raises:
        NotFiniteError: The prompt lacks what the loss needs.
    """

    def __init__(self, model: Diffusion, prompt: Prompt, samples: int, batch_size: int) -> None:
        self.model = model
        self.samples = samples
        self.batch_size = batch_size
        self.text = model.encode([prompt.text]).clone()
        if lacking := self.lacks(prompt):
            raise NotFiniteError(lacking)
        self.prepare(prompt)

    @staticmethod
    def lacks(prompt: Prompt) -> str:
        """What a prompt lacks that the loss needs, with what to do; empty where it lacks nothing."""
        return ""

    @abstractmethod
    def prepare(self, prompt: Prompt) -> None:
        """Makes the draws, and measures what does not depend on neurons."""

    @abstractmethod
    def losses(self, draws: Sequence[int]) -> Tensor:
        """The loss of each row, (N,), float32, by the number of its draw, under what is blocked now, row by row."""

    def rows(self, count: int) -> Conditioning:
        """The conditioning of some rows."""
        return self.text.rows([0] * count)

    def noise(self, prompt: Prompt) -> Tensor:
        """Standard normal latents of all draws, (S, channels, height, width)."""
        return self.model.latents(seeds_of(prompt, "localize", range(self.samples)))


class Replay(Objective):
    """The training loss of the prompt's training image; of several, draws take one after the other.

    Attributes:
        noisier: Part of the timesteps that is looked at, from the noisiest on. In the noisier half the text decides
            what is drawn.
    """

    noisier: ClassVar[float] = 0.5

    @override
    @staticmethod
    def lacks(prompt: Prompt) -> str:
        if prompt.references:
            return ""
        return "it has no training image, which objective=replay needs; take localizer.objective=magnitude"

    @override
    def prepare(self, prompt: Prompt) -> None:
        model, count = self.model, len(prompt.references)
        pictures = [fitted_picture(path, model.image_size) for path in prompt.references[: self.samples]]
        clean = model.encode_images(torch.stack(pictures))
        self.clean = clean[[draw % count for draw in range(self.samples)]].float()
        self.noises = self.noise(prompt).float()
        # In the middle of S equal parts.
        whole, part = model.training_timesteps, model.training_timesteps * self.noisier
        places = [whole - part + (draw + 0.5) * part / self.samples for draw in range(self.samples)]
        self.timesteps = torch.tensor(places, device=model.device).long()

    @override
    def losses(self, draws: Sequence[int]) -> Tensor:
        own = list(draws)
        return self.model.training_losses(self.clean[own], self.timesteps[own], self.noises[own], self.rows(len(own)))


class ReplayOfAll(Replay):
    """The same over all timesteps alike, as in training."""

    noisier = 1.0


class Magnitude(Objective):
    """Minus the norm of text-conditional noise at the noisiest step, which is large for memorized prompts."""

    @override
    def prepare(self, prompt: Prompt) -> None:
        self.noises = self.noise(prompt)
        parts = []
        with torch.no_grad():
            for rows in batched(range(self.samples), self.batch_size):
                unconditional = self.model.unconditional(len(rows)).clone()
                parts.append(self.model.predict_noise(self.noises[list(rows)], self.model.timestep(), unconditional))
        self.unconditional = torch.cat(parts)

    @override
    def losses(self, draws: Sequence[int]) -> Tensor:
        own = list(draws)
        conditional = self.model.predict_noise(self.noises[own], self.model.timestep(), self.rows(len(own)))
        return -norms(conditional - self.unconditional[own])


class NoiseDifference(Objective):
    """Minus the similarity of noise differences to those with nothing blocked: as low as it can be at first."""

    @override
    def prepare(self, prompt: Prompt) -> None:
        self.noises = self.noise(prompt)
        with torch.no_grad():
            self.original = torch.cat(
                [self._differences(list(rows)) for rows in batched(range(self.samples), self.batch_size)]
            )

    def _differences(self, draws: list[int]) -> Tensor:
        return noise_differences(self.model, self.rows(len(draws)), self.noises[draws])

    @override
    def losses(self, draws: Sequence[int]) -> Tensor:
        own = list(draws)
        return -similarity(self.original[own], self._differences(own), self.model.similarity)


OBJECTIVES: dict[ObjectiveName, type[Objective]] = {
    "replay": Replay,
    "magnitude": Magnitude,
    "noise_difference": NoiseDifference,
}
