"""Published configurations of networks at full size, as far as they differ from the defaults of their class."""

from __future__ import annotations

from typing import Any

from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

_SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
FULL_SIZE_UNETS: dict[str, dict[str, Any]] = {
    "1.x": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "2.x base": {"sample_size": 64, **_SD2},
    "2.x": {"sample_size": 96, **_SD2, "upcast_attention": True},
    "XL": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Of UNet2DConditionModel, by version of Stable Diffusion."""

_SD3: dict[str, Any] = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}  # fmt: skip
_MEDIUM = {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
FULL_SIZE_TRANSFORMERS: dict[str, tuple[type[nn.Module], str, dict[str, Any], str, int, int, int]] = {
    "sd3_medium": (
        SD3Transformer2DModel, "StableDiffusion3Pipeline", {**_MEDIUM, "pos_embed_max_size": 192},
        "transformer_blocks.{}.attn.add_v_proj", 24, 1536, 2_028_328_000,
    ),
    "sd35_medium": (
        SD3Transformer2DModel, "StableDiffusion3Pipeline",
        {**_MEDIUM, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        "transformer_blocks.{}.attn.add_v_proj", 24, 1536, 2_243_171_520,
    ),
    "sd35_large": (
        SD3Transformer2DModel, "StableDiffusion3Pipeline",
        {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm",
         "pos_embed_max_size": 192},
        "transformer_blocks.{}.attn.add_v_proj", 38, 2432, 8_056_627_520,
    ),
    "flux1_dev": (
        FluxTransformer2DModel, "FluxPipeline", {"guidance_embeds": True}, "transformer_blocks.{}.attn.add_v_proj",
        19, 3072, 11_901_408_320,
    ),
    "flux1_schnell": (
        FluxTransformer2DModel, "FluxPipeline", {}, "transformer_blocks.{}.attn.add_v_proj", 19, 3072, 11_891_178_560,
    ),
    "pixart_alpha": (
        PixArtTransformer2DModel, "PixArtAlphaPipeline", {"caption_channels": 4096},
        "transformer_blocks.{}.attn2.to_v", 28, 1152, 611_349_152,
    ),
    "pixart_sigma": (
        PixArtTransformer2DModel, "PixArtSigmaPipeline",
        {"caption_channels": 4096, "use_additional_conditions": False},
        "transformer_blocks.{}.attn2.to_v", 28, 1152, 610_856_096,
    ),
    "sana_1600m": (
        SanaTransformer2DModel, "SanaPipeline", {}, "transformer_blocks.{}.attn2.to_v", 20, 2240, 1_604_462_752,
    ),
    "sana_600m": (
        SanaTransformer2DModel, "SanaPipeline",
        {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
         "cross_attention_dim": 1152},
        "transformer_blocks.{}.attn2.to_v", 28, 1152, 591_747_872,
    ),
}  # fmt: skip
"""Class of the network, of the pipeline, configuration, path, number and width of value layers, number of weights."""
