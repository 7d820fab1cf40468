"""Wanda-style pruning: feed-forward weights that matter more to memorized prompts than to the empty one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, Conditioning, Diffusion
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.methods.base import Batch, Method, Setup
from nemo_bench.prompts import read_prompts
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched, digest
from nemo_bench.records.ranges import Count, Index, Share

FeedForward = nn.Linear | nn.Conv2d
_LAYER = re.compile(r".*\.ff\.(net\.2|conv_point)|single_transformer_blocks\.\d+\.proj_out")
_LAYER_OR_TEXT = re.compile(rf".*\.ff_context\.net\.2|{_LAYER.pattern}")


@dataclass(eq=False)
class Wanda(Method):
    """Prunes the second linear layer of every feed-forward block of the UNet (Chavhan et al. 2024).

    The memorized prompts are generated once, and the empty prompt counts as often as there are prompts. In each UNet
    call the rows of the inputs of these layers, one per pixel and half of guidance, are scaled to length 1; n_j is the
    norm of column j over all rows. A weight scores |W_ij| n_j, and is pruned where it is among the highest of its row
    for the memorized prompts and scores higher there than for the empty one, in enough of the first calls. Pruned
    weights are 0 while images are generated, for all prompts alike, and are then restored.

    The paper's own code is not published; this follows the first author's sibling work, ConceptPrune, which prunes
    Stable Diffusion 1.5 by 51 calls of PNDM. The first ten calls are those of the model's own DDIM steps, so their
    timesteps depend on the number of steps. One in a hundred weights is next to nothing in the small layers of the
    embedded model, which takes more.

    Nothing is published for transformers. There the layers are the same, in Sana the last convolutions of 1 x 1; those
    of the text are left out unless ``text`` is set. FLUX's single blocks have one layer for attention and feed-forward:
    of its inputs those of feed-forward alone are compared, text and image together.
    """

    title = "Wanda-style pruning"
    summary = "feed-forward weights that matter more to memorized prompts than to the empty one, set to 0"
    touches = "feed-forward weights"
    sourcing = "abstract, and public code of a sibling paper by the same author"
    citation = cite("chavhan2024memorized")
    makes_passes = True
    needs = frozenset({"uncompiled"})
    families = frozenset(FAMILIES)
    auditable = True

    #: Prompts to prune for (csv, jsonl, txt or parquet); None takes those of the run that are marked as memorized. The
    #: public lists have 10 to 50.
    file: str | None = None
    ratio: Share = 0.01  #: Share of each row of weights that can be pruned.
    calls: Count = 10  #: Number of first UNet calls that are compared; all, where there are fewer.
    #: A weight must be chosen in more than this share of them, below 1.
    agreement: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Index = 0  #: All prompts start from the noise of this seed.
    #: Whether the layers that feed the text forward in Stable Diffusion 3 and FLUX are pruned as well.
    text: bool = False
    _pruned: dict[FeedForward, Tensor] | None = field(default=None, init=False)

    @cached_property
    def _listed(self) -> list[str]:
        return [prompt.text for prompt in read_prompts(self.file)] if self.file else []

    def _texts(self, prompts: Sequence[Prompt]) -> list[str]:
        texts = self._listed or [prompt.text for prompt in prompts if prompt.kind]
        if not texts:
            raise ConfigError(
                "wanda needs memorized prompts, and none of those given is marked VM or TM: set file to a list of them"
            )
        return texts

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        return {"file": digest(self._texts(prompts))}

    @override
    @torch.no_grad()
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        texts = self._texts(setup.prompts)
        layers = feed_forward_layers(model, text=self.text)
        memorized = self.input_squares(model, layers, model.encode(texts))
        empty = self.input_squares(model, layers, model.encode([""]))
        self._pruned = {}
        for name, layer in layers.items():
            chosen = torch.zeros_like(layer.weight, dtype=torch.bool)
            own = layer.weight.flatten(1)[:, _first_input(name, layer) :]
            chosen.flatten(1)[:, -own.shape[1] :] = self.choose(own, memorized[name], len(texts) * empty[name])
            self._pruned[layer] = chosen

    def input_squares(
        self, model: Diffusion, layers: Mapping[str, FeedForward], text: Conditioning
    ) -> dict[str, Tensor]:
        """Generates encoded prompts, and sums the squared columns of the layers' inputs, rows scaled to length 1.

        Returns:
            By layer, for each of the first calls, (calls, inputs); doubles, so that batches of other sizes add up to
            the same.
        """
        total: dict[str, Tensor] = {}
        # FLUX predicts both halves of guidance one after the other.
        passes = 1 if model.stacked or model.guidance <= 1 else 2
        for part in batched(range(len(text)), max(1, self.batch_size)):
            squares: dict[str, list[Tensor]] = {name: [] for name in layers}
            with ExitStack() as hooks:
                for name, layer in layers.items():
                    add = partial(self._add, squares[name], passes, _first_input(name, layer))
                    hooks.enter_context(layer.register_forward_pre_hook(add))
                model.generate(text.rows(part).to(model.dtype), model.latents([self.seed] * len(part)))
            for name, calls in squares.items():
                total[name] = total.get(name, 0) + torch.stack(calls).unflatten(0, (-1, passes)).sum(1)
        return total

    def _add(self, squares: list[Tensor], passes: int, first: int, layer: nn.Module, args: tuple[Tensor]) -> None:
        if len(squares) < self.calls * passes:
            inputs = args[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else args[0]
            inputs = nn.functional.normalize(inputs.flatten(0, -2)[:, first:].float(), dim=1)
            squares.append(inputs.square().double().sum(0).cpu())

    def choose(self, weight: Tensor, memorized: Tensor, empty: Tensor) -> Tensor:
        """The weights of one layer to prune, a boolean of the shape of ``weight``, (outputs, inputs).

        The squared norms of its inputs, (calls, inputs), are those for the memorized and as many empty prompts.
        """
        size = weight.detach().abs().float()
        # Products such as 0.29 x 100 are slightly below the whole number.
        highest_count = math.floor(self.ratio * weight.shape[1] + 1e-9)
        votes = torch.zeros_like(weight, dtype=torch.int)
        for own, other in zip(memorized.sqrt().to(size), empty.sqrt().to(size), strict=True):
            scores = size * own
            highest = scores.topk(highest_count, 1).indices
            votes += torch.zeros_like(votes).scatter_(1, highest, 1) * (scores > size * other)
        return votes > self.agreement * len(memorized)

    def pruning(self) -> AbstractContextManager[None]:
        """Sets the pruned weights to 0 within the context."""
        if self._pruned is None:
            raise ConfigError("wanda compares weights before it prunes: call setup(model, Setup(prompts=...)) first")
        return pruned(self._pruned)

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        with self.pruning():
            yield batch


def feed_forward_layers(model: Diffusion, *, text: bool = False) -> dict[str, FeedForward]:
    """The last layers of the network's feed-forward blocks by module path; ``text`` adds those for text alone.

    Raises:
        ModelError: There is none, or the network is compiled, which hides their inputs.
    """
    pattern = _LAYER_OR_TEXT if text else _LAYER
    layers = {name: part for name, part in model.network.named_modules() if pattern.fullmatch(name)}
    if not layers or model.compiled:
        msg = f"model.compiled={model.compiled}, {len(layers)} feed-forward layers: wanda needs some"
        raise ModelError(f"{msg}, and model.compiled=false")
    return layers


def _first_input(name: str, layer: FeedForward) -> int:
    """The first input of a layer that is one of feed-forward; in FLUX's single blocks those of attention precede."""
    return layer.weight.shape[0] if name.startswith("single_") else 0


@contextmanager
@torch.no_grad()
def pruned(weights: Mapping[FeedForward, Tensor]) -> Iterator[None]:
    """Sets weights to 0 within the context, by boolean masks of layers, shaped as their weights."""
    original = {layer: layer.weight[chosen].clone() for layer, chosen in weights.items()}
    try:
        for layer, chosen in weights.items():
            layer.weight.data.masked_fill_(chosen, 0)
        yield
    finally:
        for layer, chosen in weights.items():
            layer.weight.data[chosen] = original[layer]
