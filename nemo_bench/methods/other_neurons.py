"""Another prompt's neurons: what switching off one memorized prompt's neurons does to other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, NotFiniteError
from nemo_bench.methods.base import Method
from nemo_bench.methods.nemo import BlockNeurons
from nemo_bench.types import Localization, Neurons, Prompt, digest


class OtherNeurons(BlockNeurons):
    """Blocks for each prompt what the source found for another, memorized prompt, drawn by the ids of the two.

    So looks a model to all others that was edited for one memorized prompt. The memorized prompts are those of the run,
    or of the list ``prompts.shared_from``; all prompts, where none is marked as memorized.

    Args:
        source: The method whose neurons are taken.
        factor: What the outputs of blocked neurons are multiplied by.
    """

    title = "Another prompt's neurons"
    summary = "what another method found for one memorized prompt, for other prompts: what the edit costs those"
    sourcing = "a control"
    pools = True

    def __init__(self, source: Method, factor: float = 0.0) -> None:
        super().__init__(factor)
        self.source = source
        self.title = f"{source.title}, edit for another prompt"
        self._memorized: list[str] = []
        self._edits: dict[str, Neurons] = {}

    def fit(self, found: Mapping[str, Localization], widths: Mapping[str, int], prompts: Sequence[Prompt] = ()) -> None:
        """See :meth:`Method.fit`."""
        super().fit(found, widths, prompts)
        self._memorized = [prompt.id for prompt in prompts if prompt.kind] or [*found]
        self._edits = {name: found[name].neurons for name in self._memorized if name in found}

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        """See :meth:`Method.localize`.

        Raises:
            ConfigError: There is no other memorized prompt.
            NotFiniteError: The source failed for all others.
        """
        others = [name for name in self._edits if name != prompt.id]
        if not others:
            if any(name != prompt.id for name in self._memorized):
                raise NotFiniteError("there are no edits for other prompts: what finds them failed for all")
            msg = "another prompt's neurons need another memorized prompt: give a list with two, or prompts.shared_from"
            raise ConfigError(msg)
        found = self.found.get(prompt.id, Localization())
        drawn = min(others, key=lambda name: digest([prompt.id, name]))
        return Localization(self._edits[drawn], gate_score=found.gate_score, threshold=found.threshold)
