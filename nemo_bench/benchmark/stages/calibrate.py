"""Activation statistics and similarities of noise differences of general prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_bench.benchmark.stages.base import Chunk, Stage
from nemo_bench.localization import ENCODED, PAPER, Protocol, activation_moments, pair_scores, save_moments
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.io import batched
from nemo_bench.records.schema import CalibrationRecord, ChunkRecord, Cost


def measure_statistics(stage: Stage, tasks: Sequence[Chunk]) -> list[ChunkRecord]:
    """Moments of the activations of general prompts, from which mean and standard deviation come."""
    records = []
    for chunk in tasks:
        file = f"statistics/{chunk.id}.safetensors"
        path = stage.store.folder / file
        path.parent.mkdir(exist_ok=True)
        save_moments(path, activation_moments(stage.model, batched(chunk.items, ENCODED)))
        records.append(ChunkRecord(id=chunk.id, file=file, count=len(chunk.items)))
    return records


def measure_pairs(
    stage: Stage, tasks: Sequence[Task], seeds: int, protocol: Protocol = PAPER
) -> list[CalibrationRecord]:
    """Similarity of noise differences of all pairs of seeds of general prompts, from which the threshold comes."""
    before = stage.model.row_passes
    scores = pair_scores(stage.model, [t.prompt for t in tasks], seeds, protocol, stage.batch_size)
    cost = Cost(row_passes=(stage.model.row_passes - before) // len(tasks))
    records = []
    for task, pairs in zip(tasks, scores, strict=True):
        is_finite = all(map(math.isfinite, pairs))
        result = {"pairs": list(pairs)} if is_finite else {"failed": "noise differences are not finite"}
        records.append(CalibrationRecord(id=task.id, prompt=task.prompt.id, cost=cost, **result))
    return records
