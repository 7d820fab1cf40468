"""Another prompt's neurons: what switching off one memorized prompt's neurons does to other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, NotFiniteError
from nemo_bench.methods.base import Method
from nemo_bench.methods.nemo import BlockNeurons
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.io import digest


class OtherNeurons(BlockNeurons):
    """Blocks for each prompt what the source found for another, memorized prompt, drawn by the ids of the two.

    It shows what a model that was edited for one memorized prompt makes of the other prompts. The memorized prompts are
    those of the run, or of the list ``prompts.shared_from``; all prompts, where none is marked as memorized.

    Args:
        source: The method whose neurons are taken.
        factor: What the outputs of blocked neurons are multiplied by.
    """

    title = "Another prompt's neurons"
    summary = "what another method found for one memorized prompt, for other prompts: what the edit costs those"
    sourcing = "a control"
    pools = True

    source: Method

    def __init__(self, source: Method, factor: float = 0.0) -> None:
        super().__init__(factor)
        self.source = source
        self.title = f"{source.title}, edit for another prompt"
        self._edits: dict[str, Neurons] = {}

    def check_source(self, prompts: Sequence[Prompt], source_prompts: Sequence[Prompt]) -> None:
        """See :meth:`Method.check_source`."""
        edited = set(_memorized(source_prompts) or [prompt.id for prompt in source_prompts])
        alone = next((prompt.id for prompt in prompts if edited <= {prompt.id}), None)
        if alone is not None:
            raise ConfigError(
                f"{self.title}: there is no other memorized prompt for '{alone}'; give a list with two or more, name "
                "one as prompts.shared_from, or leave this method out, such as by method=none,nemo"
            )

    def fit(self, found: Mapping[str, Localization], widths: Mapping[str, int], prompts: Sequence[Prompt] = ()) -> None:
        """See :meth:`Method.fit`."""
        super().fit(found, widths, prompts)
        edited = _memorized(prompts) or [*found]
        self._edits = {name: found[name].neurons for name in edited if name in found}

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        """See :meth:`Method.localize`.

        Raises:
            NotFiniteError: The source failed for all other memorized prompts, or there are none.
        """
        others = [name for name in self._edits if name != prompt.id]
        if not others:
            msg = f"{self.source.title} found no neurons for another memorized prompt than '{prompt.id}'"
            raise NotFiniteError(msg)
        found = self.found.get(prompt.id, Localization())
        drawn = min(others, key=lambda name: digest([prompt.id, name]))
        return Localization(self._edits[drawn], gate_score=found.gate_score, threshold=found.threshold)


def _memorized(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts if prompt.kind]
