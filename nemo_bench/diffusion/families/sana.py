"""Sana: linear self-attention, and cross-attention on the words of Gemma (Xie et al. 2025)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion.families.base import Conditioning, Segment
from nemo_bench.diffusion.families.transformer import FLOW_MEASURES, Transformer
from nemo_bench.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Sana(Transformer):
    """Sana and Sana 1.5; flow matching by Euler's method, with the shift of the shipped DPM-Solver.

    Value layers are ``attn2.to_v`` of every block. Values follow from the text alone, after its projection and norm;
    padding is masked. Prompts are made lower case, and stand behind the pipeline's instruction; the empty one does not.
    One latent is 32 x 32 pixels, so ``model.similarity`` has one scale.
    """

    pipeline_class = "SanaPipeline"
    names = frozenset({"sana"})
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    network_class = "SanaTransformer2DModel"
    pattern = r"transformer_blocks\.\d+\.attn2\.to_v"
    lowers = True
    latent_dtype = torch.float32
    measures = FLOW_MEASURES.format("")  # values are the same at every noise level

    tokens: int = 300  #: Positions of Gemma, after its instruction is cut off.

    @override
    def schedule(self, config: Mapping[str, Any], network: Mapping[str, Any]) -> Schedule:
        if "flow_shift" in config:
            config = {"shift": config["flow_shift"], "num_train_timesteps": config["num_train_timesteps"]}
        return super().schedule(config, network)

    @override
    def check_schedule(self, config: Mapping[str, Any], steps: int, *, predicts: bool, where: str) -> None:
        if config.get("prediction_type") != "flow_prediction" or "flow_shift" not in config:
            super().check_schedule(config, steps, predicts=predicts, where=where)

    @override
    def segments(self, pipeline: Any) -> tuple[Segment, ...]:
        return (Segment("tokenizer", slice(0, self.tokens)),)

    @override
    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        # The instruction is a default of the call alone.
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        text, mask, *_ = pipeline.encode_prompt(
            list(texts),
            False,
            device=device,
            max_sequence_length=self.tokens,
            complex_human_instruction=instruction,
        )
        return Conditioning(text, mask=mask)

    @override
    def empty(self, pipeline: Any, device: torch.device) -> Conditioning:
        *_, text, mask = pipeline.encode_prompt(
            [""], True, negative_prompt="", device=device, max_sequence_length=self.tokens
        )
        return Conditioning(text, mask=mask)

    @override
    def predict(
        self, network: Any, latents: Tensor, timestep: Tensor, text: Conditioning, size: tuple[int, int]
    ) -> Tensor:
        output: Tensor = network(
            latents.to(network.dtype),
            encoder_hidden_states=text.text.to(network.dtype),
            encoder_attention_mask=text.mask,
            timestep=timestep.expand(len(latents)) * network.config.timestep_scale,
            return_dict=False,
        )[0]
        return output.float()[:, : latents.shape[1]]

    @override
    def value_input(self, network: Any, text: Conditioning) -> Tensor:
        normed: Tensor = network.caption_norm(network.caption_projection(text.text))
        return normed

    @override
    def encode_images(self, autoencoder: Any, images: Tensor) -> Tensor:
        latents: Tensor = autoencoder.encode(images).latent
        return latents
