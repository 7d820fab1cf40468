"""Neurons of each prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from typing_extensions import override

from nemo_bench.benchmark.stages.base import Stage
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import Method
from nemo_bench.prompts.tasks import Task, seeds_of
from nemo_bench.records.schema import Cost, LocalizationRecord
from nemo_bench.records.store import Store


class LocalizationStage(Stage[LocalizationRecord]):
    """Localizes the neurons of each prompt; a prompt whose activations are not finite fails.

    Args:
        model: The model.
        method: Gives the mitigation, set up; the first call counts to the first prompt.
        seeds: Seeds a prompt.
        store: Where records go.
    """

    def __init__(self, model: Diffusion, method: Callable[[], Method], seeds: int, store: Store) -> None:
        super().__init__(store, LocalizationRecord)
        self.model = model
        self.method = method
        self.seeds = seeds

    @override
    def handle(self, tasks: Sequence[Task]) -> list[LocalizationRecord]:
        return [self._localize(task) for task in tasks]

    def _localize(self, task: Task) -> LocalizationRecord:
        start = time.perf_counter()
        before = self.model.row_passes
        try:
            method = self.method()
            seeds = seeds_of(task.prompt, "localize", range(self.seeds))
            found = method.localize(self.model, task.prompt, method.noise_protocol.latents(self.model, seeds))
        except NotFiniteError as error:
            cost = Cost(row_passes=self.model.row_passes - before)
            return LocalizationRecord(id=task.id, prompt=task.prompt.id, failed=str(error), cost=cost)
        passes = self.model.row_passes - before
        return LocalizationRecord(
            id=task.id,
            prompt=task.prompt.id,
            neurons=_lists(found.neurons),
            initial=_lists(found.initial),
            gate_score=found.gate_score,
            initial_score=found.initial_score,
            refined_score=found.refined_score,
            threshold=found.threshold,
            passed_gate=found.passed_gate,
            exhausted=found.exhausted,
            listed=_lists(found.listed),
            listed_initial=_lists(found.listed_initial),
            cost=Cost(row_passes=passes, once_row_passes=passes, once_seconds=round(time.perf_counter() - start, 4)),
        )


def _lists(layers: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {layer: list(ids) for layer, ids in layers.items()}
