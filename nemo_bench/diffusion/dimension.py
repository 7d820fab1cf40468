"""Local intrinsic dimension by FLIPD: how many directions of latents stay likely (Kamkari et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from nemo_bench.diffusion.families import Conditioning
    from nemo_bench.diffusion.model import Diffusion

PROBE_SEED = 42  # Of the first probe, as in the public code of Ross et al. (2025).


def probes(model: Diffusion, count: int) -> list[Tensor]:
    """Standard normal directions that all images share, each (1, channels, height, width)."""
    generators = [torch.Generator().manual_seed(PROBE_SEED + number) for number in range(count)]
    return [torch.randn((1, *model.latent_shape), generator=g).to(model.device) for g in generators]


def noise_along(
    model: Diffusion, latents: Tensor, timestep: float, text: Conditioning, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """Predicts noise and its derivative by the latents along a direction, by forward-mode differentiation.

    Args:
        model: The model.
        latents: (N, channels, height, width).
        timestep: One of training, 0 to 999.
        text: Conditioning of N rows.
        direction: (1 or N, channels, height, width).

    Returns:
        Both float32, shaped as the latents, with gradients with respect to the conditioning.
    """
    along = direction.to(latents.dtype).expand_as(latents).contiguous()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        derived = jvp(
            lambda x: model.schedule.noise_of(model.predict_noise(x, timestep, text), timestep, x), (latents,), (along,)
        )
    return derived[0], derived[1]


def intrinsic_dimension(noise: Tensor, slope: Tensor, direction: Tensor, deviation: float) -> Tensor:
    """D - sigma v^T J v + |e|^2, the estimate of each row's dimension, (N,).

    Args:
        noise: Predicted noise e, (N, channels, height, width), D elements a row.
        slope: J v, its derivative along the direction.
        direction: v, (1, channels, height, width).
        deviation: sigma, the weight of the noise in the latents.
    """
    trace = (direction * slope).flatten(1).sum(1)
    return noise[0].numel() - deviation * trace + noise.square().flatten(1).sum(1)
