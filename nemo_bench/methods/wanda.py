"""Wanda-style pruning: feed-forward weights that matter more to memorized prompts than to the empty one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.prompts import read_prompts
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest


class Wanda(Method):
    """Prunes the second linear layer of every feed-forward block of the UNet (Chavhan et al. 2024).

    The memorized prompts are generated once, and so is the empty one as often as there are prompts. In each UNet call
    the inputs of these layers, both halves of guidance and every pixel a row, are brought to length 1 row by row; n_j
    is the norm of column j over all rows. A weight scores |W_ij| n_j, and is pruned where it is among the highest of
    its row for the memorized prompts and scores higher there than for the empty one, in enough of the first calls.
    Weights are 0 while images are generated, for all prompts alike, and then what they were.

    The paper's own code was not published; this follows the first author's sibling work, ConceptPrune, which prunes
    Stable Diffusion 1.5 by 51 calls of PNDM. How far along the first calls lead depends on the number of steps: ten
    here are those of the model's own DDIM steps. One in a hundred weights is next to nothing in the small layers of the
    embedded model, which takes more.

    Args:
        file: Prompts to prune for (csv, jsonl, txt or parquet); None takes those of the run that are marked as
            memorized. The public lists have 10 to 50.
        ratio: Part of each row of weights that can be pruned, 0 to 1.
        calls: So many of the first UNet calls are looked at, at least 1; all, where there are fewer.
        agreement: A weight must be chosen in more than this part of them, at least 0 and below 1.
        seed: All prompts start from the noise of this seed.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "Wanda-style pruning"
    summary = "feed-forward weights that matter more to memorized prompts than to the empty one, set to 0"
    touches = "feed-forward weights"
    sourcing = "abstract, and public code of a sibling paper by the same author"
    citation = cite("chavhan2024memorized")
    makes_passes = True
    needs = frozenset({"uncompiled"})
    auditable = True

    def __init__(
        self, file: str | None = None, ratio: float = 0.01, calls: int = 10, agreement: float = 0.0, seed: int = 0
    ) -> None:
        if not (0 <= ratio <= 1 and calls >= 1 and 0 <= agreement < 1 and seed >= 0):
            msg = f"given ratio={ratio}, calls={calls}, agreement={agreement}, seed={seed}"
            raise ConfigError(f"wanda needs a ratio and an agreement from 0 to 1, at least 1 call and a seed, {msg}")
        self.file, self.ratio, self.calls, self.agreement, self.seed = file, ratio, calls, agreement, seed
        self._chosen: WeakKeyDictionary[Diffusion, dict[str, Tensor]] = WeakKeyDictionary()

    @cached_property
    def _given(self) -> list[str]:
        return [prompt.text for prompt in read_prompts(self.file)] if self.file else []

    def _texts(self, prompts: Sequence[Prompt]) -> list[str]:
        texts = self._given or [prompt.text for prompt in prompts if prompt.kind]
        if not texts:
            raise ConfigError(
                "wanda needs memorized prompts, and none of those given is marked VM or TM: set file to a list of them"
            )
        return texts

    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        """See :meth:`Method.fingerprint`.

        Raises:
            NemoBenchError: There are no memorized prompts, or the file can't be read.
        """
        return {"file": digest(self._texts(prompts))}

    def prepare(self, model: Diffusion, prompts: Sequence[Prompt]) -> None:
        """See :meth:`Method.prepare`.

        Raises:
            ConfigError: There are no memorized prompts.
            ModelError: The UNet has no such layers, or is compiled.
        """
        if model not in self._chosen:
            self._chosen[model] = self._choose(model, self._texts(prompts))

    @torch.no_grad()
    def _choose(self, model: Diffusion, texts: Sequence[str]) -> dict[str, Tensor]:
        """Which weights are pruned, by layer, (outputs, inputs)."""
        layers = feed_forward_layers(model)
        memorized, empty = self._squares(model, layers, texts), self._squares(model, layers, [""])
        chosen = {}
        for name, layer in layers.items():
            weight, count = layer.weight.abs().float(), torch.zeros_like(layer.weight, dtype=torch.int)
            own, other = memorized[name].to(weight.device), len(texts) * empty[name].to(weight.device)
            for target, base in zip(own.sqrt().float(), other.sqrt().float(), strict=True):
                scores = weight * target
                # Products such as 0.29 x 100 fall a little short of the number that is meant.
                highest = scores.topk(math.floor(self.ratio * weight.shape[1] + 1e-9), 1).indices
                count += torch.zeros_like(count).scatter_(1, highest, 1) * (scores > weight * base)
            chosen[name] = count > self.agreement * len(own)
        return chosen

    def _squares(self, model: Diffusion, layers: Mapping[str, nn.Linear], texts: Sequence[str]) -> dict[str, Tensor]:
        """Squared norms of the columns of the layers' inputs in the first calls, by layer, (calls, inputs)."""
        total: dict[str, Tensor] = {}
        for first in range(0, len(texts), self.batch_size):
            part = texts[first : first + self.batch_size]
            seen: dict[str, list[Tensor]] = {name: [] for name in layers}
            hooks = [layer.register_forward_pre_hook(partial(self._see, seen[name])) for name, layer in layers.items()]
            try:
                model.generate(model.encode(part), model.latents([self.seed] * len(part)))
            finally:
                for hook in hooks:
                    hook.remove()
            total = {name: total.get(name, 0) + torch.stack(calls) for name, calls in seen.items()}
        return total

    def _see(self, calls: list[Tensor], layer: nn.Module, args: tuple[Tensor]) -> None:
        if len(calls) < self.calls:
            rows = nn.functional.normalize(args[0].flatten(0, -2).float(), dim=1)
            # Doubles, so that batches of other sizes add up to the same.
            calls.append(rows.square().double().sum(0).cpu())

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`.

        Raises:
            ConfigError: Nothing was prepared, and there is no file to prepare from.
        """
        if model not in self._chosen:
            if not self.file:
                raise ConfigError("wanda needs to see the memorized prompts: call prepare(model, prompts), or set file")
            self.prepare(model, ())
        with pruned({layer: self._chosen[model][name] for name, layer in feed_forward_layers(model).items()}):
            yield batch


def feed_forward_layers(model: Diffusion) -> dict[str, nn.Linear]:
    """The second linear layers of the UNet's feed-forward blocks by module path.

    Raises:
        ModelError: There is none, or the UNet is compiled, whose inputs can't be looked at.
    """
    layers = {name: part for name, part in model.unet.named_modules() if name.endswith(".ff.net.2")}
    if not layers or model.compiled:
        msg = f"model.compiled={model.compiled}, {len(layers)} feed-forward layers: wanda needs some"
        raise ModelError(f"{msg}, and model.compiled=false")
    return layers


@contextmanager
@torch.no_grad()
def pruned(weights: Mapping[nn.Linear, Tensor]) -> Iterator[None]:
    """Sets chosen weights to 0 while the context is open.

    Args:
        weights: For each layer which ones, (outputs, inputs).
    """
    kept = {layer: layer.weight[chosen].clone() for layer, chosen in weights.items()}
    try:
        for layer, chosen in weights.items():
            layer.weight.data.masked_fill_(chosen, 0)
        yield
    finally:
        for layer, chosen in weights.items():
            layer.weight.data[chosen] = kept[layer]
