"""Activations of value neurons, weighted by what they write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
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
        outputs = {layer: _outputs(model.network, layer) for layer in active}
        return {layer: values * outputs[layer].detach().float().norm(dim=0) for layer, values in active.items()}


def _outputs(network: nn.Module, layer: str) -> Tensor:
    """Weights by which the attention of a value layer writes, (channels, neurons)."""
    path = layer.rpartition(".")[0]
    attention = network.get_submodule(path)
    if getattr(attention, "to_out", None) is not None:
        return attention.get_parameter("to_out.0.weight")
    # In the single blocks of FLUX attention and feed-forward share a projection.
    weights = network.get_parameter(f"{path.rpartition('.')[0]}.proj_out.weight")
    return weights[:, : len(network.get_parameter(f"{layer}.weight"))]
