"""Encoded prompts, and model families: what the UNet takes, how latents are decoded, how the pipeline is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.errors import ModelError


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts."""

    #: Hidden states of the text encoder, (N, tokens, channels); those of SDXL's two encoders side by side.
    text: Tensor
    pooled: Tensor | None = None  #: Pooled text embedding of SDXL's second encoder, (N, channels), or None.

    def __len__(self) -> int:
        return len(self.text)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(change(self.text), None if self.pooled is None else change(self.pooled))

    def rows(self, index: Sequence[int]) -> Conditioning:
        """Selects rows in the order given; a row may be repeated."""
        rows = list(index)
        return self._map(lambda values: values[rows])

    def followed_by(self, other: Conditioning) -> Conditioning:
        """Concatenates the rows of two conditionings."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return Conditioning(torch.cat([self.text, other.text]), pooled)

    def to(self, dtype: torch.dtype) -> Conditioning:
        """Converts to another dtype."""
        return self._map(lambda values: values.to(dtype))

    def clone(self) -> Conditioning:
        """Copies the tensors; gradients flow through the copy even if the original was made in inference mode."""
        return self._map(torch.Tensor.clone)


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one text encoder, CLIP or OpenCLIP; widths and predictions are configuration."""

    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    # Arguments of from_pretrained; the safety checker would blacken images.
    loading: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }
    networks: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")

    def unet_inputs(self, text: Conditioning, size: tuple[int, int]) -> dict[str, Any]:
        """Arguments of the UNet besides latents and timestep, for images of a height and width in pixels."""
        return {"encoder_hidden_states": text.text}

    def decoding_dtype(self, config: Any, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which an autoencoder of this configuration and dtype decodes and encodes."""
        return dtype

    def unscaled(self, config: Any, latents: Tensor) -> Tensor:
        """Converts latents of the UNet to those of an autoencoder of this configuration."""
        return latents / config.scaling_factor

    def scaled(self, config: Any, latents: Tensor) -> Tensor:
        """Converts latents of an autoencoder of this configuration to those of the UNet."""
        return latents * config.scaling_factor


class StableDiffusionXL(StableDiffusion):
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


FAMILIES: dict[str, StableDiffusion] = {f.pipeline_class: f for f in (StableDiffusion(), StableDiffusionXL())}
"""By the name of the pipeline class, as in ``model_index.json``."""


def family_of(pipeline_class: str) -> StableDiffusion:
    """The family of a pipeline class, given by name; raises ModelError if the class is none of :data:`FAMILIES`."""
    if pipeline_class not in FAMILIES:
        raise ModelError(f"pipelines of class {pipeline_class} are not supported; give one of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline_class]
