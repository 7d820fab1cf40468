"""Neurons of each prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence

from nemo_bench.benchmark.stages.base import Stage
from nemo_bench.errors import NotFiniteError
from nemo_bench.prompts.tasks import PromptTask, seeds_of
from nemo_bench.records.schema import Cost, LocalizationRecord


def localize(stage: Stage, tasks: Sequence[PromptTask], seeds: int) -> list[LocalizationRecord]:
    """Localizes the neurons of each prompt; a prompt whose activations are not finite fails."""
    return [_localize(stage, task, seeds) for task in tasks]


def _localize(stage: Stage, task: PromptTask, seeds: int) -> LocalizationRecord:
    start = time.perf_counter()
    model = stage.model
    before = model.row_passes
    try:
        method = stage.method()
        latents = method.protocol.latents(model, seeds_of(task.prompt, "localize", range(seeds)))
        found = method.localize(model, task.prompt, latents)
    except NotFiniteError as error:
        cost = Cost(row_passes=model.row_passes - before)
        return LocalizationRecord(id=task.id, prompt=task.prompt.id, failed=str(error), cost=cost)
    passes = model.row_passes - before
    cost = Cost(row_passes=passes, once_row_passes=passes, once_seconds=round(time.perf_counter() - start, 4))
    result = {name: value for name, value in vars(found).items() if name != "row_passes"}
    return LocalizationRecord(id=task.id, prompt=task.prompt.id, cost=cost, **result)
