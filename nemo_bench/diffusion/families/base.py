"""Encoded prompts, and the base of the model families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        text: Hidden states of the text encoder, (N, tokens, channels); those of SDXL's two encoders side by side.
        pooled: Pooled text embedding of SDXL's second encoder, (N, channels), or None.
    """

    text: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(change(self.text), None if self.pooled is None else change(self.pooled))

    def rows(self, index: Sequence[int]) -> Conditioning:
        """Selects rows in the order given; a row may be repeated."""
        rows = list(index)
        return self._map(lambda values: values[rows])

    def followed_by(self, other: Conditioning) -> Conditioning:
        """Concatenates the rows of two conditionings."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return Conditioning(torch.cat([self.text, other.text]), pooled)

    def to(self, dtype: torch.dtype) -> Conditioning:
        """Converts to another dtype."""
        return self._map(lambda values: values.to(dtype))

    def clone(self) -> Conditioning:
        """Copies the tensors; gradients flow through the copy even if the original was made in inference mode."""
        return self._map(torch.Tensor.clone)


class Family:
    """A model family; its methods are right for a UNet that is conditioned on hidden states of text alone.

    Attributes:
        pipeline_class: Name of its diffusers pipeline class.
        loading: Arguments of ``from_pretrained``; they leave out components that are not needed.
        networks: Components with weights.
    """

    pipeline_class: ClassVar[str]
    loading: ClassVar[dict[str, Any]]
    networks: ClassVar[tuple[str, ...]]

    def unet_inputs(self, text: Conditioning, size: tuple[int, int]) -> dict[str, Any]:
        """Arguments of the UNet besides latents and timestep.

        Args:
            text: Conditioning of N rows.
            size: Height and width of the images in pixels.
        """
        return {"encoder_hidden_states": text.text}

    def decoding_dtype(self, config: Any, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which an autoencoder of this configuration and dtype decodes and encodes."""
        return dtype

    def unscaled(self, config: Any, latents: Tensor) -> Tensor:
        """Converts latents of the UNet to those of an autoencoder of this configuration."""
        return latents / config.scaling_factor

    def scaled(self, config: Any, latents: Tensor) -> Tensor:
        """Converts latents of an autoencoder of this configuration to those of the UNet."""
        return latents * config.scaling_factor
