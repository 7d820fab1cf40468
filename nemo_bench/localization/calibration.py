"""What general prompts look like inside a model: activation statistics and the memorization threshold."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.errors import ConfigError, ModelError, NotFiniteError, StoreError
from nemo_bench.localization.noise_differences import noise_differences, pair_similarities, pair_values
from nemo_bench.localization.protocol import PAPER, SEEDS, Protocol
from nemo_bench.prompts.data import seeds_of
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import parse_json

Statistics = tuple[list[Tensor], list[Tensor]]
"""Means and standard deviations, one tensor a value layer in network order: the form of the published file."""
ENCODED = 64
"""Prompts that the text encoder sees at once."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of the value neurons and the threshold of a model.

    Attributes:
        mean: Mean activation of every neuron over general prompts, by layer in network order.
        std: Unbiased standard deviation of the same.
        threshold: Similarity of noise differences above which a prompt counts as memorized.
        prompts: Number of general prompts behind what was measured; 0 where statistics and threshold were given.
        maxima: The same threshold from the most alike pair of seeds of each prompt, None where it was not measured.
    """

    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    threshold: float
    prompts: int = 0
    maxima: float | None = None

    def gate(self, threshold: float, kind: str) -> float:
        """What the gate compares the most alike pair of seeds of a prompt with.

        Args:
            threshold: The memorization threshold in use.
            kind: ``"pairs"`` or ``"maxima"``; see :class:`NemoSettings`.

        Raises:
            ConfigError: No threshold from maxima was measured.
        """
        if kind == "pairs":
            return threshold
        if self.maxima is None:
            raise ConfigError("gate=maxima needs a threshold from maxima, and this calibration was given: measure one")
        return self.maxima

    @classmethod
    def measured(
        cls,
        model: Diffusion,
        prompts: Sequence[Prompt],
        seeds: int = SEEDS,
        protocol: Protocol = PAPER,
        batch_size: int = 32,
    ) -> Calibration:
        """Measures statistics and threshold on general prompts, in memory; ``nemo-bench calibrate`` keeps them on disk.

        Args:
            model: The model, nothing blocked.
            prompts: Prompts that are not memorized, at least 2; more make the outliers and the threshold steadier.
            seeds: Seeds a prompt, at least 2.
            protocol: How noise differences are taken.
            batch_size: Rows in a UNet pass at most.

        Raises:
            ConfigError: There are fewer prompts or seeds.
            NotFiniteError: Noise differences of more than half of the prompts are not finite; fewer are left out.
        """
        if len(prompts) < 2 or seeds < 2:
            msg = f"a calibration needs 2 general prompts and 2 seeds at least, given {len(prompts)} and {seeds}"
            raise ConfigError(msg)
        texts = [prompt.text for prompt in prompts]
        mean, std = activation_statistics(model, [texts[i : i + ENCODED] for i in range(0, len(texts), ENCODED)])
        together = max(1, batch_size // seeds)
        parts = (prompts[i : i + together] for i in range(0, len(prompts), together))
        pairs = [values for part in parts for values in pair_scores(model, part, seeds, protocol, batch_size)]
        usable = [values for values in pairs if all(map(math.isfinite, values))]
        if 2 * len(usable) < len(pairs):
            msg = f"noise differences of {len(pairs) - len(usable)} of {len(pairs)} general prompts are not finite, so"
            raise NotFiniteError(f"{msg} there is no threshold; try float32 or bfloat16")
        return cls(mean, std, threshold(chain(*usable)), len(usable), threshold(map(max, usable)))

    @classmethod
    def published(cls, path: Path, model: Diffusion, threshold: float) -> Calibration:
        """Published statistics with a threshold, such as the 0.428 of Stable Diffusion 1.4.

        Args:
            path: See :func:`read_statistics`.
            model: The model they were measured on.
            threshold: A similarity in [-1, 1].

        Raises:
            ModelError: The file holds no statistics, or those of other layers than the model's.
        """
        return cls(*name_layers(read_statistics(path), model.masks.widths), threshold)


def read_statistics(path: Path) -> Statistics:
    """Reads activation statistics in the form published with the method's code (Hintersdorf et al. 2024).

    Args:
        path: What ``torch.save`` wrote of (list of means, list of standard deviations).

    Returns:
        Both lists, float32 tensors of shape (neurons,) on the CPU.

    Raises:
        ModelError: The file is missing or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = ([values.float() for values in side] for side in content)
        if not mean or any(m.dim() != 1 or not m.isfinite().all() for m in mean + std):
            raise ValueError("not all of them are lists of finite numbers")
        if [m.shape for m in mean] != [s.shape for s in std]:
            raise ValueError("means and standard deviations differ in number")
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        msg = (
            f"{path}: no activation statistics can be read ({type(error).__name__}: {reason}); expected what "
            "torch.save writes of (list of means, list of standard deviations), one 1-D tensor a value layer; give "
            "such a file as model.statistics, or null to measure them"
        )
        raise ModelError(msg) from error
    return mean, std


def is_readable(path: Path) -> bool:
    """Whether a file of activation statistics is there and can be read."""
    try:
        read_statistics(path)
    except ModelError:
        return False
    return True


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Writes what :func:`read_statistics` and the public scripts read, under another name first.

    Args:
        path: The file; equal statistics give equal bytes.
        statistics: Means and standard deviations in network order.
    """
    buffer = io.BytesIO()
    torch.save(statistics, buffer)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(buffer.getvalue())
    part.replace(path)


def name_layers(statistics: Statistics, widths: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gives statistics the names of a model's layers.

    Args:
        statistics: Means and standard deviations in network order.
        widths: Number of neurons of each value layer of the model, in network order.

    Returns:
        Means and standard deviations by layer.

    Raises:
        ModelError: Number or widths of the layers differ.
    """
    given, expected = [len(values) for values in statistics[0]], [*widths.values()]
    if given != expected:
        msg = (
            f"the activation statistics are of {len(given)} layers with {given} neurons, the model has {len(expected)} "
            f"value layers with {expected}; give those of this model, set model.layers, or set model.statistics=null"
        )
        raise ModelError(msg)
    mean, std = (dict(zip(widths, side, strict=True)) for side in statistics)
    return mean, std


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


@dataclass
class Moments:
    """Streamed mean and variance in float64, merged as Chan, Golub and LeVeque (1983) do.

    Attributes:
        count: Number of rows taken in.
        mean: Their mean, (neurons,).
        squares: Sum of their squared deviations from it, (neurons,).

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[1.0], [3.0]]))
        >>> moments.mean, moments.std
        (tensor([2.], dtype=torch.float64), tensor([1.4142], dtype=torch.float64))
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Takes in rows of shape (N, neurons), N at least 1."""
        values = values.detach().cpu().double()
        mean = values.mean(0)
        self.merge(Moments(len(values), mean, (values - mean).square().sum(0)))

    def merge(self, other: Moments) -> None:
        """Takes in the rows of another; the order of merging decides the rounding."""
        if not other.count:
            return
        total = self.count + other.count
        share, shift = other.count / total, other.mean - self.mean
        self.squares = self.squares + other.squares + shift.square() * (self.count * share)
        self.mean = self.mean + shift * share
        self.count = total

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation; needs two rows."""
        return (self.squares / (self.count - 1)).sqrt()


def activation_moments(model: Diffusion, batches: Iterable[Sequence[str]]) -> dict[str, Moments]:
    """Moments of the activations over prompts, by layer in network order; see :func:`activation_statistics`.

    Prompts with an activation that is not finite are left out.
    """
    moments = {name: Moments() for name in model.value_layers}
    for texts in batches:
        found = activations(model, model.encode(texts))
        finite = torch.stack([values.isfinite().all(1) for values in found.values()]).all(0)
        for name, values in found.items():
            if finite.any():
                moments[name].add(values[finite])
    return moments


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
    moments = activation_moments(model, batches)
    mean = {name: m.mean.float() for name, m in moments.items()}
    return mean, {name: m.std.float() for name, m in moments.items()}


def save_moments(path: Path, moments: Mapping[str, Moments]) -> None:
    """Writes moments by layer as safetensors, under another name first."""
    tensors = {f"mean/{name}": m.mean for name, m in moments.items()}
    tensors |= {f"squares/{name}": m.squares for name, m in moments.items()}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file(tensors, part, metadata={"counts": json.dumps({name: m.count for name, m in moments.items()})})
    part.replace(path)


def load_moments(path: Path) -> dict[str, Moments]:
    """Reads what :func:`save_moments` wrote.

    Raises:
        StoreError: The file is missing or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            counts = parse_json(file.metadata()["counts"])
            return {
                name: Moments(count, file.get_tensor(f"mean/{name}"), file.get_tensor(f"squares/{name}"))
                for name, count in counts.items()
            }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        msg = f"{path} can't be read ({error}); delete it and run again"
        raise StoreError(msg) from error


def merge_statistics(files: Iterable[Path]) -> Statistics | None:
    """Statistics from moments of parts, merged in the order given, so that equal parts give equal bits.

    Args:
        files: What :func:`save_moments` wrote.

    Returns:
        Means and unbiased standard deviations, float32 tensors of shape (neurons,); None where fewer than two prompts
        have finite activations.
    """
    merged: dict[str, Moments] = {}
    for file in files:
        for name, moments in load_moments(file).items():
            merged.setdefault(name, Moments()).merge(moments)
    if any(m.count < 2 for m in merged.values()):
        return None
    return [m.mean.float() for m in merged.values()], [m.std.float() for m in merged.values()]


def pair_scores(
    model: Diffusion, prompts: Sequence[Prompt], seeds: int, protocol: Protocol = PAPER, batch_size: int = 32
) -> list[list[float]]:
    """Similarities of the noise differences of all pairs of seeds, from which the threshold comes.

    Args:
        model: The model, nothing blocked.
        prompts: General prompts.
        seeds: Seeds S a prompt.
        protocol: How noise differences are taken.
        batch_size: Rows in a UNet pass at most; the prompts share batches.

    Returns:
        For each prompt S (S - 1) / 2 similarities in [-1, 1]; not all finite where its noise differences are not.
    """
    text = model.encode([prompt.text for prompt in prompts])
    rows = [row for row in range(len(prompts)) for _ in range(seeds)]
    latents = torch.cat([protocol.latents(model, seeds_of(p, "localize", range(seeds))) for p in prompts])
    differences = torch.cat(
        [
            noise_differences(
                model, text.rows(rows[i : i + batch_size]), latents[i : i + batch_size], protocol, calibrating=True
            )
            for i in range(0, len(rows), batch_size)
        ]
    )
    matrices = (pair_similarities(own, model.similarity, protocol.similarity) for own in differences.split(seeds))
    return [pair_values(matrix).tolist() for matrix in matrices]


def threshold(pair_scores: Iterable[float]) -> float:
    """Mean plus one standard deviation of the pairwise scores over general prompts.

    Args:
        pair_scores: Similarities of the noise differences of all pairs of seeds, all prompts together, at least two; or
            the largest of each prompt, for a threshold from maxima.

    Returns:
        The threshold (published for Stable Diffusion 1.4: 0.428).
    """
    values = torch.tensor(list(pair_scores), dtype=torch.float64)
    return float(values.mean() + values.std())


def thresholds(pair_scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The memorization threshold, and what it says of the general prompts that it comes from.

    Args:
        pair_scores: Similarities of the noise differences of all pairs of seeds, by prompt; at least two prompts.

    Returns:
        ``threshold``; ``mean`` and ``std`` of the similarities; number of ``prompts``; ``passed_gate``, how many of
        them have a pair above the threshold, and so pass the gate as if they were memorized; and ``maxima``, the same
        of the most alike pair of each prompt: ``threshold``, ``mean``, ``std``, ``passed_gate``.
    """
    highest = [max(values) for values in pair_scores]

    def describe(values: Sequence[float]) -> dict[str, Any]:
        scores, limit = torch.tensor(values, dtype=torch.float64), threshold(values)
        passed = sum(value > limit for value in highest)
        return {"threshold": limit, "mean": float(scores.mean()), "std": float(scores.std()), "passed_gate": passed}

    return {**describe([*chain(*pair_scores)]), "prompts": len(pair_scores), "maxima": describe(highest)}
