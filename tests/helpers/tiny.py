"""Tiny pipelines of every family with random weights, built in code from the true classes.

The Stable Diffusion 1.x one has learnt nothing, but it has the shape that matters: seven value layers in the down path
and the mid block, a causal text encoder, padded prompts. With seeds 0 to 2 it also looks as if it had memorized every
prompt: single-scale SSIM between the noise differences of two seeds is well above what remains when those seven layers
are switched off (seed 0: 0.75 and 0.08 for latents of 16x16, 0.93 and 0.15 for 8x8), so thresholds in between let NeMo
find neurons. With seed 3 switching off has less effect than another seed, so NeMo's selection can be made to run out.
Those of Stable Diffusion 2.x and XL are made to look memorized in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ("red", "sun", "map", "fox", "big", "hat", "cup", "dog", "ice", "jam", "key", "log", "net", "oak", "pig", "wax")
"""The words that are one token each. Three letters, so that no merge of one word can get in the way of another's."""


NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
"""The noise schedule that all families share."""


def tiny_texts(n: int) -> list[str]:
    """Returns ``n`` different prompts of three words; the first ones are the same for every ``n``.

    Args:
        n: How many, 0 to 4096.

    Raises:
        ValueError: If the words do not make that many prompts.
    """
    size = len(WORDS)
    if not 0 <= n <= size**3:
        raise ValueError(f"Got n={n}, but {size} words make 0 to {size**3} prompts of three. Ask for fewer.")
    # An odd step visits every number below a power of two once, and spreads neighbours over the vocabulary.
    numbers = [i * 1237 % size**3 for i in range(n)]
    return [" ".join((WORDS[i // size**2], WORDS[i // size % size], WORDS[i % size])) for i in numbers]


def tiny_tokenizer(max_length: int = 16, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Returns a CLIP tokenizer of bytes and `WORDS`; it pads with its end token as Stable Diffusion 1.x's does."""
    letters = sorted(ByteLevel.alphabet())
    merges = sorted({(word[0], word[1]) for word in WORDS}) + [(word[:2], word[2] + "</w>") for word in WORDS]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length, pad_token=pad_token)


def tiny_pipeline(
    seed: int = 0,
    prediction_type: str = "epsilon",
    cross_attention_dim: int = 16,
    sample_size: int = 16,
    block_out_channels: tuple[int, int, int, int] = (8, 8, 16, 16),
    vae_factor: int = 2,
    text_gain: float = 20.0,
) -> StableDiffusionPipeline:
    """Builds the pipeline on the CPU in float32, in evaluation mode, without disturbing the global random state.

    Args:
        seed: Seed of the weights; equal seeds give equal weights.
        prediction_type: ``epsilon`` or ``v_prediction``.
        cross_attention_dim: Width of the text embedding, even.
        sample_size: Side of the latents (four channels), a multiple of 8. Multi-scale SSIM needs 48.
        block_out_channels: Widths of the UNet's blocks, multiples of 4. The value layers have the widths of the blocks
            they are in: two of each of the first three, then one of the last.
        vae_factor: Pixels of an image for each pixel of a latent, along a side: 2 or 4.
        text_gain: Factor on the value weights of the first block, eight times as large with each further one. Near 0
            the text hardly matters there.

    Raises:
        ValueError: If ``vae_factor`` is neither 2 nor 4; from diffusers, if the widths do not fit.
    """
    if vae_factor not in (2, 4):
        raise ValueError(f"Got vae_factor={vae_factor}, expected 2 or 4.")
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        text_encoder = CLIPTextModel(text_config(tokenizer, cross_attention_dim))
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=block_out_channels,
            layers_per_block=2,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=cross_attention_dim,
        )
        vae = _vae(sample_size, vae_factor)
    for module in (text_encoder, unet, vae):
        draw_weights(module, seed)
    _make_text_matter(text_encoder, unet, text_gain)
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type)
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd2(seed: int = 0, prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    """A tiny Stable Diffusion 2.x: OpenCLIP's activation and padding, heads by block, linear projections.

    Args:
        seed: Seed of the weights.
        prediction_type: ``v_prediction`` as 2.0 and 2.1, or ``epsilon`` as their base models.
    """
    tokenizer = tiny_tokenizer(pad_token="!")
    with torch.random.fork_rng(devices=[]):
        text_encoder = CLIPTextModel(text_config(tokenizer, 24, hidden_act="gelu"))
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            attention_head_dim=(2, 2, 4, 4),
            cross_attention_dim=24,
            use_linear_projection=True,
            upcast_attention=prediction_type == "v_prediction",
        )
        vae = _vae(16, 2)
    for module in (text_encoder, unet, vae):
        draw_weights(module, seed)
    _make_text_matter(text_encoder, unet, 20.0)
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl(seed: int = 0, zeros_for_empty: bool = True) -> StableDiffusionXLPipeline:
    """A tiny SDXL: no attention in the first block, then one and two transformer layers per attention; Euler's sampler.

    Args:
        seed: Seed of the weights.
        zeros_for_empty: Whether zeros take the place of an empty negative prompt.
    """
    tokenizers = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    with torch.random.fork_rng(devices=[]):
        first = CLIPTextModel(text_config(tokenizers[0], 16))
        second = CLIPTextModelWithProjection(text_config(tokenizers[1], 24, hidden_act="gelu"))
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 8, 16),
            transformer_layers_per_block=(1, 1, 2),
            norm_num_groups=4,
            attention_head_dim=(2, 2, 4),
            cross_attention_dim=16 + 24,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 24,
        )
        vae = _vae(16, 2)
    for module in (first, second, unet, vae):
        draw_weights(module, seed)
    _make_text_matter(first, unet, 20.0)
    second.get_input_embeddings().weight.data.mul_(3)
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=first.eval(),
        text_encoder_2=second.eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=zeros_for_empty,
        add_watermarker=False,
    )


def text_config(tokenizer: CLIPTokenizer, width: int, **options: Any) -> CLIPTextConfig:
    """A text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def _vae(sample_size: int, factor: int) -> AutoencoderKL:
    widths = (8, 8) if factor == 2 else (8, 8, 8)
    return AutoencoderKL(
        sample_size=sample_size * factor,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=4,
        norm_num_groups=4,
    )


@torch.no_grad()
def draw_weights(module: nn.Module, seed: int) -> None:
    """Draws all weights anew, so that they depend on no library's way of initialising; norms keep their factor of 1."""
    # One more than the seed, so that the default seed is one with which blocking shows well.
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.dim() > 1:
            bound = parameter[0].numel() ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
        elif name.endswith("bias"):
            parameter.uniform_(-0.1, 0.1, generator=generator)


@torch.no_grad()
def _make_text_matter(text_encoder: CLIPTextModel, unet: UNet2DConditionModel, text_gain: float) -> None:
    """Scales random weights so that seeds agree on much of the predicted noise, and the text decides on what."""
    # Words differ by more than positions do.
    text_encoder.get_input_embeddings().weight.mul_(3)
    # The features hold little of the latent and much of the text, and the output outweighs the latent taken from it.
    unet.conv_in.weight.mul_(0.005)
    unet.conv_out.weight.mul_(30)
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_v") and not name.startswith("up_blocks"):
            # What happens deeper is a smaller part of the output; so it gets more.
            depth = 3 if name.startswith("mid_block") else int(name.split(".")[1])
            module.weight.mul_(text_gain * 8**depth)
