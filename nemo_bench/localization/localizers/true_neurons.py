"""The neurons that are known to memorize a prompt: what a localizer can reach at best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, NotFiniteError
from nemo_bench.localization.localizers.base import Inputs, Localizer, as_scores
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.truth import read_truth, truth_digest


@dataclass(eq=False)
class TrueNeurons(Localizer):
    """The true neurons themselves; prompts that have none known fail."""

    title = "True neurons"
    summary = "the known neurons themselves: what a localizer can reach at best (control)"
    sourcing = "a control"

    truth: str | None = None  #: File of the known neurons, ``model.truth``.

    @cached_property
    def _known(self) -> dict[str, Neurons]:
        if self.truth is None:
            raise ConfigError("this model's true neurons are not known: set model.truth, or leave out localizer=truth")
        return read_truth(Path(self.truth))

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        return {"truth": truth_digest(self._known, prompts)}

    @override
    def lacks(self, prompt: Prompt) -> str:
        return "" if prompt.id in self._known else f"its true neurons are not known, in model.truth={self.truth}"

    @override
    def localize(self, model: Diffusion, prompt: Prompt, inputs: Inputs) -> Localization:
        if lacking := self.lacks(prompt):
            raise NotFiniteError(lacking)
        neurons = self._known[prompt.id]
        model.masks.check(neurons)
        scores = {layer: torch.zeros(width) for layer, width in model.masks.widths.items()}
        for layer, ids in neurons.items():
            scores[layer][torch.tensor(ids)] = 1
        return Localization(neurons, scores=as_scores(scores))
