"""PixArt-alpha and PixArt-Sigma: a transformer with cross-attention on the words of T5 (Chen et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion.families.base import Conditioning, Segment
from nemo_bench.diffusion.families.transformer import Transformer
from nemo_bench.diffusion.schedule import VariancePreserving, check_schedule


@dataclass(frozen=True)
class PixArtAlpha(Transformer):
    """PixArt-alpha; the network predicts noise, and a variance that samplers leave out.

    Value layers are ``attn2.to_v`` of every block. Values follow from the text alone, after its projection; padding is
    masked. Prompts are made lower case. The first of 50 steps is far noisier than Stable Diffusion's, so that noise
    differences are taken at the timestep with that signal-to-noise ratio, 712 by the published scheduler.
    """

    pipeline_class = "PixArtAlphaPipeline"
    names = frozenset({"pixart"})
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    network_class = "PixArtTransformer2DModel"
    takes_lora = False
    pattern = r"transformer_blocks\.\d+\.attn2\.to_v"
    lowers = True
    measures = (
        "PixArt: noise differences at the signal-to-noise ratio of Stable Diffusion's first step, activations over "
        "tokens without padding; not comparable with other families"
    )

    tokens: int = 120  #: Positions of T5.

    @override
    def schedule(self, config: Mapping[str, Any], network: Mapping[str, Any]) -> VariancePreserving:
        return VariancePreserving(config, own=False)

    @override
    def check_schedule(self, config: Mapping[str, Any], steps: int, *, predicts: bool, where: str) -> None:
        check_schedule(config, steps, predicts=predicts, where=where)

    @override
    def segments(self, pipeline: Any) -> tuple[Segment, ...]:
        return (Segment("tokenizer", slice(0, self.tokens)),)

    @override
    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        text, mask, *_ = pipeline.encode_prompt(
            list(texts), False, num_images_per_prompt=1, device=device, max_sequence_length=self.tokens
        )
        return Conditioning(text, mask=mask)

    @override
    def predict(
        self, network: Any, latents: Tensor, timestep: Tensor, text: Conditioning, size: tuple[int, int]
    ) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if network.use_additional_conditions:
            height, width = size
            added["resolution"] = text.text.new_tensor([[height, width]]).repeat(len(text), 1)
            added["aspect_ratio"] = text.text.new_tensor([[height / width]]).repeat(len(text), 1)
        output: Tensor = network(
            latents,
            encoder_hidden_states=text.text,
            encoder_attention_mask=text.mask,
            timestep=timestep.expand(len(latents)),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]

    @override
    def value_input(self, network: Any, text: Conditioning) -> Tensor:
        projected: Tensor = network.caption_projection(text.text)
        return projected


@dataclass(frozen=True)
class PixArtSigma(PixArtAlpha):
    """PixArt-Sigma: longer prompts, SDXL's autoencoder, no size conditioning."""

    pipeline_class = "PixArtSigmaPipeline"

    tokens: int = 300  #: Positions of T5.
