"""Activations of value neurons, weighted by what they write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.localization.calibration import activations
from nemo_bench.localization.localizers.base import Inputs, Ranker
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


@dataclass(eq=False, kw_only=True)
class Activation(Ranker):
    """Mean absolute activation of a neuron over tokens, times the norm of its output vector.

    Where values depend on the text alone, no pass of the network is needed.
    """

    title = "Activation"
    summary = "mean absolute activation over tokens, times the norm of the neuron's output vector"
    citation = cite("chang2024localization")
    sourcing = "paper, for feed-forward neurons of language models; our adaptation to value neurons"

    weighted: bool = True  #: Whether output vectors count.

    @override
    def score(self, model: Diffusion, prompt: Prompt, inputs: Inputs) -> Mapping[str, Tensor]:
        active = {layer: values[0] for layer, values in activations(model, model.encode([prompt.text])).items()}
        if not self.weighted:
            return active
        outputs = {layer: model.network.get_submodule(layer.rpartition(".")[0]).to_out[0].weight for layer in active}
        return {layer: values * outputs[layer].detach().float().norm(dim=0) for layer, values in active.items()}
