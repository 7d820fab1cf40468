"""Scores of detectors, several in one pass of sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import lightning as L
from torch.utils.data import DataLoader

from nemo_bench.benchmark.stages.base import file_name, to_image
from nemo_bench.config import CellConfig
from nemo_bench.detectors import Detector, watch
from nemo_bench.diffusion import Diffusion
from nemo_bench.prompts import PromptTask
from nemo_bench.records.data import Prompt, Record
from nemo_bench.records.store import Store

STAGE = "detect"


@dataclass(eq=False, kw_only=True)
class DetectionCell:
    """A model, a detector and prompts; owner of one results folder.

    Attributes:
        config: Names and settings.
        detector: The detector.
        prompts: All prompts.
        spec: What decides the result, as written to ``spec.json``.
        store: Its folder.
    """

    config: CellConfig
    detector: Detector
    prompts: list[Prompt]
    spec: dict[str, Any]
    store: Store

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.store.folder.name

    @property
    def tasks(self) -> list[PromptTask]:
        """All prompts."""
        return [PromptTask.from_prompt(p) for p in self.prompts]


class DetectionTask(NamedTuple):
    """A prompt and the cells whose detectors have not scored it.

    Attributes:
        task: The prompt.
        cells: Ids of the cells.
    """

    task: PromptTask
    cells: tuple[str, ...]


class DetectionData(L.LightningDataModule):
    """Gives every process its part of the prompts that some detector has not scored.

    As in :class:`nemo_bench.prompts.PromptDataModule` rank 0 alone reads what is done.

    Args:
        cells: Cells of one model and the same prompts.
        batch_size: Prompts in a batch.
    """

    def __init__(self, cells: Sequence[DetectionCell], batch_size: int) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.cells, self.batch_size = cells, batch_size
        self.open: list[DetectionTask] = []

    def setup(self, stage: str) -> None:
        """Shares out the open prompts: rank r of w takes every w-th, beginning with the r-th."""
        trainer = self.trainer
        assert trainer is not None
        todo = trainer.strategy.broadcast(pending_tasks(self.cells) if trainer.is_global_zero else [])
        self.open = todo[trainer.global_rank :: trainer.world_size]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches as plain lists of tasks."""
        return DataLoader(self.open, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]


def pending_tasks(cells: Sequence[DetectionCell]) -> list[DetectionTask]:
    """Prompts that some of the cells have no record of, or whose picture is gone."""
    ids = [task.id for task in cells[0].tasks]
    still = {cell.id: set(cell.store.pending_ids(STAGE, ids)) for cell in cells}
    tasks = [DetectionTask(t, tuple(name for name, todo in still.items() if t.id in todo)) for t in cells[0].tasks]
    return [task for task in tasks if task.cells]


class DetectionStage(L.LightningModule):
    """Has several detectors watch one pass of sampling; each batch ends with their records on disk.

    Args:
        model: The model.
        cells: Cells of that model and the same prompts.
        batch_size: Images in a UNet pass at most.
    """

    def __init__(self, model: Diffusion, cells: Sequence[DetectionCell], batch_size: int) -> None:
        super().__init__()
        for cell in cells:
            cell.detector.check_model(model)
        self.model, self.batch_size = model, batch_size
        self.cells = {cell.id: cell for cell in cells}
        self.writers = {cell.id: cell.store.writer(STAGE) for cell in cells}

    def predict_step(self, tasks: list[DetectionTask], batch_idx: int) -> None:
        """Scores the prompts of one batch and writes their records."""
        for names, group in groupby(tasks, lambda task: task.cells):
            self._handle([task.task for task in group], {name: self.cells[name].detector for name in names})

    def _handle(self, tasks: Sequence[PromptTask], detectors: Mapping[str, Detector]) -> None:
        findings, costs = watch(self.model, detectors, [task.prompt for task in tasks], self.batch_size)
        for name, found in findings.items():
            store, cost, records = self.cells[name].store, costs[name], []
            for task, finding in zip(tasks, found, strict=True):
                result = {"failed": finding.failed} if finding.failed else {"score": finding.score}
                record: Record = {"id": task.id, "prompt": task.prompt.id, **result}
                if finding.details:
                    record["details"] = dict(finding.details)
                if finding.picture is not None:
                    picture = to_image(finding.picture)
                    record["image"] = store.save_image(f"images/{file_name(task.prompt)}.png", picture)
                record["cost"] = {
                    "row_passes": cost.row_passes / len(tasks),
                    "extra_row_passes": cost.extra_row_passes / len(tasks),
                    "seconds": round(cost.seconds / len(tasks), 4),
                }
                records.append(record)
            self.writers[name](records)
