"""Scores of detectors, several in one pass of sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import lightning as L
from typing_extensions import override

from nemo_bench.benchmark.plan import Cell
from nemo_bench.benchmark.stages.base import file_name, to_image
from nemo_bench.detectors import Detector, DetectorScore, watch
from nemo_bench.diffusion import Diffusion
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.schema import Cost, DetectionRecord
from nemo_bench.records.store import Store


class DetectionTask(NamedTuple):
    """A prompt and the cells whose detectors have not scored it.

    Attributes:
        task: The prompt.
        cells: Ids of the cells.
    """

    task: Task
    cells: tuple[str, ...]


def pending_tasks(cells: Sequence[Cell]) -> list[DetectionTask]:
    """Prompts that some of the cells have no record of, or whose picture is gone; the cells have the same prompts."""
    tasks = [Task.of_prompt(prompt) for prompt in cells[0].prompts]
    ids = [task.id for task in tasks]
    pending = {cell.id: set(cell.store.pending_ids(DetectionRecord, ids)) for cell in cells}
    found = [DetectionTask(t, tuple(name for name, todo in pending.items() if t.id in todo)) for t in tasks]
    return [task for task in found if task.cells]


class DetectionStage(L.LightningModule):
    """Has several detectors watch one pass of sampling; each batch ends with their records on disk.

    Args:
        model: The model.
        cells: Cells of that model and the same prompts.
        batch_size: Images in a UNet pass at most.
    """

    def __init__(self, model: Diffusion, cells: Sequence[Cell], batch_size: int) -> None:
        super().__init__()
        self.model = model
        self.batch_size = batch_size
        self.cells = {cell.id: cell for cell in cells}
        self.detectors: dict[str, Detector] = {cell.id: cell.detector for cell in cells if cell.detector is not None}
        for detector in self.detectors.values():
            detector.check_model(model)
        self.writers = {cell.id: cell.store.writer(DetectionRecord) for cell in cells}

    @override
    def predict_step(self, tasks: list[DetectionTask], batch_idx: int) -> None:
        for names, group in groupby(tasks, lambda task: task.cells):
            self._handle([task.task for task in group], {name: self.detectors[name] for name in names})

    def _handle(self, tasks: Sequence[Task], detectors: Mapping[str, Detector]) -> None:
        scores, costs = watch(self.model, detectors, [task.prompt for task in tasks], self.batch_size)
        for name, of_detector in scores.items():
            cost = Cost(
                row_passes=costs[name].row_passes / len(tasks),
                extra_row_passes=costs[name].extra_row_passes / len(tasks),
                seconds=round(costs[name].seconds / len(tasks), 4),
            )
            store = self.cells[name].store
            pairs = zip(tasks, of_detector, strict=True)
            self.writers[name]([_record(store, task, score, cost) for task, score in pairs])


def _record(store: Store, task: Task, result: DetectorScore, cost: Cost) -> DetectionRecord:
    image = None
    if result.picture is not None:
        image = store.save_image(f"images/{file_name(task.prompt)}.png", to_image(result.picture))
    return DetectionRecord(
        id=task.id,
        prompt=task.prompt.id,
        score=None if result.failed else result.score,
        failed=result.failed or None,
        details=dict(result.details) or None,
        image=image,
        cost=cost,
    )
