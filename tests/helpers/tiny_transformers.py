"""Tiny pipelines of the families of transformers, with random weights, built in code from the true classes.

Their blocks read more of the text than of the latent, so that a prompt looks memorized: seeds agree on much of what is
predicted. Autoencoders halve the sides of an image.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from tiny import WORDS, draw_weights, text_config, tiny_tokenizer

TOKENS = 16
"""Positions of T5 and of Gemma."""


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of letters and words, which needs no files."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *(("▁" + word, -1.0) for word in WORDS), *letters], extra_ids=0)


def tiny_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Its encoder, 48 wide."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer) + 4,  # as in the published ones, rows that no token has
            d_model=48,
            d_kv=12,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def tiny_sd3(
    seed: int = 0, *, large: bool = True, dynamic: bool = False, absent: tuple[int, ...] = ()
) -> StableDiffusion3Pipeline:
    """A tiny Stable Diffusion 3.

    Args:
        seed: Seed of the weights.
        large: As 3.5: norms of queries and keys, and a block with attention of the image to itself; otherwise as 3.
        dynamic: Whether the scheduler shifts levels by the number of positions.
        absent: Numbers of the text encoders that it lacks, 1 to 3.
    """
    clips = [tiny_tokenizer(), tiny_tokenizer(pad_token="!")]
    t5 = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        encoders: list[nn.Module | None] = [
            CLIPTextModelWithProjection(text_config(tokenizer, width, **options))
            for tokenizer, width, options in zip(clips, (16, 24), ({}, {"hidden_act": "gelu"}), strict=True)
        ]
        encoders.append(tiny_t5(t5))
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=40,
            out_channels=16,
            pos_embed_max_size=24,
            dual_attention_layers=(0,) if large else (),
            qk_norm="rms_norm" if large else None,
        )
        vae = tiny_vae()
    for module in (*encoders, transformer, vae):
        assert module is not None
        draw_weights(module, seed)
    make_text_matter(transformer, "pos_embed.proj", "attn.add_v_proj")
    shift: dict[str, Any] = {"use_dynamic_shifting": True} if dynamic else {"shift": 3.0}
    kept = [None if number + 1 in absent else encoder for number, encoder in enumerate(encoders)]
    tokenizers = [None if kept[number] is None else each for number, each in enumerate((*clips, t5))]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae.eval(),
        text_encoder=kept[0],
        tokenizer=tokenizers[0],
        text_encoder_2=kept[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=kept[2],
        tokenizer_3=tokenizers[2],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_vae(channels: int = 16, shift: float | None = 0.06) -> AutoencoderKL:
    """An autoencoder of factor 2."""
    return AutoencoderKL(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=shift,
    )


@torch.no_grad()
def make_text_matter(network: nn.Module, latent: str, values: str) -> None:
    """Scales random weights so that seeds agree on much of what is predicted, and the text decides on what."""
    network.get_submodule(latent).weight.mul_(0.02)
    for buffer in network.buffers():
        buffer.mul_(0.1)  # positions, on which all prompts agree
    network.get_submodule("proj_out").weight.mul_(20)
    for name, module in network.named_modules():
        if name.endswith(values):
            module.get_parameter("weight").mul_(40)
