"""Outlier scores of activations, from which NeMo takes its first candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError
from nemo_bench.localization.calibration import Calibration, activations
from nemo_bench.localization.localizers.base import Inputs, Ranker
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


@dataclass(eq=False, kw_only=True)
class OutlierScore(Ranker):
    """How far an activation is from its mean over general prompts, in standard deviations."""

    title = "Outlier score"
    summary = "distance of the activation from its mean over general prompts, in standard deviations"
    citation = cite("hintersdorf2024nemo")
    sourcing = "paper and public code"
    needs_calibration = True

    @override
    def score(self, model: Diffusion, prompt: Prompt, inputs: Inputs) -> Mapping[str, Tensor]:
        return outlier_scores(model, prompt, inputs.calibration)


def outlier_scores(model: Diffusion, prompt: Prompt, calibration: Calibration | None) -> dict[str, Tensor]:
    """Outlier scores of all neurons, (neurons,), on the CPU, by layer; that of a neuron without variance is 0."""
    if calibration is None:
        raise ConfigError("outlier scores need a calibration: give one as inputs.calibration")
    active = activations(model, model.encode([prompt.text]))
    return {
        layer: ((values[0].cpu() - calibration.mean[layer]).abs() / calibration.std[layer]).nan_to_num(0.0, 0.0)
        for layer, values in active.items()
    }
