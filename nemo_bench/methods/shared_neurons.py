"""Shared neurons: what was found most often for memorized prompts, blocked for every prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Literal, TypeVar

from torch import Tensor

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, NotFiniteError
from nemo_bench.methods.base import Method
from nemo_bench.methods.nemo import BlockNeurons, NeMo
from nemo_bench.records.data import Localization, Neurons, Prompt

T = TypeVar("T", tuple[int, int], tuple[tuple[int, int], ...])


class SharedNeurons(BlockNeurons):
    """Blocks the same neurons for all prompts: those that the source found for the most memorized prompts.

    Counted are the prompts that are marked as memorized; all, where none is. They are those of the run, or of the list
    ``prompts.shared_from``. A sensitivity study of Hintersdorf et al. 2024 (appendix), and what their scripts generate
    general captions with, for which they search no neurons. Ties are settled in network order, not in the order of
    the prompts as in the published scripts. There, an empty set counts as a subgroup as well; here it does not, since
    it blocks nothing.

    Args:
        source: The method whose neurons are counted; for candidates before refinement, give it ``neurons="initial"``.
        k: How many are blocked, at least 1; all, where fewer were found. None for all: what ``nemo-bench export``
            switches off for good.
        of: ``"model"``: the k neurons found most often. ``"layer"``: k in every layer. ``"subgroups"``: the k subgroups
            found most often, a subgroup being all neurons of a prompt together.
        factor: What the outputs of blocked neurons are multiplied by.

    Raises:
        ConfigError: k is too small.
    """

    title = "Shared neurons"
    summary = "the neurons that another method found most often for memorized prompts, for all prompts at once"
    sourcing = "paper"
    citation = NeMo.citation
    pools = True

    source: Method

    def __init__(
        self,
        source: Method,
        k: int | None = 10,
        of: Literal["model", "layer", "subgroups"] = "model",
        factor: float = 0.0,
    ) -> None:
        super().__init__(factor)
        if k is not None and k < 1:
            raise ConfigError(f"shared neurons need a k of 1 or more, or null for all, given {k}")
        self.source, self.k, self.of = source, k, of
        if k is None:
            self.title = f"{source.title}, one edit for all prompts"
        self._chosen: Neurons | None = None
        self._is_counted = False

    def fit(self, found: Mapping[str, Localization], widths: Mapping[str, int], prompts: Sequence[Prompt] = ()) -> None:
        """See :meth:`Method.fit`."""
        super().fit(found, widths, prompts)
        layers = list(widths)
        counted = {prompt.id for prompt in prompts if prompt.kind} or found.keys()
        # A neuron is the position of its layer and its index there, so that neurons sort in network order.
        subgroups = [
            tuple((place, index) for place, layer in enumerate(layers) for index in result.neurons.get(layer, ()))
            for name, result in found.items()
            if name in counted
        ]
        self._is_counted = bool(subgroups)
        neurons = list(chain(*subgroups))
        if self.of == "subgroups":
            chosen = list(chain(*_most_common(filter(None, subgroups), self.k)))
        elif self.of == "layer":
            by_layer = ([n for n in neurons if n[0] == place] for place in range(len(layers)))
            chosen = list(chain(*(_most_common(own, self.k) for own in by_layer)))
        else:
            chosen = _most_common(neurons, self.k)
        self._chosen = Neurons({name: [i for p, i in chosen if p == place] for place, name in enumerate(layers)})

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        """See :meth:`Method.localize`.

        Raises:
            ConfigError: The source's neurons have not been counted.
            NotFiniteError: The source failed for all memorized prompts.
        """
        if self._chosen is None:
            raise ConfigError("shared neurons need to be counted: call fit with what the source found for all prompts")
        if not self._is_counted:
            raise NotFiniteError(f"there are no neurons to share: {self.source.title} failed for all memorized prompts")
        found = self.found.get(prompt.id, Localization())
        return Localization(self._chosen, gate_score=found.gate_score, threshold=found.threshold)


def _most_common(items: Iterable[T], k: int | None) -> list[T]:
    counts = Counter(items)
    return sorted(counts, key=lambda item: (-counts[item], item))[:k]
