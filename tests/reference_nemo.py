"""NeMo a second time: plain, slow, one function for each part of the method, shared with nothing else.

Tests compare the package with this file, so it imports nothing from the package. It follows the method as published
(protocol ``paper``): noise is predicted at the first of 50 DDIM steps, without guidance, on latents that the caller
drew with one generator a seed, and candidates are listed once. With ``step=1`` and ``duplicates=True`` it follows the
public scripts (protocol ``reference``). Every tested set of neurons encodes the text again and
runs all seeds through the UNet, in the pipeline's own precision; scores are computed in float32.

Where the method leaves a choice:

- A standard deviation of 0 follows IEEE division: an activation off the mean is an outlier at every theta, one on the
  mean at none.
- Equal activations rank by index, lower first. A layer narrower than k gives all its neurons.
- A set without neurons is scored as any other (nothing is blocked, the score is that of equal pictures, 1).
- A layer without candidates is not tested in refinement: there is nothing to reactivate.
- A noise difference with a flat channel cannot be scaled to [0, 1]; it is an error, as are fewer than two seeds.

A score close to its threshold can fall on either side in another batch layout: see `Result.margin`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

Neurons = Mapping[str, Sequence[int]]
"""Name of a value layer, as in the UNet's `named_modules`, to indices of its neurons; layers in network order."""

Similarity = Callable[[Tensor, Tensor], Tensor]
"""Two batches of pictures (N, C, h, w) in [0, 1] to N scores."""

Score = Callable[[Neurons], float]
"""Neurons that are blocked to the similarity with nothing blocked, the maximum over the kept seeds."""

THETA_START, THETA_STEP, THETA_END, K_END = 5.0, 0.25, 1.0, 1280


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale SSIM as published, for latents with sides of 44 and more."""
    return multiscale_structural_similarity_index_measure(
        a, b, sigma=1.5, kernel_size=11, betas=(0.33, 0.33, 0.33), normalize="relu", data_range=1.0, reduction="none"
    )


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of one scale, for smaller latents with sides of 5 and more.

    With a Gaussian window torchmetrics takes the window's size (9) from sigma; ``kernel_size`` has no effect.
    """
    score = structural_similarity_index_measure(a, b, sigma=1.0, kernel_size=7, data_range=1.0, reduction="none")
    assert isinstance(score, Tensor)
    return score


def value_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Returns the value projections of cross-attention in network order: down blocks, then the mid block."""
    layers = {name: module for name, module in unet.named_modules() if name.endswith(".attn2.to_v")}
    down = {name: module for name, module in layers.items() if name.startswith("down_blocks.")}
    mid = {name: module for name, module in layers.items() if name.startswith("mid_block.")}
    return down | mid


@contextmanager
def blocking(unet: nn.Module, neurons: Neurons) -> Iterator[None]:
    """Sets the outputs of ``neurons`` to zero for every token and row.

    Raises:
        RuntimeError: On leaving, if a value layer with neurons was never called, so that blocking had no effect.
    """
    fired: set[str] = set()

    def hook_for(name: str, indices: Sequence[int]) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            fired.add(name)
            output = output.clone()
            output[..., list(indices)] = 0
            return output

        return hook

    layers = value_layers(unet)
    handles = [layers[name].register_forward_hook(hook_for(name, indices)) for name, indices in neurons.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if fired != set(neurons):
        raise RuntimeError(f"Value layers {sorted(set(neurons) - fired)} were not called: are projections fused?")


def encode(pipe: StableDiffusionPipeline, texts: Sequence[str]) -> Tensor:
    """Returns the text encoder's last hidden states (N, tokens, width) of padded and truncated texts."""
    length = pipe.tokenizer.model_max_length
    batch = pipe.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    embedding: Tensor = pipe.text_encoder(batch.input_ids.to(pipe.text_encoder.device))[0]
    return embedding


# Section 1: noise difference and memorization score


@torch.no_grad()
def noise_differences(
    pipe: StableDiffusionPipeline, text: str, latents: Tensor, blocked: Neurons | None = None, number: int = 0
) -> Tensor:
    """Predicts the noise of every latent once and returns what differs from the latent, each channel scaled to [0, 1].

    Args:
        pipe: A pipeline that predicts noise (``epsilon``) or velocity (``v_prediction``).
        text: The prompt.
        latents: Initial noise x_T (S, C, h, w), one row a seed.
        blocked: Neurons that are off.
        number: Which of 50 DDIM steps gives the timestep.

    Returns:
        Float32 (S, C, h, w).

    Raises:
        ValueError: If the pipeline predicts something else, or a channel of a difference is flat.
    """
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(50)
    x = latents.to(pipe.unet.device, pipe.unet.dtype)
    embedding = encode(pipe, [text] * len(x))
    with blocking(pipe.unet, blocked or {}):
        # The latent stays the initial one: what the steps before the last predict is thrown away.
        for step in scheduler.timesteps[: number + 1]:
            output = pipe.unet(x, step, encoder_hidden_states=embedding).sample
    x, output = x.float(), output.float()

    prediction_type = pipe.scheduler.config.prediction_type
    if prediction_type == "epsilon":
        noise = output
    elif prediction_type == "v_prediction":
        abar = scheduler.alphas_cumprod[step].to(x.device)
        noise = abar.sqrt() * output + (1 - abar).sqrt() * x
    else:
        raise ValueError(f"Got a pipeline that predicts {prediction_type!r}, expected epsilon or v_prediction.")

    difference = noise - x
    low = difference.amin(dim=(2, 3), keepdim=True)
    high = difference.amax(dim=(2, 3), keepdim=True)
    if not (high > low).all():
        raise ValueError("A channel of a noise difference is flat or not finite and cannot be scaled to [0, 1].")
    scaled: Tensor = (difference - low) / (high - low)
    return scaled


def pair_scores(differences: Tensor, similarity: Similarity) -> dict[tuple[int, int], float]:
    """Returns the similarity of every pair of seeds i < j, one pair at a time."""
    pairs = combinations(range(len(differences)), 2)
    return {(i, j): similarity(differences[i : i + 1], differences[j : j + 1]).item() for i, j in pairs}


# Section 2: activation statistics


@torch.no_grad()
def activations(pipe: StableDiffusionPipeline, text: str) -> dict[str, Tensor]:
    """Returns for each value layer the mean over tokens of |value| (neurons,), float32, in network order."""
    embedding = encode(pipe, [text])
    return {name: layer(embedding)[0].float().abs().mean(dim=0) for name, layer in value_layers(pipe.unet).items()}


def activation_statistics(
    pipe: StableDiffusionPipeline, texts: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns means and unbiased standard deviations over prompts, each (neurons,) for each value layer.

    Raises:
        ValueError: If there are fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"Got {len(texts)} texts, expected at least 2: one text has no standard deviation.")
    rows = [activations(pipe, text) for text in texts]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    means = {name: values.mean(dim=0) for name, values in stacked.items()}
    stds = {name: values.std(dim=0, unbiased=True) for name, values in stacked.items()}
    return means, stds


# Section 3: initial selection


def keep_seeds(pairs: Mapping[tuple[int, int], float], tau: float) -> tuple[list[float], list[int]]:
    """Returns each seed's highest score with another one, and the seeds where it is above ``tau``.

    Raises:
        ValueError: If there are no pairs.
    """
    if not pairs:
        raise ValueError("Got no pairs of seeds, expected at least 2 seeds: one seed cannot be compared.")
    seeds = range(1 + max(j for _, j in pairs))
    highest = [max(score for pair, score in pairs.items() if seed in pair) for seed in seeds]
    return highest, [seed for seed in seeds if highest[seed] > tau]


def candidates(
    activation: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    stds: Mapping[str, Tensor],
    theta: float,
    k: int,
    duplicates: bool = False,
) -> dict[str, list[int]]:
    """Returns each layer's outliers beyond ``theta`` in index order, then its ``k`` most active."""
    chosen = {}
    for layer, a in activation.items():
        deviation = ((a - means[layer]).abs() / stds[layer]).tolist()
        outliers = [neuron for neuron in range(len(a)) if deviation[neuron] > theta]
        ranked = sorted(range(len(a)), key=lambda neuron: (-a[neuron].item(), neuron))
        chosen[layer] = outliers + [neuron for neuron in ranked[:k] if duplicates or neuron not in outliers]
    return chosen


@dataclass
class Selection:
    """Outcome of the initial selection.

    Attributes:
        neurons: The candidates it stopped with, in list order.
        score: Their score.
        tau_refine: Threshold of the refinement.
        theta: Theta with which these candidates were chosen.
        k: As theta.
        decisions: Score and threshold of each tested set, in the order of testing.
    """

    neurons: dict[str, list[int]]
    score: float
    tau_refine: float
    theta: float
    k: int
    decisions: list[tuple[float, float]]


def initial_selection(
    activation: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    stds: Mapping[str, Tensor],
    score: Score,
    tau: float,
    duplicates: bool = False,
) -> Selection:
    """Widens the candidates until blocking them takes the score to ``tau`` or below, or theta or k reaches its end."""
    theta, k = THETA_START, 0
    decisions = []
    while True:
        neurons = candidates(activation, means, stds, theta, k, duplicates)
        s = score(neurons)
        decisions.append((s, tau))
        if s <= tau:
            return Selection(neurons, s, tau, theta, k, decisions)
        next_theta, next_k = theta - THETA_STEP, k + 1
        if next_theta <= THETA_END or next_k >= K_END:
            return Selection(neurons, s, s, theta, k, decisions)
        theta, k = next_theta, next_k


# Section 4: refinement


def refinement(
    neurons: Neurons, score: Score, tau_refine: float
) -> tuple[dict[str, list[int]], list[tuple[float, float]]]:
    """Gives back the layers, then the neurons, without which the score stays below ``tau_refine``.

    Returns:
        What remains, with every layer of ``neurons`` in its order, and score and threshold of each test.
    """
    remaining = {layer: list(indices) for layer, indices in neurons.items()}
    decisions = []

    def stays_low_without(layer: str, rest: list[int]) -> bool:
        s = score({**remaining, layer: rest})
        decisions.append((s, tau_refine))
        return s < tau_refine

    last_to_first = list(reversed(remaining))
    for layer in last_to_first:
        if remaining[layer] and stays_low_without(layer, []):
            remaining[layer] = []
    for layer in last_to_first:
        for neuron in list(remaining[layer]):
            rest = list(remaining[layer])
            rest.remove(neuron)  # one occurrence
            if stays_low_without(layer, rest):
                remaining[layer] = rest
    return remaining, decisions


# All of it


@dataclass
class Result:
    """What NeMo finds for one prompt.

    Attributes:
        tau: Threshold given.
        gate_scores: Each seed's highest score with another seed.
        kept: Seeds whose gate score is above tau; none: not memorized, and all below is as in its default.
        initial: Neurons of the initial selection, in list order, for every value layer in network order.
        initial_score: Their score.
        refined: Memorization neurons, likewise.
        refined_score: Their score.
        tau_refine: Threshold of the refinement, tau itself unless the selection ran out.
        theta: Theta of the initial neurons.
        k: Number of most active neurons among them, for each layer.
        decisions: Score and threshold of each tested set of neurons, selection first, then refinement.
    """

    tau: float
    gate_scores: list[float]
    kept: list[int]
    initial: dict[str, list[int]]
    refined: dict[str, list[int]]
    initial_score: float = 0.0
    refined_score: float = 0.0
    tau_refine: float | None = None
    theta: float | None = None
    k: int | None = None
    decisions: list[tuple[float, float]] = field(default_factory=list)

    @property
    def tests(self) -> int:
        """How many sets of neurons were tested."""
        return len(self.decisions)

    @property
    def margin(self) -> float:
        """The smallest distance of any score from the threshold it was compared with.

        Another implementation that starts from the same candidates must find the same neurons if its scores differ from
        these by less than half of this (half, because the threshold is itself a score where the selection ran out).
        """
        compared = [(score, self.tau) for score in self.gate_scores] + self.decisions
        return min(abs(score - threshold) for score, threshold in compared)


def localize(
    pipe: StableDiffusionPipeline,
    text: str,
    latents: Tensor,
    means: Mapping[str, Tensor],
    stds: Mapping[str, Tensor],
    tau: float,
    similarity: Similarity = ssim,
    step: int = 0,
    duplicates: bool = False,
) -> Result:
    """Finds the memorization neurons of one prompt.

    Args:
        pipe: The pipeline.
        text: The prompt.
        latents: Initial noise (S, C, h, w), one row a seed, S at least 2.
        means: Mean activation (neurons,) of each value layer over non-memorized prompts, by layer name.
        stds: Standard deviation, likewise.
        tau: Score above which two seeds are alike enough to speak of memorization.
        similarity: `ssim`, `ms_ssim`, or another function of two batches.
        step: Which of 50 DDIM steps gives the timestep.
        duplicates: Whether a neuron that is both outlier and most active is listed twice.

    Raises:
        ValueError: For one seed, a flat noise difference, or a pipeline that predicts neither noise nor velocity.
    """
    before = noise_differences(pipe, text, latents, number=step)
    gate_scores, kept = keep_seeds(pair_scores(before, similarity), tau)
    if not kept:
        layers = value_layers(pipe.unet)
        return Result(tau, gate_scores, kept, initial={n: [] for n in layers}, refined={n: [] for n in layers})

    def score(blocked: Neurons) -> float:
        after = noise_differences(pipe, text, latents, blocked, step)
        return max(similarity(before[i : i + 1], after[i : i + 1]).item() for i in kept)

    selection = initial_selection(activations(pipe, text), means, stds, score, tau, duplicates)
    refined, decisions = refinement(selection.neurons, score, selection.tau_refine)
    return Result(
        tau=tau,
        gate_scores=gate_scores,
        kept=kept,
        initial=selection.neurons,
        refined=refined,
        initial_score=selection.score,
        refined_score=score(refined),
        tau_refine=selection.tau_refine,
        theta=selection.theta,
        k=selection.k,
        decisions=selection.decisions + decisions,
    )
