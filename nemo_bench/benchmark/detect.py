"""Detectors over memorized and other prompts: what ``nemo-bench detect`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean

from nemo_bench.benchmark.pending import task_ids, write_pages
from nemo_bench.benchmark.plan import (
    Cell,
    check_same,
    check_scheduler,
    family_settings,
    make_spec,
    read_listed,
    similarity_of,
    source_of,
)
from nemo_bench.benchmark.processes import is_main
from nemo_bench.benchmark.run import log_file
from nemo_bench.benchmark.runner import Runner, note_start, open_folder
from nemo_bench.benchmark.stages.detect import detection_stage, pending_tasks
from nemo_bench.config import CellConfig, build
from nemo_bench.detectors import Detector, NoiseDifference
from nemo_bench.errors import ConfigError, StoreError
from nemo_bench.metrics import detection
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched, digest, prompts_digest, write_json
from nemo_bench.records.results import load_detections
from nemo_bench.records.schema import DetectionRecord, Roc, Summary
from nemo_bench.records.store import Store
from nemo_bench.report.detection import write_detection
from nemo_bench.tracking.live import Live


def plan(configs: Sequence[CellConfig]) -> list[Cell]:
    """Makes the cells of :func:`nemo_bench.config.detector_grid`, in its order; no weights are loaded, nothing written.

    Variants are left out: whether they are memorized is not known.

    Raises:
        NemoBenchError: Prompts or a model are not as they should be, or a detector is not made for the model.
    """
    check_same(configs, "name", "root", "trainer", "logger")
    cells: dict[str, Cell] = {}
    prompts: dict[str, list[Prompt]] = {}
    for config in configs:
        key = digest(asdict(config.settings.prompts))
        if key not in prompts:
            prompts[key] = [prompt for prompt in read_listed(config.settings.prompts) if not prompt.axis]
        cell = _cell(config, prompts[key])
        cells.setdefault(cell.id, cell)
    return list(cells.values())


def _cell(config: CellConfig, prompts: list[Prompt]) -> Cell:
    settings = config.settings
    model = settings.model
    detector: Detector = build(settings.detector, "detector")
    source = source_of(model)
    source.check()
    source.family.chosen(model.layers)
    detector.check(source.family.pipeline_class, model.guidance, compiled=model.compiled)
    check_scheduler(source, model, predicts=True)
    if isinstance(detector, NoiseDifference) and (size := source.latent_size):
        similarity_of(model).check(size, detector.noise_protocol.similarity)
    if detector.steps is not None and detector.steps > model.steps:
        msg = f"{detector.title} is to watch {detector.steps} steps, and this model makes model.steps={model.steps}"
        raise ConfigError(f"{msg}; give detector.steps at most that, or null for all")
    digests = {"model": source.digest(), "prompts": prompts_digest(prompts)}
    network = {
        "weights": digests["model"],
        "dtype": model.dtype,
        "similarity": asdict(model.similarity),
        "steps": model.steps,
        "guidance": model.guidance,
        **family_settings(model),
    }
    identity = {"model": network, "detector": settings.detector, "prompts": digests["prompts"]}
    citations = {detector.title: detector.citation}
    spec = make_spec(
        config,
        "detect",
        [DetectionRecord],
        identity,
        citations,
        measures=source.family.measures,
        title=detector.title,
        digests=digests,
    )
    store = Store(Path(settings.root) / settings.name / spec.cell)
    return Cell(config=config, detector=detector, prompts=prompts, spec=spec, store=store)


def detect(cells: Sequence[Cell], command: str, *, progress: bool = True) -> Path:
    """Runs what is pending of some cells, to ``detection.{html,md,json}`` of all detectors in the folder of the run.

    Cells of one model and the same prompts share their passes. ``command`` is what the user typed, for the records.

    Raises:
        NemoBenchError: See :func:`plan`; also where a results folder belongs to something else.
    """
    settings = cells[0].config.settings
    folder = Path(settings.root) / settings.name
    live = Live(settings.logger, {cell.id: str(cell.spec.detector) for cell in cells})
    runner = Runner(settings.trainer, progress=progress)
    runner.progress.listeners.append(live.note)
    runner.start()
    if is_main():
        with runner.leases.owning(folder):
            open_folder(folder, [])
    with log_file(folder):
        if is_main():
            for cell in cells:
                cell.store.open(cell.spec)
        with live, runner.holding(*(cell.store.folder for cell in cells)):
            if is_main():
                for cell in cells:
                    note_start(cell, command, runner)
                    cell.store.recount(DetectionRecord, task_ids(cell, DetectionRecord))
            groups: dict[str, list[Cell]] = {}
            for cell in cells:
                if runner.agree(partial(cell.store.is_done, DetectionRecord)):
                    _write_summaries([cell])
                else:
                    key = digest([cell.spec.settings[name] for name in ("model", "prompts")])
                    groups.setdefault(key, []).append(cell)
            for group in groups.values():
                if is_main():
                    live.begin(*(cell.store.folder for cell in group))
                _detect(runner, group)
                _write_summaries(group)
                live.end()
        if is_main():
            with runner.leases.owning(folder):
                write_detection(load_detections(folder))
                if (folder / "report.html").is_file():
                    write_pages(folder)
    return folder


def _write_summaries(cells: Sequence[Cell]) -> None:
    if is_main():
        for cell in cells:
            write_json(cell.store.folder / "metrics.json", summarize(cell))


def _detect(runner: Runner, cells: Sequence[Cell]) -> None:
    detectors = [cell.detector for cell in cells if cell.detector is not None]
    sampling = [detector.seeds for detector in detectors if detector.samples]
    seeds = max(sampling or [detector.seeds for detector in detectors])
    rows = runner.rows(cells[0])
    stage = detection_stage(runner.model(cells[0]), cells, rows)
    tasks = runner.agree(partial(pending_tasks, cells))
    batches = list(batched(tasks, max(1, rows // seeds)))
    runner.predict(stage, batches, cells[0].spec.model, len(cells[0].prompts) - len(tasks))
    if is_main():
        for cell in cells:
            cell.store.finish(DetectionRecord, task_ids(cell, DetectionRecord))
    runner.wait()


def summarize(cell: Cell) -> Summary:
    """The numbers of a cell: how well scores tell prompts apart, and what they took.

    Prompts whose score is not finite are counted as ``failed``, and left out of everything else.
    """
    records = {record.prompt: record for record in cell.store.records(DetectionRecord).values()}
    scored = [(p.kind, score) for p in cell.prompts if (score := records[p.id].score) is not None]
    memorized = [score for kind, score in scored if kind]
    other = [score for kind, score in scored if not kind]
    measured = {}
    if memorized and other:
        by_kind = {kind: [score for own, score in scored if own == kind] for kind in ("VM", "TM")}
        kinds = {kind: detection(scores, other)["auc"] for kind, scores in by_kind.items() if scores}
        roc = Roc(title=cell.spec.title, kinds=kinds, **detection(memorized, other))
        measured[str(cell.spec.detector)] = roc
    costs = [record.cost for record in records.values() if record.cost]
    seeds = cell.detector.seeds if cell.detector is not None else 0
    return Summary(
        detection=measured,
        counts={"prompts": len(cell.prompts), "failed": len(records) - len(scored), "seeds": seeds},
        cost={
            f"detect_{key}_per_prompt": round(fmean(getattr(cost, key) for cost in costs), 4)
            for key in ("row_passes", "extra_row_passes", "seconds")
        },
    )


def is_pending(cells: Sequence[Cell]) -> bool:
    """Whether anything is left to be scored, or damaged."""
    try:
        return any(cell.store.pending_ids(DetectionRecord, task_ids(cell, DetectionRecord)) for cell in cells)
    except StoreError:
        return True
