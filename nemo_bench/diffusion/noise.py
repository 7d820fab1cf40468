"""Signals of memorization that detectors and metrics read and mitigations make small.

What a prompt adds to the predicted noise, ``added`` below, is conditional minus unconditional noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from nemo_bench.errors import NotFiniteError

FIRST_BLOCK = "down_blocks.0."
"""Its cross-attention is that of Bright Ending, at the resolution of the latents; SDXL has none there."""
LATE = -3
"""Anisotropy takes its angle at the third of 50 timesteps from the end, 41 for Stable Diffusion."""


def require_finite(what: str, values: Tensor) -> None:
    """Raises NotFiniteError where one of some numbers is infinite or not a number.

    Args:
        what: What the numbers are, for the message, in the plural.
        values: The numbers, of any shape.
    """
    if not values.isfinite().all():
        raise NotFiniteError(f"{what} are not finite")


def norms(values: Tensor) -> Tensor:
    """L2 norms of the rows, (N,); of what prompts add to the noise the magnitude (Wen et al. 2024, section 3)."""
    return values.flatten(1).norm(dim=1)


def unit(values: Tensor) -> Tensor:
    """The rows divided by their L2 norms; zeros stay zeros."""
    lengths = norms(values).clamp(min=torch.finfo(torch.float32).tiny)
    return values / lengths.view(-1, *[1] * (values.dim() - 1))


def end_attention(maps: Sequence[Tensor], lengths: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Where images look at the end of their prompts: the mask of Bright Ending, soft (Chen et al. 2025).

    Args:
        maps: Probabilities of one layer each, the mean over heads, (N, positions, tokens); see :data:`FIRST_BLOCK`.
        lengths: Tokens of N prompts from begin to end token, padding not counted.
        size: Height and width of the latents; positions are their pixels row by row.

    Returns:
        The mean over layers, (N, height, width).
    """
    attention = torch.stack([*maps]).mean(0)
    ends = torch.tensor(lengths, device=attention.device) - 1
    return attention[torch.arange(len(ends), device=ends.device), :, ends].unflatten(1, size)


def masked_magnitude(added: Tensor, masks: Tensor) -> Tensor:
    """Norm of what prompts add to the noise under a mask, over the mask's mean (Chen et al. 2025).

    Args:
        added: (N, channels, height, width).
        masks: At least 0, (N, height, width).

    Returns:
        (N,); under a mask of equal values everywhere the magnitude.
    """
    return norms(added * masks[:, None]) / masks.mean((1, 2))


def mean_cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine over channels at each position, the mean over positions (Asthana and Belagiannis 2026).

    Args:
        one: (N, channels, height, width).
        other: That shape.

    Returns:
        (N,) in [-1, 1].
    """
    return torch.cosine_similarity(one, other, dim=1).mean((1, 2))


def score_difference(added: Tensor, signal: float) -> Tensor:
    """What prompts add to the score, the gradient of the log-probability (Jeon et al. 2025).

    Args:
        added: (N, channels, height, width).
        signal: Share of the signal in the latents' variance, see :meth:`nemo_bench.diffusion.Diffusion.signal`.

    Returns:
        That shape: the negative over the noise level.
    """
    return -added / (1 - signal) ** 0.5


def tiled_distance(one: Tensor, other: Tensor, tiles: int) -> Tensor:
    """Largest root mean squared difference of tiles in the same place (Carlini et al. 2023, section 4.2).

    Args:
        one: Images in [0, 1], (N, channels, height, width).
        other: That shape.
        tiles: Tiles along a side; they overlap by a pixel where they do not divide it.

    Returns:
        (N,) in [0, 1].
    """
    squares = (one - other).square().mean(1)
    return adaptive_avg_pool2d(squares, tiles).amax((1, 2)).sqrt()
