"""Functions of predicted noise and attention that memorization is detected by and mitigated on.

The text-conditional noise of a prompt is the conditional minus the unconditional noise prediction (Wen et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from nemo_bench.errors import NotFiniteError

FIRST_BLOCK = "down_blocks.0."
"""Block whose cross-attention makes the Bright Ending mask, at the resolution of the latents; SDXL has none there."""
LATE = -3
"""Step of the late anisotropy: the third of 50 timesteps from the end, 41 for Stable Diffusion."""


def require_finite(what: str, values: Tensor) -> None:
    """Raises NotFiniteError if a value is infinite or nan; ``what`` names the values in the message, in the plural."""
    if not values.isfinite().all():
        raise NotFiniteError(f"{what} are not finite")


def norms(values: Tensor) -> Tensor:
    """L2 norm of each row, (N,); that of text-conditional noise is its magnitude (Wen et al. 2024, section 3)."""
    return values.flatten(1).norm(dim=1)


def unit(values: Tensor) -> Tensor:
    """Rows divided by their L2 norms; zero rows stay zero."""
    lengths = norms(values).clamp(min=torch.finfo(torch.float32).tiny)
    return values / lengths.view(-1, *[1] * (values.dim() - 1))


def end_attention(maps: Sequence[Tensor], lengths: Sequence[int], size: tuple[int, int]) -> Tensor:
    """The Bright Ending mask, (N, height, width): attention to the end token, the mean over layers (Chen et al. 2025).

    Args:
        maps: Attention probabilities of each layer, the mean over heads, (N, pixels, tokens); see :data:`FIRST_BLOCK`.
        lengths: Number of tokens of each of N prompts, from begin to end token without padding.
        size: Height and width of the latents.
    """
    attention = torch.stack([*maps]).mean(0)
    ends = torch.tensor(lengths, device=attention.device) - 1
    return attention[torch.arange(len(ends), device=ends.device), :, ends].unflatten(1, size)


def masked_magnitude(noise: Tensor, masks: Tensor) -> Tensor:
    """Magnitude of masked text-conditional noise, divided by the mean of the mask, (N,) (Chen et al. 2025).

    Masks are at least 0, (N, height, width); a constant mask gives the plain magnitude.
    """
    return norms(noise * masks[:, None]) / masks.mean((1, 2))


def mean_cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine similarity over channels, the mean over pixels, (N,) in [-1, 1] (Asthana and Belagiannis 2026)."""
    return torch.cosine_similarity(one, other, dim=1).mean((1, 2))


def score_difference(noise: Tensor, deviation: float) -> Tensor:
    """Conditional minus unconditional score, the gradient of the log-density (Jeon et al. 2025).

    It is the negative text-conditional noise over the standard deviation of the noise in the latents.
    """
    return -noise / deviation


def clean_latents(latents: Tensor, noise: Tensor, signal: float) -> Tensor:
    """The clean latents that predicted noise leads to, float32; ``signal`` is that of the noisy ones."""
    return (latents.float() - (1 - signal) ** 0.5 * noise) / signal**0.5


def tiled_distance(one: Tensor, other: Tensor, tiles: int) -> Tensor:
    """Largest root mean squared difference of corresponding tiles, (N,) in [0, 1] (Carlini et al. 2023, section 4.2).

    Images are in [0, 1], (N, channels, height, width). Where tiles do not divide a side, they overlap by a pixel.
    """
    squares = (one - other).square().mean(1)
    return adaptive_avg_pool2d(squares, tiles).amax((1, 2)).sqrt()
