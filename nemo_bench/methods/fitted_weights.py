"""Weights of the UNet fitted on training images and on pictures to keep: what all such methods share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench.diffusion import Conditioning, Diffusion, fitted_picture
from nemo_bench.errors import ConfigError, ModelError, NotFiniteError
from nemo_bench.methods.base import Batch, FittedMethod, Setup
from nemo_bench.prompts import read_prompts, references_digest
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import GENERAL, Prompt
from nemo_bench.records.io import batched, digest
from nemo_bench.records.ranges import Count


@dataclass(frozen=True)
class Pictures:
    """Clean latents, float32, (N, channels, height, width), and the encoded prompts that belong to them."""

    latents: Tensor
    text: Conditioning

    def rows(self, index: Sequence[int]) -> Pictures:
        """Selects pictures in the order given; one may be repeated."""
        return Pictures(self.latents[list(index)], self.text.rows(index))


@dataclass(eq=False)
class FittedWeights(FittedMethod):
    """A method that fits all weights of the UNet on training images of memorized prompts, and on pictures to keep.

    The training images are seen, so results are not to be ranked beside mitigations that see prompts alone.
    """

    touches = "weights of the UNet"
    auditable = True

    #: List of prompts to keep (csv, jsonl, txt or parquet), with reference images or without; None takes those of the
    #: run that are not marked as memorized.
    keep: str | None = None
    limit: Count = 64  #: The first prompts of them that are kept.
    _difference: dict[str, Tensor] | None = field(default=None, init=False)

    @override
    def check(self, family: str, guidance: float, dtype: str, *, compiled: bool = False) -> None:
        super().check(family, guidance, dtype, compiled=compiled)
        if dtype != "float32" or compiled:
            msg = f"{self.title} fits weights by small steps, given model.dtype={dtype}, model.compiled={compiled}"
            raise ModelError(f"{msg}; set model.dtype=float32 and model.compiled=false")

    @cached_property
    def _listed(self) -> list[Prompt]:
        return read_prompts(self.keep) if self.keep else []

    def sides(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
        """Prompts to keep and to forget.

        Raises:
            ConfigError: There are none of either.
        """
        forgotten = [prompt for prompt in prompts if prompt.kind and prompt.references]
        kept = (self._listed or [prompt for prompt in prompts if prompt.group == GENERAL])[: self.limit]
        if not forgotten or not kept:
            raise ConfigError(
                f"{self.title} needs memorized prompts with reference images, given {len(forgotten)}, and prompts to "
                f"keep, given {len(kept)}: give a list with references, and set keep to a list of general prompts"
            )
        return kept, forgotten

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        sides = self.sides(prompts)
        return {"keep": digest([[[p.id, p.text] for p in side] + [references_digest(side)] for side in sides])}

    def kept_passes(self, prompts: Sequence[Prompt], image: int) -> int:
        """UNet passes of pictures to keep, given those of an image: they are generated where no file is there."""
        kept, _ = self.sides(prompts)
        return 0 if any(prompt.references for prompt in kept) else len(kept) * image

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        if setup.fitted is None or not setup.fitted.is_file():
            raise ConfigError(f"{self.title} has no weights: fit them, and give Setup(fitted=...) their file")
        # Once here, since it is added anew for every batch.
        difference = load_file(setup.fitted, device=str(model.device))
        self._difference = {name: part.to(model.dtype) for name, part in difference.items()}

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        if self._difference is None:
            raise ConfigError(f"{self.title} has no weights: call setup(model, Setup(fitted=...)) first")
        with moved(model.network, self._difference):
            yield batch


@contextmanager
@torch.no_grad()
def moved(network: nn.Module, difference: Mapping[str, Tensor]) -> Iterator[None]:
    """Adds differences to the weights of a network, by name, within the context."""
    weights = {name: weight for name, weight in network.named_parameters() if name in difference}
    original = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data += difference[name].to(weight)
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(original[name])


def reference_pictures(model: Diffusion, prompts: Sequence[Prompt]) -> Pictures:
    """All reference images of prompts, each with its prompt."""
    pairs: list[tuple[str, Path]] = [(prompt.text, path) for prompt in prompts for path in prompt.references]
    latents = [model.encode_images(fitted_picture(path, model.image_size)[None]) for _, path in pairs]
    return Pictures(torch.cat(latents), model.encode([text for text, _ in pairs]))


def kept_pictures(model: Diffusion, prompts: Sequence[Prompt], batch_size: int) -> Pictures:
    """Reference images of prompts; where there is none at all, an image that the model generates for each."""
    with_references = [prompt for prompt in prompts if prompt.references]
    if with_references:
        return reference_pictures(model, with_references)
    return generated_pictures(model, prompts, batch_size)


def generated_pictures(model: Diffusion, prompts: Sequence[Prompt], batch_size: int) -> Pictures:
    """An image that the model generates for each prompt."""
    latents = []
    for part in batched(prompts, max(1, batch_size)):
        noise = model.latents([seeds_of(prompt, "localize", [0])[0] for prompt in part])
        latents.append(model.encode_images(model.generate(model.encode([prompt.text for prompt in part]), noise)))
    return Pictures(torch.cat(latents), model.encode([prompt.text for prompt in prompts]))


def norm(gradients: Sequence[Tensor]) -> float:
    """L2 norm over all weights together."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def finite_norm(gradients: Sequence[Tensor], of: str) -> float:
    """The norm of the gradients of an update; NotFiniteError, naming it, where they are not finite."""
    length = norm(gradients)
    if not math.isfinite(length):
        raise NotFiniteError(f"gradients of {of} are not finite; lower rate")
    return length
