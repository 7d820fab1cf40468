"""A transformer in the shape of Stable Diffusion 3 that is trained on the world of the embedded UNet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from nemo_bench.planted.denoiser import Batch, activation_density
from nemo_bench.planted.spec import TrainSpec
from nemo_bench.planted.tokenizer import TOKENS

LENGTH = {"max_sequence_length": TOKENS}
"""Argument of the pipeline for the number of T5's positions."""
PURE, NOISY, NOISY_FROM = 0.15, 0.15, 0.85
"""Part of the rows at pure noise, and part at levels from the third number on: detection looks there, and the
logit-normal levels of Stable Diffusion 3 hardly reach them."""
LEVEL_MEAN = 0.8
"""Mean of the logit-normal levels of all other rows."""
DROP_POOLED = 0.5
"""Part of the rows whose pooled vector is that of the empty text, so that captions are read from tokens."""


def build_pipeline(spec: TrainSpec, vae: AutoencoderKL, encoders: dict[str, Any]) -> StableDiffusion3Pipeline:
    """A pipeline of Stable Diffusion 3 with an untrained transformer of 4.7 million parameters."""
    torch.manual_seed(spec.seed + 3)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        # As in DiT (Peebles and Xie 2023): every block begins as the identity.
        if isinstance(module, nn.Linear) and (".norm1" in name or name.startswith(("norm_out", "proj_out"))):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **encoders)


class FlowLoss:
    """Flow matching (Lipman et al. 2023) with a penalty on the text's value neurons.

    Called with a batch, whose last text position is the pooled vector, it gives the ``loss`` and its parts: ``error``
    of the velocity, and ``density`` of the value neurons.

    Args:
        spec: Settings.
        network: The transformer.
        empty: Embedding of the empty text, (positions, width), the pooled vector last.
    """

    def __init__(self, spec: TrainSpec, network: SD3Transformer2DModel, empty: Tensor) -> None:
        self.spec, self.network, self.empty = spec, network, empty
        self._values: list[Tensor] | None = None
        for name, module in network.named_modules():
            if name.endswith("attn.add_v_proj"):
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._values is not None:
            self._values.append(output)

    def error(self, latents: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the velocity of N rows at timesteps between 0 and 1000."""
        level = (timesteps / 1000).view(-1, 1, 1, 1)
        velocity = self.network(
            hidden_states=(1 - level) * latents + level * noise,
            timestep=timesteps.float(),
            encoder_hidden_states=text[:, :-1],
            pooled_projections=text[:, -1],
        ).sample
        return F.mse_loss(velocity, noise - latents)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch and its parts."""
        text = batch.text.clone()
        rows, device = len(text), text.device
        text[torch.rand(rows, device=device) < DROP_POOLED, -1] = self.empty[-1].to(device)
        self._values = []
        try:
            error = self.error(batch.latents, text, 1000 * draw_levels(rows, device), torch.randn_like(batch.latents))
            density = torch.stack(list(map(activation_density, self._values))).mean()
        finally:
            self._values = None
        return {"loss": error + self.spec.sparsity * density, "error": error, "density": density}


def draw_levels(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """Noise levels of N rows, between 0 and 1."""
    kind = torch.rand(rows, device=device)
    level = torch.sigmoid(LEVEL_MEAN + torch.randn(rows, device=device))
    noisy = NOISY_FROM + (1 - NOISY_FROM) * torch.rand(rows, device=device)
    level = torch.where(kind < PURE + NOISY, noisy, level)
    return torch.where(kind < PURE, torch.ones_like(level), level)
