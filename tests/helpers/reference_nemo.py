"""NeMo a second time: plain, slow, one function for each part of the method, shared with nothing else.

Tests compare the package with this file, so it imports nothing from the package. It follows the method as published
(protocol ``paper``): noise is predicted at the first of 50 DDIM steps, without guidance, on latents that the caller
drew with one generator a seed, candidates are listed once, and similarity has a data range of 1. With ``SCRIPTS`` it
follows the public scripts (protocol ``reference``): the second step, neurons listed twice, velocities that are not
converted, and the similarity of the version of torchmetrics that they pin, whose data range comes from all that is
compared at once. What is compared at once: all pairs of seeds in the gate, all kept seeds in a test. Every tested set
of neurons encodes the text again and runs all seeds through the UNet, in the pipeline's own precision; scores are
computed in float32.

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
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

Neurons = Mapping[str, Sequence[int]]
"""Name of a value layer, as in the UNet's `named_modules`, to indices of its neurons; layers in network order."""

Similarity = Callable[[Tensor, Tensor], Tensor]
"""Two batches of pictures (N, C, h, w) in [0, 1] to N scores."""

Score = Callable[[Neurons], float]
"""Neurons that are blocked to the similarity with nothing blocked, the maximum over the kept seeds."""

THETA_START, THETA_STEP, THETA_END, K_END = 5.0, 0.25, 1.0, 1280


def ms_ssim(a: Tensor, b: Tensor, measure: str = "fixed") -> Tensor:
    """Multi-scale SSIM with the published window and scales, for latents with sides of 44 and more.

    Args:
        a: Pictures (N, C, h, w).
        b: Pictures to compare with, row by row.
        measure: ``published``, ``current`` or ``fixed``.
    """
    return product_of_scales(a, b, measure, sigma=1.5, betas=(0.33, 0.33, 0.33))


def ssim(a: Tensor, b: Tensor, measure: str = "fixed") -> Tensor:
    """SSIM of one scale with a window of 9, for smaller latents with sides of 5 (``published``: 9) and more."""
    return _mean_terms(a, b, measure, sigma=1.0)[0]


def product_of_scales(a: Tensor, b: Tensor, measure: str, sigma: float, betas: Sequence[float]) -> Tensor:
    """Multi-scale SSIM: contrast at every scale but the last, the whole index there."""
    product = torch.ones(len(a), device=a.device)
    for scale, beta in enumerate(betas):
        index, contrast = _mean_terms(a, b, measure, sigma)
        term = index if scale == len(betas) - 1 else contrast
        product = product * term.clamp(min=0) ** beta
        a, b = _halved(a), _halved(b)
    return product


def _mean_terms(a: Tensor, b: Tensor, measure: str, sigma: float) -> tuple[Tensor, Tensor]:
    """SSIM index and contrast term, the mean over each row; contrast, and the published index, without the border."""
    data_range = max((x.max() - x.min()).item() for x in (a, b)) if measure != "fixed" else 1.0
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = _blurred(a, sigma), _blurred(b, sigma)
    variance_a = (_blurred(a * a, sigma) - mean_a**2).clamp(min=0)
    variance_b = (_blurred(b * b, sigma) - mean_b**2).clamp(min=0)
    covariance = _blurred(a * b, sigma) - mean_a * mean_b
    contrast = (2 * covariance + c2) / (variance_a + variance_b + c2)
    index = contrast * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    border = _radius(sigma)
    inner = index[:, :, border:-border, border:-border]
    whole_or_inner = inner if measure == "published" else index
    return whole_or_inner.mean(dim=(1, 2, 3)), contrast[:, :, border:-border, border:-border].mean(dim=(1, 2, 3))


def _radius(sigma: float) -> int:
    """torchmetrics takes the window's size from sigma; ``kernel_size`` has no effect with a Gaussian window."""
    return int(3.5 * sigma + 0.5)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian means around every pixel, the border mirrored; first along rows, then along columns."""
    radius = _radius(sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-((offsets / sigma) ** 2) / 2)
    weights = weights / weights.sum()
    planes = F.pad(x, (radius,) * 4, mode="reflect").flatten(0, 1)[:, None]
    means = F.conv2d(F.conv2d(planes, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return means.view(x.shape)


def _halved(x: Tensor) -> Tensor:
    """Means of two by two pixels; an odd last row or column is left out."""
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    x = x[:, :, :height, :width]
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


SCRIPTS: dict[str, Any] = {
    "similarity": partial(ms_ssim, measure="published"),
    "step": 1,
    "duplicates": True,
    "raw": True,
}
"""What the public scripts do, as arguments of `localize`."""


def scripts_latents(pipe: StableDiffusionPipeline, seeds: int) -> Tensor:
    """Initial noise as the scripts draw it: the whole batch from one generator on the CPU that starts from 1."""
    size = pipe.unet.config.sample_size
    return torch.randn(seeds, pipe.unet.config.in_channels, size, size, generator=torch.Generator("cpu").manual_seed(1))


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
    pipe: StableDiffusionPipeline,
    text: str,
    latents: Tensor,
    blocked: Neurons | None = None,
    number: int = 0,
    raw: bool = False,
    guidance: float | None = None,
) -> Tensor:
    """Predicts the noise of every latent once and returns what differs from the latent, each channel scaled to [0, 1].

    Args:
        pipe: A pipeline that predicts noise (``epsilon``) or velocity (``v_prediction``).
        text: The prompt.
        latents: Initial noise x_T (S, C, h, w), one row a seed.
        blocked: Neurons that are off.
        number: Which of 50 DDIM steps gives the timestep.
        raw: Whether a velocity is taken for noise as it is.
        guidance: Scale of guidance whose two halves are read in the wrong order.

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
        # The latent stays the initial one: what the scripts predict at the steps before, they throw away.
        step = scheduler.timesteps[number]
        output = pipe.unet(x, step, encoder_hidden_states=embedding).sample
        if guidance is not None:
            empty = pipe.unet(x, step, encoder_hidden_states=encode(pipe, [""] * len(x))).sample
            output = output + guidance * (empty - output)
    x, output = x.float(), output.float()

    prediction_type = pipe.scheduler.config.prediction_type
    if prediction_type == "epsilon" or raw:
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
    """Returns the similarity of every pair of seeds i < j, all compared at once."""
    pairs = list(combinations(range(len(differences)), 2))
    scores = similarity(differences[[i for i, _ in pairs]], differences[[j for _, j in pairs]])
    return dict(zip(pairs, scores.tolist(), strict=True))


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
    with_outliers: bool = True,
) -> dict[str, list[int]]:
    """Returns each layer's outliers beyond ``theta``, if wanted, in index order, then its ``k`` most active."""
    chosen = {}
    for layer, a in activation.items():
        deviation = ((a - means[layer]).abs() / stds[layer]).tolist()
        outliers = [neuron for neuron in range(len(a)) if with_outliers and deviation[neuron] > theta]
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
    with_outliers: bool = True,
    initial_k: int = 0,
) -> Selection:
    """Widens the candidates until blocking them takes the score to ``tau`` or below, or theta or k reaches its end.

    Without outliers theta stays where it starts, so that k alone ends the search.
    """
    theta, k = THETA_START, initial_k
    decisions = []
    while True:
        neurons = candidates(activation, means, stds, theta, k, duplicates, with_outliers)
        s = score(neurons)
        decisions.append((s, tau))
        if s <= tau:
            return Selection(neurons, s, tau, theta, k, decisions)
        next_theta, next_k = (theta - THETA_STEP if with_outliers else theta), k + 1
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
        gate_tau: Threshold of the gate.
        tau: Threshold of the selection.
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

    gate_tau: float
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
        """The smallest distance of any score from the threshold it was compared with, the same number left out.

        Where a neuron is listed twice, the same set is tested twice, and has the same score to the last bit.
        Another implementation that starts from the same candidates must find the same neurons if its scores differ from
        these by less than half of this (half, because the threshold is itself a score where the selection ran out).
        """
        compared = [(score, self.gate_tau) for score in self.gate_scores] + self.decisions
        return min((abs(score - threshold) for score, threshold in compared if score != threshold), default=1.0)


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
    raw: bool = False,
    guidance: float | None = None,
    gate_tau: float | None = None,
    refine_tau: float | None = None,
    with_outliers: bool = True,
    initial_k: int = 0,
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
        raw: Whether a velocity is taken for noise as it is.
        guidance: Scale of guidance whose two halves are read in the wrong order.
        gate_tau: Threshold of the gate, if another one.
        refine_tau: Threshold of the refinement, if another one and the selection does not run out.
        with_outliers: Whether outliers are candidates.
        initial_k: Most active neurons in the first round.

    Raises:
        ValueError: For one seed, a flat noise difference, or a pipeline that predicts neither noise nor velocity.
    """
    gate_tau = tau if gate_tau is None else gate_tau
    before = noise_differences(pipe, text, latents, None, step, raw, guidance)
    gate_scores, kept = keep_seeds(pair_scores(before, similarity), gate_tau)
    if not kept:
        layers = value_layers(pipe.unet)
        return Result(
            gate_tau, tau, gate_scores, kept, initial={n: [] for n in layers}, refined={n: [] for n in layers}
        )

    def score(blocked: Neurons) -> float:
        after = noise_differences(pipe, text, latents, blocked, step, raw, guidance)
        return similarity(before[kept], after[kept]).max().item()

    selection = initial_selection(
        activations(pipe, text), means, stds, score, tau, duplicates, with_outliers, initial_k
    )
    ran_out = selection.score > tau
    tau_refine = selection.tau_refine if ran_out or refine_tau is None else refine_tau
    refined, decisions = refinement(selection.neurons, score, tau_refine)
    return Result(
        gate_tau=gate_tau,
        tau=tau,
        gate_scores=gate_scores,
        kept=kept,
        initial=selection.neurons,
        refined=refined,
        initial_score=selection.score,
        refined_score=score(refined),
        tau_refine=tau_refine,
        theta=selection.theta,
        k=selection.k,
        decisions=selection.decisions + decisions,
    )
