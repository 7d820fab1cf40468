"""Memorization sinks: drops the neurons that a training has set aside for what single captions memorize."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch
from nemo_bench.methods.nemo import BlockNeurons
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.io import digest
from nemo_bench.records.ranges import Positive, Share
from nemo_bench.records.truth import Isolation, read_isolation

TITLES = {
    "off": "Sinks off",
    "own": "Own sinks on",
    "all": "All sinks on, scaled",
    "random": "Own sinks on, as many others off",
}
"""Title by mode."""


@dataclass(eq=False)
class Sinks(BlockNeurons):
    """Switches the memorization sinks of a model that was trained with them (Ghosal et al. 2025).

    While such a model is trained, each caption switches a subset of a pool of value neurons on. Dropping the whole pool
    is the mitigation; the other modes say what it does. A prompt without sinks of its own, such as one that was not
    trained on, has the pool dropped in the modes ``"own"`` and ``"random"`` too.
    """

    title = TITLES["off"]
    summary = "the neurons that a training set aside for what captions memorize, dropped or switched on"
    sourcing = "a copy of the code for language models; our adaptation"
    citation = cite("ghosal2025memsinks")

    #: Folder of a training with sinks, ``model.training``, or its ``isolation.json``.
    file: str | None = None
    #: ``"off"``: the pool is dropped. ``"own"``: the prompt's own sinks are on, as in training. ``"all"``: all are on,
    #: scaled by ``active``. ``"random"``, a control: as ``"own"``, and as many other neurons off as own sinks are on.
    mode: Literal["off", "own", "all", "random"] = "off"
    #: Factor of all other neurons where the pool is dropped; the published code has (1 - pool + active) / (1 - pool),
    #: 1.43 with parts of 0.3.
    rescale: Positive = 1.0
    active: Share = 0.3  #: Factor of the sinks in the mode ``"all"``: the part of them that a caption switches on.

    def __post_init__(self) -> None:
        super().__post_init__()
        self.title = TITLES[self.mode]
        if self.rescale != 1 and self.mode != "off":
            raise ConfigError(f"Sinks: rescale={self.rescale:g} is for mode=off, given mode={self.mode}; leave one out")

    @cached_property
    def _isolation(self) -> Isolation:
        if self.file is None:
            msg = "sinks are those of a training: give model.training=DIR, the folder of a training with"
            raise ConfigError(f"{msg} variant=sinks, or method.file=DIR")
        found = read_isolation(Path(self.file))
        if not found.pool.count:
            raise ConfigError(f"{self.file}: variant={found.variant} has no pool of sinks; expected variant=sinks")
        if self.mode in ("own", "random") and not found.neurons:
            given = f"variant={found.variant} gave captions no sinks of their own, given mode={self.mode}"
            raise ConfigError(f"{self.file}: {given}; take mode=off or mode=all")
        return found

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        found = self._isolation
        own = {prompt.id: dict(found.neurons[prompt.id]) for prompt in prompts if prompt.id in found.neurons}
        return {"file": digest([dict(found.pool), own])}

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        pool, own = self._isolation.pool, self._isolation.neurons.get(prompt.id, Neurons())
        model.masks.check(pool | own)
        if self.mode in ("off", "all"):
            return Localization(pool)
        drawn = self._others(model.masks.widths, prompt) if self.mode == "random" else Neurons()
        return Localization(pool - own | drawn)

    def _others(self, widths: Mapping[str, int], prompt: Prompt) -> Neurons:
        """As many neurons per layer as the prompt has sinks of its own there, drawn from those that are no sinks."""
        pool, own = self._isolation.pool, self._isolation.neurons.get(prompt.id, Neurons())
        rng = np.random.default_rng(int(digest([prompt.id]), 16))
        others = {layer: rng.permutation(sorted({*range(widths[layer])} - {*pool.get(layer, ())})) for layer in own}
        return Neurons({layer: others[layer][: len(ids)].tolist() for layer, ids in own.items()})

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        factor = self.active if self.mode == "all" else self.factor
        factors = model.masks.factors(batch.neurons)
        scaled = {layer: values * self.rescale + (1 - values) * factor for layer, values in factors.items()}
        with model.masks.scale(scaled):
            yield batch
