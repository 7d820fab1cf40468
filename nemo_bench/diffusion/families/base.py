"""Encoded prompts, and what every family of diffusion models answers about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nemo_bench.diffusion.attention import EVERYWHERE, Crossing
from nemo_bench.diffusion.schedule import Schedule
from nemo_bench.errors import ModelError

Layers = Literal["down+mid", "double", "all"]
"""Value layers that can be blocked: of a UNet those of the down path and the middle, as published, of FLUX those of the
blocks that keep text and image apart, or all."""


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts."""

    #: Hidden states of the text encoder, (N, tokens, channels); those of SDXL's two encoders side by side.
    text: Tensor
    pooled: Tensor | None = None  #: Pooled text embedding, (N, channels), of families that take one, or None.
    #: 1 for tokens and 0 for padding, (N, tokens); None where padding counts as text, as in Stable Diffusion 1 to XL.
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})

    def rows(self, index: Sequence[int]) -> Conditioning:
        """Selects rows in the order given; a row may be repeated."""
        rows = list(index)
        return self._map(lambda values: values[rows])

    def followed_by(self, other: Conditioning) -> Conditioning:
        """Concatenates the rows of two conditionings."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        joined = {name: torch.cat(pair) for name, pair in pairs.items() if pair[0] is not None and pair[1] is not None}
        return Conditioning(joined["text"], joined.get("pooled"), joined.get("mask"))

    def to(self, dtype: torch.dtype) -> Conditioning:
        """Converts to another dtype, all but the mask."""
        return replace(self._map(lambda values: values.to(dtype)), mask=self.mask)

    def clone(self) -> Conditioning:
        """Copies the tensors; gradients flow through the copy even if the original was made in inference mode."""
        return self._map(torch.Tensor.clone)


class Segment(NamedTuple):
    """Positions of the text that the tokens of one tokenizer fill."""

    tokenizer: str  #: Part of the pipeline.
    span: slice  #: Positions, the last ones of them padding.


@dataclass(frozen=True)
class Family(ABC):
    """What differs between families of models: one class for each class of pipelines, its fields settings of a model.

    Everything else, such as seeds, guidance, masks and differences, is :class:`nemo_bench.diffusion.Diffusion`.
    """

    pipeline_class: ClassVar[str]  #: Class of the diffusers pipeline, as in ``model_index.json``.
    names: ClassVar[frozenset[str]]  #: Values of ``model.family`` that such models have.
    loading: ClassVar[Mapping[str, Any]] = {}  #: Arguments of ``from_pretrained``.
    networks: ClassVar[tuple[str, ...]]  #: Parts of the pipeline with weights.
    may_lack: ClassVar[tuple[str, ...]] = ()  #: Parts that a pipeline may be without.
    network: ClassVar[str] = "transformer"  #: The part that denoises.
    network_class: ClassVar[str]  #: Its class.
    takes_lora: ClassVar[bool] = True  #: Whether diffusers loads a LoRA into the pipeline.
    #: Whether text attends to the picture, so that values of text differ by timestep and picture.
    joint: ClassVar[bool] = False
    #: How this family measures memorization where that differs from published measures, for specs and reports.
    measures: ClassVar[str] = ""
    layers: ClassVar[tuple[Layers, ...]] = ("all",)  #: Choices of value layers, the default first.
    lowers: ClassVar[bool] = False  #: Whether the pipeline makes prompts lower case.
    stacked: ClassVar[bool] = True  #: Whether both halves of guidance share a pass in the pipeline.
    latent_dtype: ClassVar[torch.dtype | None] = None  #: Dtype of latents, None for the network's.

    def chosen(self, layers: Layers | None) -> Layers:
        """The given choice of value layers, or the default for None; ModelError for a choice of other families."""
        if layers is None:
            return self.layers[0]
        if layers not in self.layers:
            raise ModelError(
                f"model.layers={layers}: a {self.pipeline_class} has no such choice of value layers; give "
                f"{' or '.join(self.layers)}"
            )
        return layers

    @abstractmethod
    def check(self, pipeline: Any) -> None:
        """Raises ModelError for a pipeline of the class that can't be sampled."""

    @abstractmethod
    def schedule(self, config: Mapping[str, Any], network: Mapping[str, Any]) -> Schedule:
        """The schedule of models with a shipped scheduler and a network of these configurations."""

    @abstractmethod
    def check_schedule(self, config: Mapping[str, Any], steps: int, *, predicts: bool, where: str) -> None:
        """Raises ModelError, before weights load, where it can't serve."""

    @abstractmethod
    def latent_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Channels, height and width of a latent, by the configuration of the network; KeyError if it lacks them."""

    @abstractmethod
    def segments(self, pipeline: Any) -> tuple[Segment, ...]:
        """Which positions of the text each tokenizer fills; those of two may be the same.

        Tokens are shown by the first of them.
        """

    def begins(self, pipeline: Any) -> list[int]:
        """Positions of begin tokens: CLIP and Gemma put one first, T5 has none."""
        segments = self.segments(pipeline)
        first = {span.start for name, span in segments if getattr(pipeline, name).bos_token_id is not None}
        return sorted(first)

    def used(self, text: Conditioning) -> Tensor:
        """What of encoded prompts the network takes, boolean, (N, tokens, channels); the rest is of no effect, or 0."""
        used = torch.ones_like(text.text, dtype=torch.bool)
        # Where text attends to the picture, the network sees padding.
        return used if text.mask is None or self.joint else used & text.mask[..., None].bool()

    @abstractmethod
    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
        """Encodes N prompts to N rows."""

    @abstractmethod
    def empty(self, pipeline: Any, device: torch.device) -> Conditioning:
        """One row, what guidance leads away from."""

    @abstractmethod
    def predict(
        self, network: Any, latents: Tensor, timestep: Tensor, text: Conditioning, size: tuple[int, int]
    ) -> Tensor:
        """One pass of the network.

        Args:
            network: The part of the pipeline that denoises.
            latents: Noisy latents, (N, channels, height, width).
            timestep: In the units of the scheduler, one for all rows or (N,).
            text: Conditioning of N rows.
            size: Height and width of the images in pixels.

        Returns:
            Its output, shaped as the latents.
        """

    @abstractmethod
    def value_layers(self, network: nn.Module, layers: Layers) -> dict[str, nn.Module]:
        """Value projections of text by module path, in network order; ModelError without a layer."""

    def value_input(self, network: Any, text: Conditioning) -> Tensor | None:
        """What value layers get, where the text alone decides it; None for ``joint`` attention."""
        return None

    @abstractmethod
    def parts(self, network: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
        """Modules by path, called one after another, whose outputs are enough to start at some of the value layers."""

    @abstractmethod
    def attentions(self, network: nn.Module, blocks: str | tuple[str, ...] = "") -> dict[str, nn.Module]:
        """Layers in which the picture attends to text by module path, in network order.

        ``blocks`` are beginnings of module paths; ModelError if there is no such layer.
        """

    def crossing(self, network: Mapping[str, Any]) -> Crossing:
        """Where the picture attends to text in these layers, of a network of this configuration."""
        return EVERYWHERE

    def span(self, layer: str) -> slice:
        """Positions of text in what a value layer gives, by its module path; most give nothing else."""
        return slice(None)

    def text_projections(self, network: nn.Module) -> list[nn.Module]:
        """Layers that get the encoded text itself, so that a text need not be projected in every step."""
        return []

    def decoding_dtype(self, config: Any, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which an autoencoder of this configuration and dtype decodes and encodes."""
        return dtype

    def unscaled(self, config: Any, latents: Tensor) -> Tensor:
        """Converts latents of the network to those of an autoencoder of this configuration."""
        return latents / config.scaling_factor + _shift(config)

    def scaled(self, config: Any, latents: Tensor) -> Tensor:
        """Converts latents of an autoencoder of this configuration to those of the network."""
        return (latents - _shift(config)) * config.scaling_factor

    def encode_images(self, autoencoder: Any, images: Tensor) -> Tensor:
        """Encodes images, -1 black and 1 white, to latents of the autoencoder: its means."""
        latents: Tensor = autoencoder.encode(images).latent_dist.mode()
        return latents


def _shift(config: Any) -> float:
    """What an autoencoder of this configuration subtracts from its latents, 0 where it names nothing."""
    return getattr(config, "shift_factor", None) or 0.0
