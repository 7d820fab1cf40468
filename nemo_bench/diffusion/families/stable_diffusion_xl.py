"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion.families.base import Conditioning, Family


class StableDiffusionXL(Family):
    """SDXL: two text encoders, a pooled text embedding, and size conditioning (Podell et al. 2023).

    Size conditioning is that of an uncropped image of the generated size, the default of the pipeline.
    """

    pipeline_class = "StableDiffusionXLPipeline"
    loading: ClassVar[dict[str, Any]] = {"add_watermarker": False, "feature_extractor": None, "image_encoder": None}
    networks = ("unet", "vae", "text_encoder", "text_encoder_2")

    @override
    def unet_inputs(self, text: Conditioning, size: tuple[int, int]) -> dict[str, Any]:
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=text.text.dtype, device=text.text.device)
        added = {"text_embeds": text.pooled, "time_ids": sizes.repeat(len(text), 1)}
        return {**super().unet_inputs(text, size), "added_cond_kwargs": added}

    @override
    def decoding_dtype(self, config: Any, dtype: torch.dtype) -> torch.dtype:
        # The published autoencoder overflows in float16, and its configuration says so.
        return torch.float32 if dtype == torch.float16 and config.force_upcast else dtype

    @override
    def unscaled(self, config: Any, latents: Tensor) -> Tensor:
        mean, std = _statistics(config, latents)
        return latents * std / config.scaling_factor + mean

    @override
    def scaled(self, config: Any, latents: Tensor) -> Tensor:
        mean, std = _statistics(config, latents)
        return (latents - mean) * config.scaling_factor / std


def _statistics(config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, 0 and 1 where the autoencoder has none."""
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return latents.new_zeros(()), latents.new_ones(())
    mean, std = (latents.new_tensor(config[f"latents_{key}"])[:, None, None] for key in ("mean", "std"))
    return mean, std
