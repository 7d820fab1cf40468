"""Localizers that hold neurons responsible for a loss of the prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError
from nemo_bench.localization.localizers.base import Inputs, Ranker
from nemo_bench.localization.objectives import OBJECTIVES, Objective, ObjectiveName
from nemo_bench.prompts import read_prompts
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import prompts_digest
from nemo_bench.records.ranges import Count, Index


@dataclass(eq=False, kw_only=True)
class Attribution(Ranker):
    """Scores neurons by what a loss of the prompt says of them."""

    makes_passes = True

    #: The loss; ``"replay"`` needs the prompt's training image.
    objective: ObjectiveName = "replay"
    samples: Count = 4  #: Draws of noise, and of timesteps, that the loss is the mean over.
    #: General prompts whose mean score is subtracted, where the loss needs no training image and so says as well how
    #: much any text matters; 0 for none.
    center: Index = 8
    general: str | None = None  #: File of these general prompts, its first ones are taken.
    _mean: dict[str, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in get_args(ObjectiveName):
            raise ConfigError(f"{self.title}: objective={self.objective}; expected {', '.join(OBJECTIVES)}")

    @override
    def least_passes(self, widths: Mapping[str, int]) -> int:
        return self.samples

    @override
    def lacks(self, prompt: Prompt) -> str:
        return OBJECTIVES[self.objective].lacks(prompt)

    @property
    def centers(self) -> bool:
        """Whether scores of general prompts are subtracted."""
        return self.objective != "replay" and self.center > 0

    def _general_prompts(self) -> list[Prompt]:
        if self.general is None:
            raise ConfigError(
                f"{self.title}: objective={self.objective} is compared with general prompts; set prompts.calibration "
                "to a file of them, or localizer.center=0"
            )
        return read_prompts(self.general, limit=self.center)

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        return {"general": prompts_digest(self._general_prompts()) if self.centers else None}

    @override
    def setup(self, model: Diffusion, batch_size: int) -> None:
        if self.centers:
            found = [self._scores(model, prompt, batch_size) for prompt in self._general_prompts()]
            self._mean = {layer: torch.stack([scores[layer] for scores in found]).mean(0) for layer in found[0]}

    @override
    def score(self, model: Diffusion, prompt: Prompt, inputs: Inputs) -> Mapping[str, Tensor]:
        scores = self._scores(model, prompt, inputs.batch_size)
        if not self.centers:
            return scores
        if self._mean is None:
            raise ConfigError(f"{self.title}: call setup first, which measures the scores of general prompts")
        return {layer: values - self._mean[layer] for layer, values in scores.items()}

    def _scores(self, model: Diffusion, prompt: Prompt, batch_size: int) -> dict[str, Tensor]:
        with torch.inference_mode(False):  # gradients do not flow through what was made in it
            objective = OBJECTIVES[self.objective](model, prompt, self.samples, batch_size)
            return {layer: values.detach().cpu() for layer, values in self.attribute(objective, prompt).items()}

    @abstractmethod
    def attribute(self, objective: Objective, prompt: Prompt) -> Mapping[str, Tensor]:
        """Scores of all neurons, (neurons,), by layer in network order."""
