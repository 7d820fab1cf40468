"""Neurons of each prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from nemo_bench.benchmark.stages.base import Stage, file_name, save_tensors
from nemo_bench.errors import NotFiniteError
from nemo_bench.prompts.tasks import Task, seeds_of
from nemo_bench.records.schema import Cost, LocalizationRecord


def localize(stage: Stage, tasks: Sequence[Task], seeds: int) -> list[LocalizationRecord]:
    """Localizes the neurons of each prompt; a prompt whose activations are not finite fails."""
    return [_localize(stage, task, seeds) for task in tasks]


def _localize(stage: Stage, task: Task, seeds: int) -> LocalizationRecord:
    start = time.perf_counter()
    model = stage.model
    before = model.row_passes
    try:
        method = stage.method()
        latents = method.noise_protocol.latents(model, seeds_of(task.prompt, "localize", range(seeds)))
        found = method.localize(model, task.prompt, latents)
    except NotFiniteError as error:
        cost = Cost(row_passes=model.row_passes - before)
        return LocalizationRecord(id=task.id, prompt=task.prompt.id, failed=str(error), cost=cost)
    passes = model.row_passes - before
    file = None
    if found.scores:
        file = f"scores/{file_name(task.prompt)}.safetensors"
        tensors = {layer: torch.from_numpy(values) for layer, values in found.scores.items()}
        save_tensors(stage.store.folder / file, tensors)
    return LocalizationRecord(
        id=task.id,
        prompt=task.prompt.id,
        localization=found,
        file=file,
        cost=Cost(row_passes=passes, once_row_passes=passes, once_seconds=round(time.perf_counter() - start, 4)),
    )
