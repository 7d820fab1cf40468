"""Random neurons: a control that blocks as many neurons as another method found, but other ones."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods.base import Method
from nemo_bench.methods.nemo import BlockNeurons
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.io import digest


class RandomNeurons(BlockNeurons):
    """Blocks as many neurons per layer as the source found, drawn from those it did not find.

    Where a layer has too few others, the rest is drawn from the other layers.

    Args:
        source: The method whose counts are matched.
        seed: Decides the draw.
        per_prompt: Whether each prompt has a draw of its own; if not, prompts of equal counts get the same neurons.
        factor: What the outputs of blocked neurons are multiplied by.
    """

    title = "Random neurons"
    summary = "as many neurons as another method blocks, elsewhere (control)"
    sourcing = "a control"

    source: Method

    def __init__(self, source: Method, seed: int = 0, per_prompt: bool = True, factor: float = 0.0) -> None:
        super().__init__(factor)
        self.source, self.seed, self.per_prompt = source, seed, per_prompt

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        """See :meth:`Method.localize`.

        Raises:
            NotFiniteError: The source was not fitted on the prompt, or failed for it.
        """
        if prompt.id not in self.found:
            raise NotFiniteError(f"{self.source.title} found no number of neurons for prompt '{prompt.id}' to match")
        found = self.found[prompt.id]
        rng = np.random.default_rng(int(digest([self.seed, *([prompt.id] if self.per_prompt else [])]), 16))
        free = {
            layer: rng.permutation(sorted(set(range(width)) - set(found.neurons.get(layer, ()))))
            for layer, width in model.masks.widths.items()
        }
        drawn = {layer: free[layer][: len(ids)] for layer, ids in found.neurons.items()}
        missing = found.neurons.count - sum(map(len, drawn.values()))
        rest = [(layer, i) for layer, ids in free.items() for i in ids[len(drawn.get(layer, ())) :]]
        picks = rng.choice(len(rest), min(missing, len(rest)), replace=False)
        neurons = Neurons({layer: ids.tolist() for layer, ids in drawn.items()})
        for layer, index in (rest[p] for p in picks):
            neurons |= Neurons({layer: [index]})
        return Localization(
            neurons,
            gate_score=found.gate_score,
            threshold=found.threshold,
            passed_gate=found.passed_gate,
            exhausted=found.exhausted,
        )
