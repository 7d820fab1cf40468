"""Integrated gradients on masks of value neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import GRADIENT_MEMORY
from nemo_bench.localization.localizers.attribution import Attribution
from nemo_bench.localization.objectives import Objective
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched


@dataclass(eq=False, kw_only=True)
class IntegratedGradients(Attribution):
    """Mean slope of minus the loss as a whole layer is switched on, the others on.

    The gradient is that of a factor on each neuron. A factor times a neuron's activation is its activation on the path,
    so this is activation times mean gradient, as published. Its sign counts: a neuron that the loss is lower without
    has a negative score.
    """

    title = "Integrated gradients"
    summary = "mean slope of the loss of the prompt as a layer of neurons is switched on"
    citation = cite("chang2024localization")
    sourcing = "paper and public code, for feed-forward neurons of language models; our adaptation"
    needs = frozenset({"gradients"})

    steps: Annotated[int, Field(ge=2)] = 20  #: Points of the path from off to on, both ends included.

    @override
    def least_passes(self, widths: Mapping[str, int]) -> int:
        return 2 * self.steps * self.samples * max(1, len(widths))

    @override
    @torch.enable_grad()
    def attribute(self, objective: Objective, prompt: Prompt) -> Mapping[str, Tensor]:
        model = objective.model
        points = torch.linspace(0, 1, self.steps).tolist()
        rows = list(product(points, range(objective.samples)))
        scores = {}
        for layer, width in model.masks.widths.items():
            slopes = torch.zeros(width, device=model.device)
            for part in batched(rows, max(1, objective.batch_size // GRADIENT_MEMORY)):
                factors = {
                    name: torch.ones(len(part), own, device=model.device) for name, own in model.masks.widths.items()
                }
                heights = torch.tensor([point for point, _ in part], device=model.device)
                factors[layer] = (factors[layer] * heights[:, None]).requires_grad_()
                with model.masks.scale(factors):
                    gained = -objective.losses([draw for _, draw in part]).sum()
                slopes += torch.autograd.grad(gained, factors[layer])[0].sum(0)
            scores[layer] = slopes / len(rows)
        return scores
