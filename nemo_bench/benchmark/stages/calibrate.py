"""Activation statistics and similarities of noise differences of general prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from typing_extensions import override

from nemo_bench.benchmark.stages.base import Chunk, Stage
from nemo_bench.diffusion import Diffusion
from nemo_bench.localization import ENCODED, PAPER, Protocol, activation_moments, pair_scores, save_moments
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.io import batched
from nemo_bench.records.schema import CalibrationRecord, Cost, StatisticsRecord
from nemo_bench.records.store import Store


class StatisticsStage(Stage[StatisticsRecord]):
    """Moments of the activations of general prompts, from which mean and standard deviation come.

    Args:
        model: The model.
        store: Where files and records go.
    """

    def __init__(self, model: Diffusion, store: Store) -> None:
        super().__init__(store, StatisticsRecord)
        self.model = model

    @override
    def handle(self, tasks: Sequence[Chunk]) -> list[StatisticsRecord]:
        records = []
        for chunk in tasks:
            file = f"statistics/{chunk.id}.safetensors"
            path = self.store.folder / file
            path.parent.mkdir(exist_ok=True)
            save_moments(path, activation_moments(self.model, batched(chunk.items, ENCODED)))
            records.append(StatisticsRecord(id=chunk.id, file=file, count=len(chunk.items)))
        return records


class CalibrationStage(Stage[CalibrationRecord]):
    """Pairwise similarity of noise differences of general prompts, from which the threshold comes.

    Args:
        model: The model.
        seeds: Seeds a prompt.
        store: Where records go.
        protocol: How noise differences are taken.
        batch_size: Rows in a UNet pass at most.
    """

    def __init__(
        self, model: Diffusion, seeds: int, store: Store, protocol: Protocol = PAPER, batch_size: int = 32
    ) -> None:
        super().__init__(store, CalibrationRecord)
        self.model = model
        self.seeds = seeds
        self.protocol = protocol
        self.batch_size = batch_size

    @override
    def handle(self, tasks: Sequence[Task]) -> list[CalibrationRecord]:
        before = self.model.row_passes
        scores = pair_scores(self.model, [t.prompt for t in tasks], self.seeds, self.protocol, self.batch_size)
        cost = Cost(row_passes=(self.model.row_passes - before) // len(tasks))
        records = []
        for task, pairs in zip(tasks, scores, strict=True):
            is_finite = all(map(math.isfinite, pairs))
            record = CalibrationRecord(
                id=task.id,
                prompt=task.prompt.id,
                pairs=list(pairs) if is_finite else None,
                failed=None if is_finite else "noise differences are not finite",
                cost=cost,
            )
            records.append(record)
        return records
