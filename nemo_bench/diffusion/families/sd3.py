"""Stable Diffusion 3 and 3.5: a transformer in which text and image attend to each other (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from nemo_bench.diffusion.attention import Crossing
from nemo_bench.diffusion.families.base import Conditioning, Segment
from nemo_bench.diffusion.families.transformer import Transformer


@dataclass(frozen=True)
class StableDiffusion3(Transformer):
    """SD 3 and 3.5: two CLIPs side by side, then T5, and their pooled vectors; flow matching.

    Any of the encoders may be absent: zeros take the place of what it gives. Value layers are ``attn.add_v_proj``, the
    values of the text in every block; ``attn2`` of 3.5-medium is image alone. Values depend on timestep and picture,
    and the network sees padding. Pooled vectors reach every block past all value neurons.
    """

    pipeline_class = "StableDiffusion3Pipeline"
    names = frozenset({"sd3", "planted_mmdit"})
    loading: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}
    networks: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    may_lack: ClassVar[tuple[str, ...]] = (
        *("text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3"),
    )
    network_class = "SD3Transformer2DModel"
    joint = True
    pattern = r"transformer_blocks\.\d+\.attn\.add_v_proj"

    tokens: int = 256  #: Positions of T5, whose padding changes the embeddings of words.

    @override
    def segments(self, pipeline: Any) -> tuple[Segment, ...]:
        clip = _clip_length(pipeline)
        names = [name for name in ("tokenizer", "tokenizer_2") if getattr(pipeline, name) is not None]
        found = [Segment(name, slice(0, clip)) for name in names]
        if pipeline.tokenizer_3 is not None:
            found.append(Segment("tokenizer_3", slice(clip, clip + self.tokens)))
        return tuple(found)

    @override
    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        config, length = pipeline.transformer.config, _clip_length(pipeline)
        parts = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
        encoded = [_clip(*part, texts, length, device) for part in parts if part[1] is not None]
        missing = config.pooled_projection_dim - sum(pooled.shape[1] for _, pooled in encoded)
        if missing:
            zeros = torch.zeros(len(texts), length, missing, device=device, dtype=pipeline.transformer.dtype)
            encoded.insert(0 if pipeline.text_encoder is None else 1, (zeros, zeros[:, 0]))
        states, pooled = (torch.cat(both, -1) for both in zip(*encoded, strict=True))
        t5 = pipeline._get_t5_prompt_embeds(
            list(texts), max_sequence_length=self.tokens, device=device, dtype=states.dtype
        )
        text = torch.cat([pad(states, (0, t5.shape[-1] - states.shape[-1])), t5], -2)
        return Conditioning(text, pooled, self.mask(pipeline, texts, text))

    @override
    def used(self, text: Conditioning) -> Tensor:
        # CLIP's states are widened to those of T5 by zeros, and so are encoders that are absent.
        return text.text != 0

    @override
    def crossing(self, network: Mapping[str, Any]) -> Crossing:
        positions = self.positions(network)
        return Crossing(slice(0, positions), slice(positions, None))

    @override
    def predict(
        self, network: Any, latents: Tensor, timestep: Tensor, text: Conditioning, size: tuple[int, int]
    ) -> Tensor:
        output: Tensor = network(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=text.text,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]
        return output


def _clip_length(pipeline: Any) -> int:
    """Positions of the CLIPs, also where they are absent."""
    tokenizer = pipeline.tokenizer or pipeline.tokenizer_2
    return int(tokenizer.model_max_length if tokenizer else pipeline.tokenizer_max_length)


def _clip(
    tokenizer: Any, encoder: Any, texts: Sequence[str], length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Hidden states of the layer before the last, and the projected end token, of a CLIP."""
    ids = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    output = encoder(ids.to(device), output_hidden_states=True)
    return output.hidden_states[-2], output[0]
