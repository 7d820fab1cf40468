"""Scores of detectors, several in one pass of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from nemo_bench.benchmark.plan import Cell
from nemo_bench.benchmark.stages.base import Stage, file_name, save_tensors, to_image
from nemo_bench.detectors import DetectorScore, watch
from nemo_bench.diffusion import Diffusion
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.schema import Cost, DetectionRecord
from nemo_bench.records.store import Store


def pending_tasks(cells: Sequence[Cell]) -> list[tuple[Task, tuple[str, ...]]]:
    """Prompts whose record or picture some of the cells lack, with those cells; the cells have the same prompts."""
    tasks = [Task.of_prompt(prompt) for prompt in cells[0].prompts]
    ids = [task.id for task in tasks]
    pending = {cell.id: set(cell.store.pending_ids(DetectionRecord, ids)) for cell in cells}
    found = [(task, tuple(name for name, todo in pending.items() if task.id in todo)) for task in tasks]
    return [(task, names) for task, names in found if names]


def detection_stage(model: Diffusion, cells: Sequence[Cell], batch_size: int) -> Stage:
    """The stage in which the detectors of cells of one model and the same prompts watch one pass of sampling.

    Raises:
        NemoBenchError: A detector is not made for the model.
    """
    for cell in cells:
        assert cell.detector is not None
        cell.detector.check_model(model)
    by_id = {cell.id: cell for cell in cells}
    writers = {cell.id: cell.store.writer(DetectionRecord) for cell in cells}

    def handle(stage: Stage, tasks: Sequence[tuple[Task, tuple[str, ...]]]) -> list[DetectionRecord]:
        found: dict[str, list[DetectionRecord]] = {}
        for names, group in groupby(tasks, lambda task: task[1]):
            prompts = [task for task, _ in group]
            detectors: dict[str, Any] = {name: by_id[name].detector for name in names}
            scores, costs = watch(model, detectors, [task.prompt for task in prompts], stage.batch_size)
            for name, of_detector in scores.items():
                cost = Cost(
                    row_passes=costs[name].row_passes / len(prompts),
                    extra_row_passes=costs[name].extra_row_passes / len(prompts),
                    seconds=round(costs[name].seconds / len(prompts), 4),
                )
                pairs = zip(prompts, of_detector, strict=True)
                records = [_record(by_id[name].store, task, score, cost) for task, score in pairs]
                found.setdefault(name, []).extend(records)
        for name, records in found.items():
            writers[name](records)
        return [record for records in found.values() for record in records]

    return Stage(handle, DetectionRecord, None, model=model, batch_size=batch_size)


def _record(store: Store, task: Task, result: DetectorScore, cost: Cost) -> DetectionRecord:
    image = None
    if result.picture is not None:
        image = store.save_image(f"images/{file_name(task.prompt)}.png", to_image(result.picture))
    file = None
    if result.tensors:
        file = f"tensors/{file_name(task.prompt)}.safetensors"
        save_tensors(store.folder / file, result.tensors)
    return DetectionRecord(
        id=task.id,
        prompt=task.prompt.id,
        score=None if result.failed else result.score,
        failed=result.failed or None,
        details=dict(result.details) or None,
        image=image,
        file=file,
        cost=cost,
    )
