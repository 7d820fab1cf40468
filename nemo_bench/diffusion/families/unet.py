"""Stable Diffusion 1.x, 2.x and XL: a UNet with cross-attention on all tokens, padding too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench.diffusion.attention import cross_attentions, value_layers
from nemo_bench.diffusion.families.base import Conditioning, Family, Layers, Segment
from nemo_bench.diffusion.schedule import VariancePreserving, check_schedule
from nemo_bench.errors import ModelError


@dataclass(frozen=True)
class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder, CLIP or OpenCLIP; widths and predictions are configuration."""

    pipeline_class = "StableDiffusionPipeline"
    names = frozenset({"sd1", "sd2", "sd2_base", "realistic_vision", "planted"})
    # The safety checker would blacken images.
    loading: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }
    networks: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    network = "unet"
    network_class = "UNet2DConditionModel"
    layers = ("down+mid", "all")

    @override
    def check(self, pipeline: Any) -> None:
        if pipeline.unet.config.get("time_cond_proj_dim") is not None:
            raise ModelError(
                "the UNet takes the scale of guidance as an input (as LCM distillations do); not supported"
            )

    @override
    def schedule(self, config: Mapping[str, Any], network: Mapping[str, Any]) -> VariancePreserving:
        return VariancePreserving(config)

    @override
    def check_schedule(self, config: Mapping[str, Any], steps: int, *, predicts: bool, where: str) -> None:
        check_schedule(config, steps, predicts=predicts, where=where)

    @override
    def latent_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return config["in_channels"], height, width

    @override
    def segments(self, pipeline: Any) -> tuple[Segment, ...]:
        names = [name for name in ("tokenizer", "tokenizer_2") if getattr(pipeline, name, None)]
        return tuple(Segment(name, slice(0, getattr(pipeline, name).model_max_length)) for name in names)

    @override
    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        return self._encode(pipeline, texts, device, 0)

    @override
    def empty(self, pipeline: Any, device: torch.device) -> Conditioning:
        """The empty prompt, or zeros if the pipeline (SDXL) says so."""
        return self._encode(pipeline, [""], device, 1)

    def _encode(self, pipeline: Any, texts: Sequence[str], device: torch.device, half: int) -> Conditioning:
        # Pipelines give conditional and unconditional text, then, if any, both pooled embeddings.
        encoded = pipeline.encode_prompt(
            prompt=list(texts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=half == 1
        )
        return Conditioning(*encoded[half::2])

    @override
    def predict(
        self, network: Any, latents: Tensor, timestep: Tensor, text: Conditioning, size: tuple[int, int]
    ) -> Tensor:
        output: Tensor = network(latents, timestep, **self.unet_inputs(text, size), return_dict=False)[0]
        return output

    def unet_inputs(self, text: Conditioning, size: tuple[int, int]) -> dict[str, Any]:
        """Arguments of the UNet besides latents and timestep, for images of a height and width in pixels."""
        return {"encoder_hidden_states": text.text}

    @override
    def value_layers(self, network: nn.Module, layers: Layers) -> dict[str, nn.Module]:
        return value_layers(network, layers)

    @override
    def value_input(self, network: Any, text: Conditioning) -> Tensor:
        return text.text

    @override
    def parts(self, network: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
        """The input convolution, and the resnets, attentions and samplers of the blocks."""
        sections = {"down_blocks", "mid_block", *(layer.split(".")[0] for layer in layers)}
        found = {}
        for name, module in network.named_modules():
            section, *rest = name.split(".")
            # mid_block.resnets.0, but down_blocks.1.resnets.0
            depth = 2 if section == "mid_block" else 3
            if name == "conv_in" or (section in sections and len(rest) == depth):
                found[name] = module
        return found

    @override
    def attentions(self, network: nn.Module, blocks: str | tuple[str, ...] = "") -> dict[str, nn.Module]:
        return cross_attentions(network, blocks)

    @override
    def text_projections(self, network: nn.Module) -> list[nn.Module]:
        return [projection for layer in cross_attentions(network).values() for projection in (layer.to_k, layer.to_v)]


@dataclass(frozen=True)
class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, a pooled text embedding, and size conditioning (Podell et al. 2023).

    Size conditioning is that of an uncropped image of the generated size, the default of the pipeline.
    """

    pipeline_class = "StableDiffusionXLPipeline"
    names = frozenset({"sdxl"})
    loading: ClassVar[Mapping[str, Any]] = {"add_watermarker": False, "feature_extractor": None, "image_encoder": None}
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
