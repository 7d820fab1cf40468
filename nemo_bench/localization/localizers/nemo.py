"""NeMo as a localizer, in all its variants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.localization.localizers.base import Inputs, Localizer, as_scores
from nemo_bench.localization.localizers.outlier_score import outlier_scores
from nemo_bench.localization.nemo import NemoSearch
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Localization, Neurons, Prompt


@dataclass(eq=False)
class NemoLocalizer(Localizer, NemoSearch):
    """The neurons that NeMo blocks.

    It gives a set, whose size it finds itself. So that it can be compared with localizers that rank, its neurons come
    first in its ranking, then its other candidates, then all others, each part by outlier score.

    The settings are those of :class:`NemoSettings` and :class:`NemoSearch`.
    """

    title = "NeMo"
    summary = "outlier activations, refined on noise differences: the set that NeMo blocks"
    citation = cite("hintersdorf2024nemo")
    sourcing = "paper and public code; the ranking is ours"
    needs_calibration = True
    makes_passes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_settings()
        self.memorization_threshold = self.threshold
        self.calibrates_threshold = self.needs_threshold
        self.noise_protocol = self.own_protocol

    @override
    def localize(self, model: Diffusion, prompt: Prompt, inputs: Inputs) -> Localization:
        found = self.search(model, prompt, inputs.calibration, inputs.latents, inputs.batch_size)
        outliers = outlier_scores(model, prompt, inputs.calibration)
        # An outlier score has no end; as a part of one, a step of one outweighs it.
        scores = {layer: values / (1 + values) for layer, values in outliers.items()}
        for part in (found.neurons | found.initial, found.neurons):
            _raise(scores, part)
        return replace(found, scores=as_scores(scores))


def _raise(scores: dict[str, Tensor], neurons: Neurons) -> None:
    for layer, ids in neurons.items():
        scores[layer][torch.tensor(ids)] += 1
