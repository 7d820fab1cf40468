"""NeMo: gate, initial selection and refinement for one prompt (Hintersdorf et al. 2024, section 3 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.localization.calibration import Calibration, activations
from nemo_bench.localization.noise import noise_differences, pair_similarities, pair_values, similarity
from nemo_bench.types import Localization, Neurons

Candidates = list[tuple[str, int]]
"""Neurons as (layer, index), layer by layer in network order, in a layer in the order of selection."""


@dataclass(frozen=True)
class NemoSettings:
    """The numbers of the published algorithm.

    Attributes:
        theta: First outlier threshold, in standard deviations.
        theta_step: How much it falls per round.
        theta_min: Where the search ends; never tested itself.
        factor: What blocked outputs are multiplied by.
        threshold: Memorization threshold, or None for the calibrated one.
    """

    theta: float = 5.0
    theta_step: float = 0.25
    theta_min: float = 1.0
    factor: float = 0.0
    threshold: float | None = None


class Trial:
    """Noise differences of one prompt with neurons blocked, against those with none blocked.

    Args:
        model: The model, nothing blocked.
        text: Conditioning of one row.
        latents: Starting noise of S seeds, (S, channels, height, width).
        factor: What blocked outputs are multiplied by.

    Attributes:
        split: Whether a test may be settled by some of the seeds. Where the threshold is itself a score of this trial,
            it must not: another batch size may round a test that changes nothing to the other side.
        row_passes: UNet passes of one sample spent so far.
        original: Noise differences with nothing blocked, of the seeds kept.
    """

    def __init__(self, model: Diffusion, text: Conditioning, latents: Tensor, factor: float = 0.0) -> None:
        self.model, self.text, self.latents, self.factor = model, text, latents, factor
        self.original = noise_differences(model, text.rows([0] * len(latents)), latents)
        self.row_passes = len(latents)
        self.split = True
        self._hardest_first = torch.arange(len(latents))

    def keep(self, seeds: Tensor) -> None:
        """Goes on with some of the seeds only.

        Args:
            seeds: Boolean mask of S entries.
        """
        self.latents, self.original = self.latents[seeds], self.original[seeds]
        self._hardest_first = torch.arange(len(self.latents))

    def similarity(self, candidates: Candidates, stop_at: float | None = None) -> float:
        """Highest similarity over the kept seeds of the noise differences with and without blocking.

        Args:
            candidates: What is blocked.
            stop_at: Give up as soon as a seed reaches this value; the rest can't lower a maximum.

        Returns:
            The maximum, or with ``stop_at`` a value of at least that if it is reached.
        """
        seeds = len(self.latents)
        # A lost test is mostly lost by a seed that came near losing before, so a few of those are tried first.
        early = stop_at is not None and self.split and seeds > 4
        order = self._hardest_first if early else torch.arange(seeds)
        values = torch.empty(seeds)
        for rows in order.split([3, seeds - 3] if early else [seeds]):
            with self.model.block(as_neurons(candidates), self.factor):
                changed = noise_differences(self.model, self.text.rows([0] * len(rows)), self.latents[rows])
            values[rows] = similarity(self.original[rows], changed, self.model.similarity).cpu()
            self.row_passes += len(rows)
            if stop_at is not None and float(values[rows].max()) >= stop_at:
                return float(values[rows].max())
        self._hardest_first = values.argsort(descending=True)
        return float(values.max())


def as_neurons(candidates: Candidates) -> Neurons:
    """The same neurons without their order."""
    layers: dict[str, list[int]] = {}
    for layer, index in candidates:
        layers.setdefault(layer, []).append(index)
    return Neurons(layers)


def select(activation: dict[str, Tensor], calibration: Calibration, theta: float, k: int) -> Candidates:
    """Candidates of one round: outliers against general prompts, and the k most active neurons of each layer.

    Args:
        activation: Activation of one prompt by layer, each (neurons,).
        calibration: Statistics over general prompts.
        theta: Outlier threshold, in standard deviations.
        k: Number of most active neurons taken in each layer.

    Returns:
        Outliers in index order, then the k most active in falling order; each neuron once.
    """
    chosen: Candidates = []
    for layer, values in activation.items():
        values = values.cpu()
        deviation = (values - calibration.mean[layer]).abs()
        outliers = (deviation > theta * calibration.std[layer]).nonzero()[:, 0].tolist()
        most_active = values.topk(min(k, len(values))).indices.tolist()
        chosen += [(layer, index) for index in dict.fromkeys([*outliers, *most_active])]
    return chosen


def initial_selection(
    trial: Trial, activation: dict[str, Tensor], calibration: Calibration, tau: float, settings: NemoSettings
) -> tuple[Candidates, float, float]:
    """Widens the candidates until blocking them changes the noise differences of every kept seed.

    Args:
        trial: The prompt, with its kept seeds.
        activation: Activation of the prompt by layer.
        calibration: Statistics over general prompts.
        tau: Memorization threshold.
        settings: Where theta starts, falls and ends.

    Returns:
        Candidates, their similarity, and the threshold for refinement: ``tau``, or where the search ended without
        reaching it, the similarity that was reached.
    """
    widest = max(len(values) for values in activation.values())
    theta, k = settings.theta, 0
    while True:
        candidates = select(activation, calibration, theta, k)
        reached = trial.similarity(candidates)
        if reached <= tau:
            return candidates, reached, tau
        theta, k = max(theta - settings.theta_step, settings.theta_min), k + 1
        if theta <= settings.theta_min or k >= widest:
            return candidates, reached, reached


def refine(trial: Trial, candidates: Candidates, tau: float) -> Candidates:
    """Drops every layer, then every neuron, without which the noise differences stay changed.

    Args:
        trial: The prompt, with its kept seeds.
        candidates: What the initial selection found.
        tau: A neuron is dropped if the highest similarity stays below this without it.

    Returns:
        What remains, in the same order.
    """

    def attempt(kept: Candidates, dropped: Sequence[tuple[str, int]]) -> Candidates:
        gone = set(dropped)
        rest = [neuron for neuron in kept if neuron not in gone]
        return rest if trial.similarity(rest, stop_at=tau) < tau else kept

    layers = list(dict.fromkeys(layer for layer, _ in candidates))[::-1]
    for layer in layers:
        candidates = attempt(candidates, [n for n in candidates if n[0] == layer])
    for layer in layers:
        for neuron in [n for n in candidates if n[0] == layer]:
            candidates = attempt(candidates, [neuron])
    return candidates


@torch.no_grad()
def localize(
    model: Diffusion, text: Conditioning, latents: Tensor, calibration: Calibration, settings: NemoSettings
) -> Localization:
    """Finds the memorization neurons of one prompt.

    Args:
        model: The model, nothing blocked.
        text: Conditioning of one row.
        latents: Starting noise of S seeds, S at least 2, (S, channels, height, width).
        calibration: Statistics and threshold of the model.
        settings: The numbers of the algorithm.

    Returns:
        What was found; empty where no pair of seeds is more alike than the threshold.
    """
    tau = calibration.threshold if settings.threshold is None else settings.threshold
    trial = Trial(model, text, latents, settings.factor)
    matrix = pair_similarities(trial.original, model.similarity)
    gate_score = float(pair_values(matrix).max())
    kept = matrix.amax(1) > tau
    if not kept.any():
        return Localization(gate_score=gate_score, threshold=tau, row_passes=trial.row_passes)
    trial.keep(kept)
    activation = {layer: values[0] for layer, values in activations(model, text).items()}
    initial, initial_score, tau_refine = initial_selection(trial, activation, calibration, tau, settings)
    trial.split = tau_refine == tau
    refined = refine(trial, initial, tau_refine)
    refined_score = trial.similarity(refined)
    return Localization(
        neurons=as_neurons(refined),
        initial=as_neurons(initial),
        gate_score=gate_score,
        initial_score=initial_score,
        refined_score=refined_score,
        threshold=tau_refine,
        row_passes=trial.row_passes,
    )
