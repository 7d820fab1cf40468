"""Calibration on general prompts: activation statistics and the memorization threshold."""

from __future__ import annotations

import io
import json
import math
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
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched, parse_json, replacing

Statistics = tuple[list[Tensor], list[Tensor]]
"""Means and standard deviations, one float32 tensor (neurons,) a value layer in network order, as published."""
ENCODED = 64
"""Prompts in a batch of the text encoder."""
ACTIVATION_NOISES = 2
"""Starting noises of activations that are measured by passes; ours, since nothing is published for such models."""
ACTIVATION_ROWS = 8
"""Prompts in such a pass."""


@dataclass(frozen=True)
class Calibration:
    """Activation statistics and memorization threshold of a model."""

    mean: dict[str, Tensor]  #: Mean activation of every neuron over general prompts, by layer in network order.
    std: dict[str, Tensor]  #: Unbiased standard deviation of the activation, likewise.
    threshold: float  #: Similarity of noise differences above which a prompt counts as memorized.
    prompts: int = 0  #: Number of general prompts that were measured; 0 for given statistics and threshold.
    #: The threshold from the most similar pair of seeds of each prompt, None if not measured.
    maxima: float | None = None

    def gate(self, threshold: float, kind: str) -> float:
        """Threshold on the most similar pair of seeds of a prompt; see :attr:`NemoSettings.gate` for ``kind``."""
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
        """Measures statistics and threshold in memory; ``nemo-bench calibrate`` stores them.

        It takes two general prompts and two seeds of each at least; more prompts make outliers and threshold steadier.

        Raises:
            ConfigError: There are too few prompts or seeds.
            NotFiniteError: Noise differences of more than half of the prompts are not finite; fewer are left out.
        """
        if len(prompts) < 2 or seeds < 2:
            msg = f"a calibration needs 2 general prompts and 2 seeds at least, given {len(prompts)} and {seeds}"
            raise ConfigError(msg)
        texts = [prompt.text for prompt in prompts]
        mean, std = activation_statistics(model, batched(texts, ENCODED))
        parts = batched(prompts, max(1, batch_size // seeds))
        pairs = [values for part in parts for values in pair_scores(model, part, seeds, protocol, batch_size)]
        usable = [values for values in pairs if all(map(math.isfinite, values))]
        if 2 * len(usable) < len(pairs):
            msg = f"noise differences of {len(pairs) - len(usable)} of {len(pairs)} general prompts are not finite, so"
            raise NotFiniteError(f"{msg} there is no threshold; try float32 or bfloat16")
        return cls(mean, std, threshold(chain(*usable)), len(usable), threshold(map(max, usable)))

    @classmethod
    def published(cls, path: Path, model: Diffusion, threshold: float) -> Calibration:
        """Statistics in a file of the published form with a threshold, such as 0.428 for Stable Diffusion 1.4.

        Raises ModelError if they are none, or of other layers than the model's.
        """
        return cls(*name_layers(read_statistics(path), model.masks.widths), threshold)


def read_statistics(path: Path) -> Statistics:
    """Reads activation statistics in the published form (Hintersdorf et al. 2024), on the CPU; ModelError if none."""
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
    """Whether :func:`read_statistics` can read a file."""
    try:
        read_statistics(path)
    except ModelError:
        return False
    return True


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Writes activation statistics in the published form; equal statistics give equal bytes."""
    buffer = io.BytesIO()  # torch.save writes the name of a file into it
    torch.save(statistics, buffer)
    with replacing(path) as part:
        part.write_bytes(buffer.getvalue())


def name_layers(statistics: Statistics, widths: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means and standard deviations by layer name; ``widths`` are the value layers of the model in network order.

    Raises ModelError if number or widths of the layers differ.
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
    """Activations of value neurons by layer in network order, float32, at least 0, (N, neurons).

    They are means over tokens of absolute outputs of the value projections. In cross-attention these depend on the text
    embedding alone, so no pass is needed (Hintersdorf et al. 2024, section 3.2). Where they depend on timestep and
    picture as well, as in joint attention, they are those of passes at the timestep of noise differences, the mean over
    :data:`ACTIVATION_NOISES` starting noises that all prompts share, so that prompts differ by their text alone.
    Padding counts for UNets, as published, and for no other family.
    """
    with torch.no_grad():
        values = model.family.value_input(model.network, text)
        if values is not None:
            return {name: _over_tokens(layer(values), text) for name, layer in model.value_layers.items()}
        parts = [_of_passes(model, text.rows(rows)) for rows in batched(range(len(text)), ACTIVATION_ROWS)]
        return {name: torch.cat([part[name] for part in parts]) for name in model.value_layers}


def _of_passes(model: Diffusion, text: Conditioning) -> dict[str, Tensor]:
    """Activations in passes, the mean over starting noises."""
    if model.compiled:
        raise ModelError(
            "model.compiled=True: activations of this model are those of passes, and a compiled network can't be "
            "looked into; set model.compiled=false"
        )
    totals: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        found = _over_tokens(output[:, model.spans[name]], text) / ACTIVATION_NOISES
        totals[name] = totals[name] + found if name in totals else found

    hooks = [
        layer.register_forward_hook(lambda _m, _a, output, name=name: keep(name, output))
        for name, layer in model.value_layers.items()
    ]
    timestep = model.schedule.difference_timestep(0)
    try:
        for seed in range(ACTIVATION_NOISES):
            noise = model.latents([seed]).expand(len(text), -1, -1, -1)
            model.predict_noise(model.schedule.noised(noise, timestep), timestep, text)
    finally:
        for hook in hooks:
            hook.remove()
    return totals


def _over_tokens(values: Tensor, text: Conditioning) -> Tensor:
    """Mean of absolute values over tokens, (N, neurons)."""
    absolute = values.float().abs()
    if text.mask is None:
        return absolute.mean(1)
    weights = text.mask.to(absolute)[..., None]
    return (absolute * weights).sum(1) / weights.sum(1)


@dataclass
class Moments:
    """Streamed mean and variance in float64 (Chan, Golub and LeVeque 1983).

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[1.0], [3.0]]))
        >>> moments.mean, moments.std
        (tensor([2.], dtype=torch.float64), tensor([1.4142], dtype=torch.float64))
    """

    count: int = 0  #: Number of rows.
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  #: Of the rows, (neurons,).
    #: Sum of squared deviations from the mean, (neurons,).
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Adds rows, (N, neurons), N at least 1."""
        values = values.detach().cpu().double()
        mean = values.mean(0)
        self.merge(Moments(len(values), mean, (values - mean).square().sum(0)))

    def merge(self, other: Moments) -> None:
        """Adds the rows of other moments; the rounding depends on the order of merging."""
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
    """Moments of the activations over batches of prompts, by layer; activations that are not finite are left out."""
    moments = {name: Moments() for name in model.value_layers}
    for texts in batches:
        by_layer = activations(model, model.encode(texts))
        finite = torch.stack([values.isfinite().all(1) for values in by_layer.values()]).all(0)
        if finite.any():
            for name, values in by_layer.items():
                moments[name].add(values[finite])
    return moments


def activation_statistics(
    model: Diffusion, batches: Iterable[Sequence[str]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and unbiased standard deviation of the activations over batches of prompts, float32 (neurons,) by layer."""
    moments = activation_moments(model, batches)
    mean = {name: m.mean.float() for name, m in moments.items()}
    return mean, {name: m.std.float() for name, m in moments.items()}


def save_moments(path: Path, moments: Mapping[str, Moments]) -> None:
    """Writes moments by layer as safetensors."""
    tensors = {f"{part}/{name}": getattr(m, part) for part in ("mean", "squares") for name, m in moments.items()}
    counts = json.dumps({name: m.count for name, m in moments.items()})
    with replacing(path) as part:
        save_file(tensors, part, metadata={"counts": counts})


def load_moments(path: Path) -> dict[str, Moments]:
    """Reads moments by layer; raises StoreError if the file is missing or holds something else."""
    try:
        with safe_open(path, "pt") as file:
            counts = parse_json(file.metadata()["counts"])
            return {
                name: Moments(count, file.get_tensor(f"mean/{name}"), file.get_tensor(f"squares/{name}"))
                for name, count in counts.items()
            }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} can't be read ({error}); delete it and run again") from error


def merge_statistics(files: Iterable[Path]) -> Statistics | None:
    """Merges files of moments of disjoint prompts in the given order, so that equal files give equal bits.

    There are no statistics if fewer than two prompts have finite activations.
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
    """Similarities of the noise differences of all pairs of S seeds of general prompts, which share batches.

    Returns:
        For each prompt S (S - 1) / 2 similarities in [-1, 1]; not all finite if its noise differences are not.
    """
    text = model.encode([prompt.text for prompt in prompts])
    rows = [row for row in range(len(prompts)) for _ in range(seeds)]
    latents = torch.cat([protocol.latents(model, seeds_of(p, "localize", range(seeds))) for p in prompts])
    parts = zip(batched(rows, batch_size), latents.split(batch_size), strict=True)
    differences = torch.cat(
        [noise_differences(model, text.rows(part), noise, protocol, calibrating=True) for part, noise in parts]
    )
    matrices = (pair_similarities(own, model.similarity, protocol.similarity) for own in differences.split(seeds))
    return [pair_values(matrix).tolist() for matrix in matrices]


def threshold(pair_scores: Iterable[float]) -> float:
    """The memorization threshold: mean plus one standard deviation of similarities over general prompts.

    They are those of all pairs of seeds of all prompts, at least two; or, for a threshold from maxima, the largest of
    each prompt.
    """
    values = torch.tensor(list(pair_scores), dtype=torch.float64)
    return float(values.mean() + values.std())


def thresholds(pair_scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The memorization threshold from all pairs and from maxima, of at least two prompts.

    Returns:
        ``threshold``; ``mean`` and ``std`` of the similarities; number of ``prompts``; ``passed_gate``, the number of
        them with a pair above the threshold, which pass the gate as if they were memorized; and ``maxima``, the same
        from the most similar pair of each prompt: ``threshold``, ``mean``, ``std``, ``passed_gate``.
    """
    highest = [max(values) for values in pair_scores]

    def describe(values: Sequence[float]) -> dict[str, Any]:
        scores, limit = torch.tensor(values, dtype=torch.float64), threshold(values)
        passed = sum(value > limit for value in highest)
        return {"threshold": limit, "mean": float(scores.mean()), "std": float(scores.std()), "passed_gate": passed}

    return {**describe([*chain(*pair_scores)]), "prompts": len(pair_scores), "maxima": describe(highest)}
