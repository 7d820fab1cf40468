"""Neurons derived from the localizations of another method: shared by all prompts, of another prompt, or random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal, TypeVar

import numpy as np
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, NotFiniteError
from nemo_bench.methods.base import Method, Setup
from nemo_bench.methods.nemo import BlockNeurons
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.io import digest
from nemo_bench.records.ranges import Count

T = TypeVar("T", tuple[int, int], tuple[tuple[int, int], ...])


@dataclass(eq=False)
class DerivedNeurons(BlockNeurons):
    """Blocks neurons that follow from the localizations of another method, the source."""

    source: Method = field()  # without a default, unlike that of the base class
    _localizations: Mapping[str, Localization] = field(default_factory=dict, init=False)
    _memorized: list[str] = field(default_factory=list, init=False)

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        self._localizations = setup.source_localizations
        memorized = memorized_ids(setup.source_prompts) or [*self._localizations]
        self._memorized = [name for name in memorized if name in self._localizations]

    def _with_gate(self, neurons: Neurons, prompt: Prompt) -> Localization:
        """A localization with the source's score of the gate for the prompt."""
        source = self._localizations.get(prompt.id, Localization())
        return Localization(neurons, gate_score=source.gate_score, threshold=source.threshold)


@dataclass(eq=False)
class SharedNeurons(DerivedNeurons):
    """Blocks the same neurons for all prompts: the most frequent ones of the source for memorized prompts.

    It counts prompts that are marked as memorized, or all where none is; those of the run, or of the list
    ``prompts.shared_from``. A sensitivity study of Hintersdorf et al. 2024 (appendix); their scripts generate general
    captions with these neurons, since they search none for them. Ties are settled in network order, not in the order of
    the prompts as in the published scripts. There, an empty set counts as a subgroup as well; here it does not, since
    it blocks nothing.

    Args:
        source: The method whose neurons are counted; for candidates before refinement, give it ``neurons="initial"``.
    """

    title = "Shared neurons"
    summary = "the most frequent neurons of another method for memorized prompts, blocked for all prompts"
    sourcing = "paper"
    citation = cite("hintersdorf2024nemo")
    pools = True

    #: Number of blocked neurons, all where there are fewer; None for all, as ``nemo-bench export`` saves them.
    k: Count | None = 10
    #: ``"model"``: the k most frequent neurons. ``"layer"``: k in every layer. ``"subgroups"``: the k most frequent
    #: subgroups, a subgroup being all neurons of a prompt together.
    of: Literal["model", "layer", "subgroups"] = "model"
    _shared: Neurons | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is None:
            self.title = f"{self.source.title}, one edit for all prompts"

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        layers = list(model.masks.widths)
        # (position of the layer, index in it), so that neurons sort in network order.
        subgroups = [
            tuple((place, index) for place, layer in enumerate(layers) for index in localized.neurons.get(layer, ()))
            for localized in (self._localizations[name] for name in self._memorized)
        ]
        neurons = [*chain(*subgroups)]
        if self.of == "subgroups":
            shared = [*chain(*most_common(filter(None, subgroups), self.k))]
        elif self.of == "layer":
            by_layer = ([n for n in neurons if n[0] == place] for place in range(len(layers)))
            shared = [*chain(*(most_common(own, self.k) for own in by_layer))]
        else:
            shared = most_common(neurons, self.k)
        by_name = {layer: [index for p, index in shared if p == place] for place, layer in enumerate(layers)}
        self._shared = Neurons(by_name)

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        if self._shared is None:
            raise ConfigError("SharedNeurons: call setup with the localizations of the source first")
        if not self._memorized:
            raise NotFiniteError(f"there are no neurons to share: {self.source.title} failed for all memorized prompts")
        return self._with_gate(self._shared, prompt)


@dataclass(eq=False)
class OtherNeurons(DerivedNeurons):
    """Blocks for each prompt the source's neurons of another, memorized prompt, drawn by the ids of the two.

    It shows how a model that was edited for one memorized prompt treats other prompts. The memorized prompts are those
    of the run, or of the list ``prompts.shared_from``; all prompts, where none is marked as memorized. Localizing fails
    where there is no other memorized prompt, or the source failed for all of them.
    """

    title = "Another prompt's neurons"
    summary = "neurons of another memorized prompt: the cost of an edit for other prompts (control)"
    sourcing = "a control"
    pools = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.title = f"{self.source.title}, edit for another prompt"

    @override
    def check_source(self, prompts: Sequence[Prompt], source_prompts: Sequence[Prompt]) -> None:
        edited = set(memorized_ids(source_prompts) or [prompt.id for prompt in source_prompts])
        alone = next((prompt.id for prompt in prompts if edited <= {prompt.id}), None)
        if alone is not None:
            raise ConfigError(
                f"{self.title}: there is no other memorized prompt for '{alone}'; give a list with two or more, name "
                "one as prompts.shared_from, or leave this method out, such as by method=none,nemo"
            )

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        others = [name for name in self._memorized if name != prompt.id]
        if not others:
            msg = f"{self.source.title} found no neurons for another memorized prompt than '{prompt.id}'"
            raise NotFiniteError(msg)
        drawn = min(others, key=lambda name: digest([prompt.id, name]))
        return self._with_gate(self._localizations[drawn].neurons, prompt)


@dataclass(eq=False)
class RandomNeurons(DerivedNeurons):
    """Blocks as many neurons per layer as the source found, drawn from the others.

    Where a layer has too few others, the rest is drawn from the other layers. Localizing fails for a prompt that the
    source failed for.

    Args:
        source: The method whose counts are matched.
    """

    title = "Random neurons"
    summary = "as many neurons as another method blocks, drawn from the others (control)"
    sourcing = "a control"

    seed: int = 0  #: Seed of the draw.
    #: Whether each prompt has its own draw; if not, prompts of equal counts get the same neurons.
    per_prompt: bool = True

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        if prompt.id not in self._localizations:
            raise NotFiniteError(f"{self.source.title} found no number of neurons for prompt '{prompt.id}' to match")
        source = self._localizations[prompt.id]
        rng = np.random.default_rng(int(digest([self.seed, *([prompt.id] if self.per_prompt else [])]), 16))
        free = {
            layer: rng.permutation(sorted(set(range(width)) - set(source.neurons.get(layer, ()))))
            for layer, width in model.masks.widths.items()
        }
        drawn = {layer: free[layer][: len(ids)].tolist() for layer, ids in source.neurons.items()}
        missing = source.neurons.count - sum(map(len, drawn.values()))
        rest = [(layer, index) for layer, ids in free.items() for index in ids[len(drawn.get(layer, ())) :].tolist()]
        for pick in rng.choice(len(rest), min(missing, len(rest)), replace=False):
            layer, index = rest[pick]
            drawn.setdefault(layer, []).append(index)
        gated = self._with_gate(Neurons(drawn), prompt)
        return replace(gated, passed_gate=source.passed_gate, exhausted=source.exhausted)


def memorized_ids(prompts: Sequence[Prompt]) -> list[str]:
    """Ids of prompts that are marked as memorized."""
    return [prompt.id for prompt in prompts if prompt.kind]


def most_common(items: Iterable[T], k: int | None) -> list[T]:
    """The k most frequent items, all for None; ties in their own order."""
    counts = Counter(items)
    return sorted(counts, key=lambda item: (-counts[item], item))[:k]
