"""Noise differences and their similarity (Hintersdorf et al. 2024, section 3.1)."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from nemo_bench.diffusion import Conditioning, Diffusion, Measure, Similarity
from nemo_bench.localization.protocol import PAPER, Protocol


def noise_differences(
    model: Diffusion, text: Conditioning, latents: Tensor, protocol: Protocol = PAPER, *, calibrating: bool = False
) -> Tensor:
    """Predicts noise and subtracts the starting noise, (N, channels, height, width).

    For flow matching it is the negated clean prediction, at the noise level of Stable Diffusion's first step and from
    noise at the scale of that level: there the difference above is the clean prediction with a few per cent of noise.
    At the first level of flow matching latents hold no signal, and it would be zero for every prompt.

    Each channel of each row is scaled to [0, 1] over space; a constant one becomes 0. The result is float32, shaped as
    the latents. Blocked neurons of the model count. A protocol may predict otherwise for the calibrated threshold.
    """
    timestep = model.schedule.difference_timestep(protocol.step)
    noisy = model.schedule.noised(latents, timestep)
    predict = model.predict_output if protocol.velocity == "raw" else model.predict_noise
    guidance = protocol.calibration_guidance if calibrating else protocol.guidance
    with protocol.precision(model):
        noise = predict(noisy, timestep, text)
        if guidance is not None:
            unconditional = predict(noisy, timestep, model.unconditional(len(text)))
            noise = noise + guidance * (unconditional - noise)
    return scaled_difference(model.schedule.difference(noise, timestep, noisy))


def scaled_difference(difference: Tensor) -> Tensor:
    """A noise difference, scaled as :func:`nemo_bench.localization.noise_differences` says."""
    low, high = difference.amin((2, 3), keepdim=True), difference.amax((2, 3), keepdim=True)
    return (difference - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def similarity(a: Tensor, b: Tensor, settings: Similarity, measure: Measure = "fixed") -> Tensor:
    """SSIM or MS-SSIM of noise differences, row by row.

    MS-SSIM is the product of the contrast terms of all scales but the last and of the whole index of the last, each
    raised to its beta and 0 where it is negative (Wang et al. 2003).

    With any measure but ``"fixed"`` the value of a row depends on the other rows. Raises ConfigError for differences,
    (N, channels, height, width), that are too small for window and scales.

    Returns:
        N similarities in [-1, 1] (MS-SSIM: [0, 1]); 1 for equal rows.
    """
    settings.check(a.shape[2:], measure)
    border = settings.kernel // 2 if measure == "published" else 0
    terms = []
    for _ in settings.betas[1:]:
        terms.append(_ssim(a, b, settings, measure, return_contrast_sensitivity=True))
        a, b = avg_pool2d(a, 2), avg_pool2d(b, 2)
    index = _ssim(a, b, settings, measure, return_full_image=True)
    height, width = index.shape[2:]
    terms.append(index[..., border : height - border, border : width - border].flatten(1).mean(1))
    if not settings.betas:
        return terms[0]
    betas = torch.tensor(settings.betas, device=a.device)[:, None]
    return (torch.stack(terms).relu() ** betas).prod(0)


def _ssim(a: Tensor, b: Tensor, settings: Similarity, measure: Measure, **output: bool) -> Tensor:
    """The index of every pixel, (N, channels, height, width), or the mean contrast term of every row, (N,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    data_range = 1.0 if measure == "fixed" else None
    _, image_or_contrast = structural_similarity_index_measure(
        a, b, sigma=settings.sigma, data_range=data_range, reduction="none", **output
    )
    return image_or_contrast


def pair_similarities(differences: Tensor, settings: Similarity, measure: Measure = "fixed") -> Tensor:
    """Similarities of all pairs of S seeds of one prompt, S at least 2, compared at once; see :func:`similarity`.

    Returns:
        Symmetric matrix, (S, S), with -inf on the diagonal, so that a seed with itself is never the maximum.
    """
    rows, columns = torch.tensor(list(combinations(range(len(differences)), 2)), device=differences.device).T
    values = similarity(differences[rows], differences[columns], settings, measure)
    matrix = differences.new_full((len(differences), len(differences)), float("-inf"))
    matrix[rows, columns] = matrix[columns, rows] = values
    return matrix


def pair_values(matrix: Tensor) -> Tensor:
    """The S (S - 1) / 2 values above the diagonal of :func:`pair_similarities`."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    return matrix[rows, columns]
