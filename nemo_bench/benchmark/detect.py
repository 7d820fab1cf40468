"""Detectors over memorized and other prompts: what ``nemo-bench detect`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import lightning as L
from torch.utils.data import DataLoader

from nemo_bench.benchmark.plan import check_scheduler, read_listed, similarity_of, source_of
from nemo_bench.config import Choice, build
from nemo_bench.detectors import Detector, NoiseDifference, watch
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.metrics import detection
from nemo_bench.benchmark.stages import file_name, to_image
from nemo_bench.prompts import PromptTask, prompts_digest
from nemo_bench.report import write_report
from nemo_bench.report.detection import write_detection
from nemo_bench.benchmark.runner import Runner, is_main, mostly_failed, note_start, open_folder
from nemo_bench.records.store import SCHEMA, Store, write_json
from nemo_bench.records.data import Prompt, Record, digest

STAGE = "detect"


@dataclass(eq=False, kw_only=True)
class DetectionCell:
    """A model, a detector and prompts; owner of one results folder.

    Attributes:
        choice: Names and settings.
        detector: The detector.
        prompts: All prompts.
        spec: What decides the result, as written to ``spec.json``.
        store: Its folder.
    """

    choice: Choice
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
        return [PromptTask.of(p) for p in self.prompts]


def plan(choices: Sequence[Choice]) -> list[DetectionCell]:
    """Makes the cells that were asked for.

    Args:
        choices: From :func:`nemo_bench.config.detector_grid`.

    Returns:
        Cells in the same order; their prompts are read, models and detectors checked to go together, no weights are
        loaded and nothing written.

    Raises:
        NemoBenchError: Prompts or a model are not as they should be, or a detector is not made for the model.
    """
    for key in ("name", "root", "trainer"):
        if any(getattr(c.settings, key) != getattr(choices[0].settings, key) for c in choices):
            raise ConfigError(f"{key} must be the same for all detectors of a run; give one value, or run twice")
    cells: dict[str, DetectionCell] = {}
    prompts: dict[str, list[Prompt]] = {}
    for choice in choices:
        key = digest(asdict(choice.settings.prompts))
        if key not in prompts:
            prompts[key] = read_listed(choice.settings.prompts)
        cell = _cell(choice, prompts[key])
        cells.setdefault(cell.id, cell)
    return list(cells.values())


def _cell(choice: Choice, prompts: list[Prompt]) -> DetectionCell:
    settings = choice.settings
    model = settings.model
    detector: Detector = build(settings.detector, "detector")
    source = source_of(model)
    source.check()
    detector.check(source.family.pipeline.__name__, model.guidance, compiled=model.compiled)
    check_scheduler(source, model, predicts=True)
    if isinstance(detector, NoiseDifference) and (size := source.latent_size):
        similarity_of(model).check(size, detector.protocol.similarity)
    if detector.steps is not None and detector.steps > model.steps:
        msg = f"{detector.title} is to watch {detector.steps} steps, and this model makes model.steps={model.steps}"
        raise ConfigError(f"{msg}; give detector.steps at most that, or null for all")
    decisive = {
        "model": {
            "weights": source.digest(),
            "dtype": model.dtype,
            "similarity": asdict(model.similarity),
            "steps": model.steps,
            "guidance": model.guidance,
        },
        "detector": settings.detector,
        "prompts": prompts_digest(prompts),
    }
    names = {group: choice.names.get(group, group) for group in ("model", "detector", "prompts")}
    folder = "__".join([*names.values(), digest(decisive, 8)])
    spec = {
        "cell": folder,
        **names,
        "title": detector.title,
        "settings": decisive,
        "families": [str(found) for found in choice.families],
        "digests": {"model": decisive["model"]["weights"], "prompts": decisive["prompts"]},
        "citations": {detector.title: detector.citation} if detector.citation else {},
    }
    store = Store(Path(settings.root) / settings.name / folder)
    return DetectionCell(choice=choice, detector=detector, prompts=prompts, spec=spec, store=store)


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
        todo = trainer.strategy.broadcast(open_tasks(self.cells) if trainer.is_global_zero else [])
        self.open = todo[trainer.global_rank :: trainer.world_size]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches as plain lists of tasks."""
        return DataLoader(self.open, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]


def open_tasks(cells: Sequence[DetectionCell]) -> list[DetectionTask]:
    """Prompts that some of the cells have no record of, or whose picture is gone."""
    ids = [task.id for task in cells[0].tasks]
    still = {cell.id: set(cell.store.open_ids(STAGE, ids)) for cell in cells}
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
            cell.detector.fits(model)
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


def detect(cells: Sequence[DetectionCell], command: str, *, progress: bool = True) -> Path:
    """Runs what is open of some cells, to table and ROC plots.

    Cells of one model and the same prompts share their passes.

    Args:
        cells: From :func:`plan`.
        command: What the user typed, for the records.
        progress: Whether bars are shown.

    Returns:
        The folder of the run, with ``detection.{html,md,json}`` of all detectors that it holds.

    Raises:
        NemoBenchError: See :func:`plan`; also where a results folder belongs to something else.
    """
    settings = cells[0].choice.settings
    folder = Path(settings.root) / settings.name
    runner = Runner(settings.trainer, progress=progress)
    runner.start()
    if is_main():
        open_folder(folder, [])
        for cell in cells:
            cell.store.open(cell.spec)
            note_start(cell, command, runner)
            cell.store.recount(STAGE, [task.id for task in cell.tasks])
    runner.trainer.strategy.barrier()
    groups: dict[str, list[DetectionCell]] = {}
    for cell in cells:
        groups.setdefault(digest([cell.spec["settings"][key] for key in ("model", "prompts")]), []).append(cell)
    for group in groups.values():
        _detect(runner, [cell for cell in group if not cell.store.is_done(STAGE)])
    if is_main():
        for cell in cells:
            write_json(cell.store.folder / "metrics.json", summary(cell))
        write_detection(folder)
        if (folder / "report.html").is_file():
            write_report(folder)  # the pages link to one another
    return folder


def _detect(runner: Runner, cells: Sequence[DetectionCell]) -> None:
    if not cells:
        return
    sampling = [cell.detector.seeds for cell in cells if cell.detector.samples]
    seeds = max(sampling or [cell.detector.seeds for cell in cells])
    runner.describe(STAGE, cells[0].spec["model"])
    rows = runner.rows(cells[0])
    stage = DetectionStage(runner.model(cells[0]), cells, rows)
    runner.predict(stage, DetectionData(cells, max(1, rows // seeds)))
    if is_main():
        for cell in cells:
            cell.store.finish(STAGE, [task.id for task in cell.tasks])
    runner.trainer.strategy.barrier()


def summary(cell: DetectionCell) -> dict[str, Any]:
    """What a cell found, as written to ``metrics.json``: how well scores tell prompts apart, and what they took.

    Prompts whose score is not finite are counted as ``failed``, and left out of everything else.
    """
    found = {record["prompt"]: record for record in cell.store.records(STAGE).values()}
    scored = [(p, found[p.id]["score"]) for p in cell.prompts if "score" in found[p.id]]
    memorized, other = ([score for p, score in scored if bool(p.kind) == is_so] for is_so in (True, False))
    measured = {}
    if memorized and other:
        scores = {kind: [score for p, score in scored if p.kind == kind] for kind in ("VM", "TM")}
        kinds = {kind: detection(those, other)["auc"] for kind, those in scores.items() if those}
        measured[cell.spec["detector"]] = {"title": cell.detector.title, **detection(memorized, other), "kinds": kinds}
    costs = [record["cost"] for record in found.values()]
    return {
        "schema": SCHEMA,
        "detection": measured,
        "counts": {"prompts": len(cell.prompts), "failed": len(found) - len(scored), "seeds": cell.detector.seeds},
        "cost": {f"detect_{key}_per_prompt": round(fmean(c[key] for c in costs), 4) for key in costs[0]},
    }


def check_scored(cells: Sequence[DetectionCell]) -> None:
    """Looks whether detectors could tell of most prompts, once everything else is done and written.

    Raises:
        ModelError: More than half of the scores of a detector are not finite; the reasons are named.
    """
    if lines := mostly_failed([cell.store for cell in cells], STAGE, "prompts"):
        raise ModelError("\n".join([*lines, "half precision may overflow: try model.dtype=float32 or bfloat16"]))


def is_open(cells: Sequence[DetectionCell]) -> bool:
    """Whether anything is left to be scored."""
    return any(cell.store.open_ids(STAGE, [task.id for task in cell.tasks]) for cell in cells)
