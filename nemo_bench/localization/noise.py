"""Noise differences and how alike they are (Hintersdorf et al. 2024, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from nemo_bench.diffusion import Conditioning, Diffusion, Similarity
from nemo_bench.localization.protocol import PAPER, Protocol


def noise_differences(
    model: Diffusion, text: Conditioning, latents: Tensor, protocol: Protocol = PAPER, *, calibrating: bool = False
) -> Tensor:
    """Predicted noise minus the noise that went in, each channel of each row scaled to [0, 1] over space.

    Args:
        model: The model; blocked neurons count.
        text: Conditioning of N rows.
        latents: Starting noise, (N, channels, height, width).
        protocol: Which timestep and precision.
        calibrating: Take the prediction from which the protocol calibrates its threshold.

    Returns:
        Differences in [0, 1], float32, shaped as the latents; a constant channel becomes 0.
    """
    timestep = model.timestep(protocol.step)
    with protocol.precision(model):
        noise = model.predict_noise(latents, timestep, text)
        if calibrating and protocol.calibration_guidance is not None:
            unconditional = model.predict_noise(latents, timestep, model.unconditional(len(text)))
            noise = noise + protocol.calibration_guidance * (unconditional - noise)
    return scaled_difference(noise, latents)


def scaled_difference(noise: Tensor, latents: Tensor) -> Tensor:
    """Predicted noise minus the noise that went in, each channel of each row scaled to [0, 1] over space.

    Args:
        noise: Predicted, float32, (N, channels, height, width).
        latents: What it was predicted from, that shape.

    Returns:
        Differences in [0, 1], float32, of that shape; a constant channel becomes 0.
    """
    difference = noise - latents.float()
    low, high = difference.amin((2, 3), keepdim=True), difference.amax((2, 3), keepdim=True)
    return (difference - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def similarity(a: Tensor, b: Tensor, settings: Similarity) -> Tensor:
    """SSIM or MS-SSIM of noise differences, row by row.

    Args:
        a: Differences in [0, 1], (N, channels, height, width).
        b: The same shape.
        settings: Window and scales.

    Returns:
        N similarities in [-1, 1] (MS-SSIM: [0, 1]); 1 for equal rows.
    """
    if settings.betas:
        return multiscale_structural_similarity_index_measure(
            a,
            b,
            kernel_size=settings.kernel,
            sigma=settings.sigma,
            betas=settings.betas,
            data_range=1.0,
            reduction="none",
        ).reshape(len(a))
    values: Tensor = structural_similarity_index_measure(
        a, b, kernel_size=settings.kernel, sigma=settings.sigma, data_range=1.0, reduction="none"
    )  # type: ignore[assignment]
    return values.reshape(len(a))


def pair_similarities(differences: Tensor, settings: Similarity) -> Tensor:
    """Similarity of every pair of seeds of one prompt.

    Args:
        differences: Noise differences of S seeds, (S, channels, height, width), S at least 2.
        settings: Window and scales.

    Returns:
        Symmetric matrix (S, S); the diagonal, a seed with itself, is -inf so that it wins no maximum.
    """
    pairs = torch.tensor(list(combinations(range(len(differences)), 2)), device=differences.device)
    values = similarity(differences[pairs[:, 0]], differences[pairs[:, 1]], settings)
    matrix = differences.new_full((len(differences), len(differences)), float("-inf"))
    matrix[pairs[:, 0], pairs[:, 1]] = matrix[pairs[:, 1], pairs[:, 0]] = values
    return matrix


def pair_values(matrix: Tensor) -> Tensor:
    """The S (S - 1) / 2 values above the diagonal of :func:`pair_similarities`."""
    rows: Sequence[Tensor] = tuple(torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device))
    return matrix[rows[0], rows[1]]
