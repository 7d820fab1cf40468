"""What differs between families of Stable Diffusion: what networks take besides latents, decoding, and loading.

Families follow the class of the diffusers pipeline. Stable Diffusion 1.x and 2.x share one: their text encoders, widths
and prediction types differ in their configurations only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from nemo_bench.errors import ModelError


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        text: Hidden states of the text encoder, (N, tokens, channels); of SDXL's two encoders, side by side.
        pooled: Projected text embedding of SDXL's second encoder, (N, channels), or None.
    """

    text: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def rows(self, index: Sequence[int]) -> Conditioning:
        """The conditioning of some rows, in the order given; a row may be taken several times."""
        rows = list(index)
        return Conditioning(self.text[rows], None if self.pooled is None else self.pooled[rows])

    def followed_by(self, other: Conditioning) -> Conditioning:
        """These rows and then those of another conditioning."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return Conditioning(torch.cat([self.text, other.text]), pooled)

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The same in another number format."""
        return Conditioning(self.text.to(dtype), None if self.pooled is None else self.pooled.to(dtype))

    def clone(self) -> Conditioning:
        """A copy, which takes part in gradients even if this was made in inference mode."""
        return Conditioning(self.text.clone(), None if self.pooled is None else self.pooled.clone())


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one text encoder (CLIP or OpenCLIP), whose hidden states are all the UNet takes.

    Attributes:
        pipeline: The diffusers class.
        loading: What it is loaded with besides its place; parts that nothing here uses are left out. The safety checker
            would blacken images.
        networks: Parts with weights.
    """

    pipeline: ClassVar[Any] = StableDiffusionPipeline
    loading: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }
    networks: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")

    def unet_inputs(self, text: Conditioning, size: tuple[int, int]) -> dict[str, Any]:
        """What the UNet takes besides latents and timestep.

        Args:
            text: Conditioning of N rows.
            size: Height and width of the images in pixels.
        """
        return {"encoder_hidden_states": text.text}

    def decoding_dtype(self, config: Any, dtype: torch.dtype) -> torch.dtype:
        """Number format that an autoencoder decodes and encodes in.

        Args:
            config: Its configuration.
            dtype: The one it is in.
        """
        return dtype

    def unscaled(self, config: Any, latents: Tensor) -> Tensor:
        """Latents as the decoder takes them.

        Args:
            config: Configuration of the autoencoder.
            latents: Latents as the UNet has them, (N, channels, height, width).
        """
        return latents / config.scaling_factor

    def scaled(self, config: Any, latents: Tensor) -> Tensor:
        """Latents as the UNet has them, of those that the encoder gives; undoes :meth:`unscaled`."""
        return latents * config.scaling_factor


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, the second one's pooled embedding, and the size of the image (Podell et al. 2023).

    Size conditioning is that of an uncropped image of the size generated, as the pipeline has it by default.
    """

    pipeline = StableDiffusionXLPipeline
    loading: ClassVar[dict[str, Any]] = {"add_watermarker": False, "feature_extractor": None, "image_encoder": None}
    networks = ("unet", "vae", "text_encoder", "text_encoder_2")

    def unet_inputs(self, text: Conditioning, size: tuple[int, int]) -> dict[str, Any]:
        """See :meth:`StableDiffusion.unet_inputs`."""
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=text.text.dtype, device=text.text.device)
        added = {"text_embeds": text.pooled, "time_ids": sizes.repeat(len(text), 1)}
        return {**super().unet_inputs(text, size), "added_cond_kwargs": added}

    def decoding_dtype(self, config: Any, dtype: torch.dtype) -> torch.dtype:
        """See :meth:`StableDiffusion.decoding_dtype`; the published autoencoder overflows in float16 and says so."""
        return torch.float32 if dtype == torch.float16 and config.force_upcast else dtype

    def unscaled(self, config: Any, latents: Tensor) -> Tensor:
        """See :meth:`StableDiffusion.unscaled`; some autoencoders have a mean and a deviation of their latents."""
        if not _has_statistics(config):
            return super().unscaled(config, latents)
        mean, std = _statistics(config, latents)
        return latents * std / config.scaling_factor + mean

    def scaled(self, config: Any, latents: Tensor) -> Tensor:
        """See :meth:`StableDiffusion.scaled`."""
        if not _has_statistics(config):
            return super().scaled(config, latents)
        mean, std = _statistics(config, latents)
        return (latents - mean) * config.scaling_factor / std


def _has_statistics(config: Any) -> bool:
    return config.get("latents_mean") is not None and config.get("latents_std") is not None


def _statistics(config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (latents.new_tensor(config[f"latents_{key}"])[:, None, None] for key in ("mean", "std"))
    return mean, std


FAMILIES = {family.pipeline.__name__: family for family in (StableDiffusion(), StableDiffusionXL())}
"""By the name of the pipeline class, as in ``model_index.json``."""


def family_of(name: str) -> StableDiffusion:
    """The family of a pipeline class.

    Args:
        name: Name of the class.

    Raises:
        ModelError: It is none of :data:`FAMILIES`.
    """
    if name not in FAMILIES:
        raise ModelError(f"pipelines of class {name} are not supported; give one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
