"""Tiny pipelines of the families of transformers, with random weights, built in code from the true classes.

Their blocks read more of the text than of the latent, so that a prompt looks memorized: seeds agree on much of what is
predicted. Autoencoders halve the sides of an image.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from nemo_bench import Diffusion
from nemo_bench.diffusion import Similarity
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


def tiny_pixart(seed: int = 0, *, sigma: bool = False, sized: bool = False) -> PixArtAlphaPipeline:
    """A tiny PixArt-alpha, or PixArt-Sigma.

    Args:
        seed: Seed of the weights.
        sigma: Whether it is Sigma.
        sized: Whether it takes the size of images, as alpha does for 1024 pixels.
    """
    tokenizer, heads = tiny_t5_tokenizer(), 3 if sized else 4
    with torch.random.fork_rng(devices=[]):
        encoder = tiny_t5(tokenizer)
        transformer = PixArtTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=heads,
            cross_attention_dim=8 * heads,
            caption_channels=48,
            norm_num_groups=4,
            use_additional_conditions=sized,
        )
        vae = tiny_vae(4, None)
    for module in (encoder, transformer, vae):
        draw_weights(module, seed)
    make_text_matter(transformer, "pos_embed.proj", "attn2.to_v")
    pipeline = (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        # As it is published, with a spacing that DDIM has not by default.
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", timestep_spacing="linspace"
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux(seed: int = 0, *, distilled: bool = True, dynamic: bool = True) -> FluxPipeline:
    """A tiny FLUX.1.

    Args:
        seed: Seed of the weights.
        distilled: Whether the network is told a scale of guidance, as dev is and schnell is not.
        dynamic: Whether the scheduler shifts levels by the number of positions, likewise.
    """
    clip, t5 = tiny_tokenizer(), tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        encoders = CLIPTextModel(text_config(clip, 16)), tiny_t5(t5)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=48,
            pooled_projection_dim=16,
            guidance_embeds=distilled,
            axes_dims_rope=(4, 2, 2),
        )
        vae = tiny_vae()
    for module in (*encoders, transformer, vae):
        draw_weights(module, seed)
    make_text_matter(transformer, "x_embedder", "attn.add_v_proj")
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic),
        vae=vae.eval(),
        text_encoder=encoders[0].eval(),
        tokenizer=clip,
        text_encoder_2=encoders[1].eval(),
        tokenizer_2=t5,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer of letters and bytes, which puts its begin token first as the published one does."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = [*special, "▁", *"abcdefghijklmnopqrstuvwxyz0123456789", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = GemmaTokenizer(vocab={token: number for number, token in enumerate(letters)}, merges=[])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def tiny_sana(seed: int = 0, *, normed: bool = True) -> SanaPipeline:
    """A tiny Sana with its DPM-Solver; ``normed`` has norms of queries and keys, as 1.5."""
    tokenizer = tiny_gemma_tokenizer()
    with torch.random.fork_rng(devices=[]):
        encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        )
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=16,
            patch_size=1,
            qk_norm="rms_norm_across_heads" if normed else None,
        )
        vae = AutoencoderDC(
            latent_channels=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            attention_head_dim=4,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.4,
        )
    for module in (encoder, transformer, vae):
        draw_weights(module, seed)
    make_text_matter(transformer, "patch_embed.proj", "attn2.to_v")
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
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
    for name, buffer in network.named_buffers():
        if name in network.state_dict():
            buffer.mul_(0.1)  # positions, on which all prompts agree
    network.get_submodule("proj_out").weight.mul_(20)
    for name, module in network.named_modules():
        if name.endswith(values):
            module.get_parameter("weight").mul_(40)


TRANSFORMERS = ("sd3", "flux", "pixart", "sana")
"""Names of :func:`tiny_transformer`."""


@cache
def tiny_transformer(name: str) -> Diffusion:
    """A tiny model of each family of transformers, under guidance; read-only, since tests share it."""
    make = {"sd3": tiny_sd3, "flux": tiny_flux, "pixart": tiny_pixart, "sana": tiny_sana}[name]
    settings: dict[str, Any] = {"size": 128} if name == "flux" else {}
    return Diffusion(make(), tokens=TOKENS, steps=3, guidance=3.0, similarity=Similarity(1.0, ()), **settings)
