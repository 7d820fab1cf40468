"""What general prompts look like inside a model: activation statistics and the memorization threshold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_bench.diffusion import Conditioning, Diffusion


@dataclass(frozen=True)
class Calibration:
    """Statistics of the value neurons and the threshold of a model.

    Attributes:
        mean: Mean activation of every neuron over general prompts, by layer in network order.
        std: Unbiased standard deviation of the same.
        threshold: Similarity of noise differences above which a prompt counts as memorized.
        prompts: Number of general prompts behind it.
    """

    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    threshold: float
    prompts: int

    def save(self, path: Path) -> None:
        """Writes a safetensors file, under another name first."""
        tensors = {f"mean/{k}": v for k, v in self.mean.items()} | {f"std/{k}": v for k, v in self.std.items()}
        about = {"threshold": repr(self.threshold), "prompts": str(self.prompts), "layers": json.dumps([*self.mean])}
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata=about)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads what :meth:`save` wrote."""
        with safe_open(path, "pt") as file:
            about = file.metadata()
            layers = json.loads(about["layers"])
            mean = {name: file.get_tensor(f"mean/{name}") for name in layers}
            std = {name: file.get_tensor(f"std/{name}") for name in layers}
        return cls(mean, std, float(about["threshold"]), int(about["prompts"]))


def activations(model: Diffusion, text: Conditioning) -> dict[str, Tensor]:
    """Activation of every value neuron: mean over tokens of the absolute output of the value projection.

    Cross-attention values depend on the text embedding alone, so no UNet pass is needed
    (Hintersdorf et al. 2024, section 3.2).

    Args:
        model: The model, nothing blocked.
        text: Conditioning of N rows.

    Returns:
        By layer, in network order, activations of shape (N, neurons) in float32, at least 0.
    """
    with torch.no_grad():
        return {name: layer(text.text).float().abs().mean(1) for name, layer in model.value_layers.items()}


class Moments:
    """Streamed mean and variance (Welford; Chan et al. for merging), in float64.

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[1.0], [3.0]]))
        >>> moments.mean, moments.std
        (tensor([2.], dtype=torch.float64), tensor([1.4142], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Takes in rows of shape (N, neurons)."""
        values = values.detach().double().cpu()
        mean = values.mean(0)
        squares = (values - mean).square().sum(0)
        total = self.count + len(values)
        shift = mean - self.mean
        self._squares = self._squares + squares + shift.square() * self.count * len(values) / total
        self.mean = self.mean + shift * len(values) / total
        self.count = total

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation; needs two rows."""
        return (self._squares / (self.count - 1)).sqrt()


def activation_statistics(
    model: Diffusion, batches: Iterable[Sequence[str]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and standard deviation of the activations over prompts, streamed.

    Args:
        model: The model, nothing blocked.
        batches: Prompts, some at a time; at least two in all.

    Returns:
        Mean and unbiased standard deviation by layer, float32 tensors of shape (neurons,).
    """
    moments = {name: Moments() for name in model.value_layers}
    for texts in batches:
        for name, values in activations(model, model.encode(texts)).items():
            moments[name].add(values)
    mean = {name: m.mean.float() for name, m in moments.items()}
    return mean, {name: m.std.float() for name, m in moments.items()}


def threshold(pair_scores: Iterable[float]) -> float:
    """Mean plus one standard deviation of the pairwise scores over general prompts.

    Args:
        pair_scores: Similarities of the noise differences of all pairs of seeds, all prompts together, at least two.

    Returns:
        The threshold (published for Stable Diffusion 1.4: 0.428).
    """
    values = torch.tensor(list(pair_scores), dtype=torch.float64)
    return float(values.mean() + values.std())
