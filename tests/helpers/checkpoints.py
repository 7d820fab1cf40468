"""Single files in the layout of the original checkpoints."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline


def original_layout(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Weights of a pipeline under the names of the checkpoints that Stable Diffusion 1.x was published as."""
    unet = pipeline.unet.state_dict()
    names = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    names |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    for block in range(4):
        for layer in range(3):
            place, up = 3 * block + layer, f"up_blocks.{block}"
            names[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{place + 1}.0"
            names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{place + 1}.1"
            names[f"{up}.resnets.{layer}"] = f"output_blocks.{place}.0"
            names[f"{up}.attentions.{layer}"] = f"output_blocks.{place}.1"
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{3 * block + 3}.0.op"
        attention = any(name.startswith(f"up_blocks.{block}.attentions") for name in unet)
        names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{3 * block + 2}.{1 + attention}.conv"
    names |= {f"mid_block.resnets.{layer}": f"middle_block.{2 * layer}" for layer in range(2)}
    names["mid_block.attentions.0"] = "middle_block.1"
    parts = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    parts |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    weights = {}
    for name, tensor in unet.items():
        start = next(start for start in names if name.startswith(f"{start}."))
        rest = name.removeprefix(start)
        if ".resnets." in name:
            rest = "." + parts[rest.split(".")[1]] + "." + rest.split(".")[2]
        weights[f"model.diffusion_model.{names[start]}{rest}"] = tensor
    blocks = len(pipeline.vae.config.block_out_channels)
    words = {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_out.0": "proj_out", "to_q": "q"}
    words |= {"to_k": "k", "to_v": "v", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
    words |= {f"mid_block.resnets.{i}": f"mid.block_{i + 1}" for i in range(2)}
    for i in range(blocks):
        words |= {f"down_blocks.{i}.": f"down.{i}.", f"up_blocks.{i}.": f"up.{blocks - 1 - i}."}
    words |= {".resnets.": ".block.", "downsamplers.0.conv": "downsample.conv", "upsamplers.0.conv": "upsample.conv"}
    for name, tensor in pipeline.vae.state_dict().items():
        linear = ".attentions." in name and tensor.dim() == 2
        for word, other in words.items():
            name = name.replace(word, other)
        weights[f"first_stage_model.{name}"] = tensor[:, :, None, None] if linear else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in weights.items()}
