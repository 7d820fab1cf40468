"""FLUX.1-dev and FLUX.1-schnell: joint attention in double blocks, then blocks that mix text and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench.diffusion.attention import Crossing
from nemo_bench.diffusion.families.base import Conditioning, Layers, Segment
from nemo_bench.diffusion.families.transformer import Transformer
from nemo_bench.diffusion.schedule import Flow
from nemo_bench.errors import ModelError

_PIXELS = 8  # of an image for each latent, along a side


@dataclass(frozen=True)
class Flux(Transformer):
    """FLUX.1: T5 and a pooled vector of CLIP; flow matching on latents that are packed in patches of 2 x 2.

    FLUX.1-dev is told the scale of guidance that it was distilled from, ``distilled_guidance``, in one pass; beyond it
    there is classifier-free guidance as everywhere, ``model.guidance``, which takes two, and of which its authors make
    no use (1). Value layers are ``attn.add_v_proj`` of the double blocks, and by ``layers=all`` also the text positions
    of ``attn.to_v`` in the single blocks, whose weights serve the picture too, so that they can't be exported.
    """

    pipeline_class = "FluxPipeline"
    names = frozenset({"flux1"})
    loading: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    network_class = "FluxTransformer2DModel"
    joint = True
    layers = ("double", "all")
    pattern = r"transformer_blocks\.\d+\.attn\.add_v_proj|single_transformer_blocks\.\d+\.attn\.to_v"
    stacked = False

    tokens: int = 512  #: Positions of T5, whose padding changes the embeddings of words.
    size: int = 1024  #: Side of an image in pixels, a multiple of 16.
    distilled_guidance: float = 3.5  #: Scale that FLUX.1-dev is told; FLUX.1-schnell takes none.

    def __post_init__(self) -> None:
        if self.size % (2 * _PIXELS):
            raise ModelError(f"model.size={self.size}: expected a multiple of {2 * _PIXELS}")

    @override
    def latent_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return config["in_channels"] // 4, self.size // _PIXELS, self.size // _PIXELS

    @override
    def schedule(self, config: Mapping[str, Any], network: Mapping[str, Any]) -> Flow:
        _, height, width = self.latent_shape(network)
        return Flow(config, height * width // 4, linear=True)

    @override
    def segments(self, pipeline: Any) -> tuple[Segment, ...]:
        return (Segment("tokenizer_2", slice(0, self.tokens)),)

    @override
    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        text, pooled, _ = pipeline.encode_prompt(
            list(texts), None, device=device, num_images_per_prompt=1, max_sequence_length=self.tokens
        )
        return Conditioning(text, pooled, self.mask(pipeline, texts, text))

    @override
    def predict(
        self, network: Any, latents: Tensor, timestep: Tensor, text: Conditioning, size: tuple[int, int]
    ) -> Tensor:
        rows, channels, height, width = latents.shape
        patches = latents.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.cartesian_prod(torch.arange(height // 2), torch.arange(width // 2))
        output: Tensor = network(
            hidden_states=patches.reshape(rows, -1, 4 * channels),
            # The network multiplies by 1000 again.
            timestep=timestep.expand(rows).to(latents.dtype) / 1000,
            guidance=latents.new_full((rows,), self.distilled_guidance, dtype=torch.float32)
            if network.config.guidance_embeds
            else None,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.text,
            txt_ids=latents.new_zeros(text.text.shape[1], 3),
            img_ids=torch.cat([torch.zeros(len(places), 1), places], 1).to(latents),
            return_dict=False,
        )[0]
        patches = output.view(rows, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(rows, channels, height, width)

    @override
    def value_layers(self, network: nn.Module, layers: Layers) -> dict[str, nn.Module]:
        found = super().value_layers(network, layers)
        return {name: layer for name, layer in found.items() if layers == "all" or name.startswith("transformer")}

    @override
    def crossing(self, network: Mapping[str, Any]) -> Crossing:
        return Crossing(slice(self.tokens, None), slice(0, self.tokens))

    @override
    def span(self, layer: str) -> slice:
        return slice(0, self.tokens) if layer.startswith("single") else slice(None)
