"""Localizers that prune a prompt's neurons: masks of all layers are learned at once, few neurons stay on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Adam
from typing_extensions import override

from nemo_bench.diffusion import GRADIENT_MEMORY
from nemo_bench.errors import ConfigError
from nemo_bench.localization.localizers.attribution import Attribution
from nemo_bench.localization.objectives import Objective
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched, seed_of
from nemo_bench.records.ranges import Count, NotNegative, Positive

Parameters = Mapping[str, Tensor]
"""What is learned, (neurons,), by layer."""


@dataclass(eq=False, kw_only=True)
class LearnedMasks(Attribution):
    """Minimizes the loss of the prompt and a penalty on neurons that stay on, by Adam."""

    needs = frozenset({"gradients"})

    steps: Count = 200  #: Steps of Adam, at most.
    rate: Positive = 0.05  #: Its learning rate.
    weight: Positive = 1.0  #: Weight of the penalty, against the loss of the prompt.
    #: Penalty below which it stops; 0 to take all steps.
    stop: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "noise_difference":
            raise ConfigError(
                f"{self.title}: objective=noise_difference is as low as it can be with all neurons on, so that nothing "
                "is learned; take replay or magnitude"
            )

    @override
    def least_passes(self, widths: Mapping[str, int]) -> int:
        return 2 * (1 if self.stop else self.steps) * self.samples

    @override
    @torch.enable_grad()
    def attribute(self, objective: Objective, prompt: Prompt) -> Mapping[str, Tensor]:
        model = objective.model
        generator = torch.Generator().manual_seed(seed_of(["masks", prompt.id]))
        learned = {layer: self.start(width).to(model.device) for layer, width in model.masks.widths.items()}
        optimizer = Adam([values.requires_grad_() for values in learned.values()], lr=self.rate)
        rows = max(1, objective.batch_size // GRADIENT_MEMORY)
        for _ in range(self.steps):
            optimizer.zero_grad()
            penalty = self.penalty(learned)
            if float(penalty.detach()) < self.stop:
                break
            (self.weight * penalty).backward()
            drawn = {layer: self.draw(len(values), generator) for layer, values in learned.items()}
            for part in batched(range(objective.samples), rows):
                masks = {layer: self.mask(values, drawn[layer].to(model.device)) for layer, values in learned.items()}
                with model.masks.scale({layer: mask.expand(len(part), -1) for layer, mask in masks.items()}):
                    loss = objective.losses(part).sum() / objective.samples
                loss.backward()
            optimizer.step()
        return self.scores(learned)

    def draw(self, width: int, generator: torch.Generator) -> Tensor:
        """Random numbers of a step for the masks of a layer; unused where masks are not random."""
        return torch.zeros(width)

    @abstractmethod
    def start(self, width: int) -> Tensor:
        """What is learned of a layer, before the first step, (neurons,)."""

    @abstractmethod
    def mask(self, learned: Tensor, drawn: Tensor) -> Tensor:
        """Factors of the neurons of a layer in one step, (neurons,) in [0, 1]."""

    @abstractmethod
    def penalty(self, learned: Parameters) -> Tensor:
        """What neurons that stay on cost; one number."""

    @abstractmethod
    def scores(self, learned: Parameters) -> Parameters:
        """How far each neuron stays on."""
