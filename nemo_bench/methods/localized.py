"""Neurons of a localizer, and what switching them off does to memorized prompts and to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, NotFiniteError, counted
from nemo_bench.localization import SEEDS
from nemo_bench.localization.localizers import Inputs, Localizer
from nemo_bench.methods.base import Setup
from nemo_bench.methods.derived_neurons import OtherNeurons, memorized_ids
from nemo_bench.methods.nemo import BlockNeurons
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.truth import read_truth, truth_digest


@dataclass(eq=False)
class LocalizedNeurons(BlockNeurons):
    """Blocks the neurons of a localizer; where any prompts are marked as memorized, nothing for the others.

    Args:
        localizer: The localizer.
    """

    title = "Neurons of a localizer"
    summary = "the neurons that a localizer holds responsible, switched off"
    sourcing = "depends on the localizer"

    localizer: Localizer = field()
    #: File of the known neurons, ``model.truth``: localizers that rank block as many as memorize the prompt; None where
    #: they are not known.
    truth: str | None = None
    _left_out: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.localizer
        self.title = own.title
        self.citation = own.citation  # type: ignore[misc] # these are as the localizer says
        self.needs = own.needs  # type: ignore[misc]
        self.needs_calibration = own.needs_calibration  # type: ignore[misc]
        self.memorization_threshold = own.memorization_threshold
        self.noise_protocol = own.noise_protocol

    @cached_property
    def _known(self) -> Mapping[str, Neurons]:
        return read_truth(Path(self.truth)) if self.truth and self.localizer.uses_count else {}

    @property
    @override
    def calibrates_threshold(self) -> bool:
        return self.localizer.calibrates_threshold

    def lacking(self, prompts: Sequence[Prompt]) -> dict[str, str]:
        """What prompts lack that the localizer needs, by their ids, without those that lack nothing."""
        return {prompt.id: what for prompt in prompts if (what := self.localizer.lacks(prompt))}

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        searched = [prompt for prompt in prompts if prompt.kind] or list(prompts)
        lacking = self.lacking(searched)
        if lacking and len(lacking) == len(searched):
            why = next(iter(lacking.values()))
            raise ConfigError(f"{self.title} can localize none of {counted(len(searched), 'prompt')}: {why}")
        # In place of the path; None where the known neurons do not matter.
        return {"truth": truth_digest(self._known, prompts) if self.truth and self.localizer.uses_count else None}

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        general = frozenset(prompt.id for prompt in setup.prompts if not prompt.kind)
        self._left_out = general if len(general) < len(setup.prompts) else frozenset()
        self.localizer.setup(model, setup.batch_size)

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        if prompt.id in self._left_out:
            return Localization()
        if latents is None:
            latents = self.noise_protocol.latents(model, seeds_of(prompt, "localize", range(SEEDS)))
        count = self._known[prompt.id].count if prompt.id in self._known else None
        inputs = Inputs(latents=latents, calibration=self.calibration, batch_size=self.batch_size, count=count)
        return self.localizer.localize(model, prompt, inputs)


@dataclass(eq=False)
class Deletion(OtherNeurons):
    """Blocks a memorized prompt's own neurons, and for any other prompt those of a memorized one.

    Which one is drawn by the ids of the two: what general prompts lose shows what else the neurons do (the benchmark
    DEL of Chang et al. 2024).
    """

    title = "Deletion"
    summary = "own neurons of memorized prompts off; for others those of a memorized prompt"
    sourcing = "paper and public code, for language models; our adaptation"

    pools = False
    _edited: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.title = self.source.title

    @override
    def check_source(self, prompts: Sequence[Prompt], source_prompts: Sequence[Prompt]) -> None:
        pass  # a memorized prompt may be the only one: it has neurons of its own, and lends them to others

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        prompts = setup.source_prompts
        self._edited = frozenset(memorized_ids(prompts) or [prompt.id for prompt in prompts])

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        if prompt.id not in self._edited:
            return super().localize(model, prompt, latents)
        if prompt.id not in self._localizations:
            raise NotFiniteError(f"{self.source.title} found no neurons for it")
        return self._localizations[prompt.id]
