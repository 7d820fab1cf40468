"""Detectors over memorized and other prompts: what ``nemo-bench detect`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_bench.benchmark.plan import check_scheduler, read_listed, similarity_of, source_of
from nemo_bench.benchmark.runner import Runner, is_main, mostly_failed, note_start, open_folder
from nemo_bench.benchmark.stages.detect import STAGE, DetectionCell, DetectionData, DetectionStage
from nemo_bench.config import CellConfig, build
from nemo_bench.detectors import Detector, NoiseDifference
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.metrics import detection
from nemo_bench.prompts import prompts_digest
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest, write_json
from nemo_bench.records.store import SCHEMA, Store
from nemo_bench.report import write_report
from nemo_bench.report.detection import write_detection


def plan(configs: Sequence[CellConfig]) -> list[DetectionCell]:
    """Makes the cells that were asked for.

    Args:
        configs: From :func:`nemo_bench.config.detector_grid`.

    Returns:
        Cells in the same order; their prompts are read, models and detectors checked to go together, no weights are
        loaded and nothing written.

    Raises:
        NemoBenchError: Prompts or a model are not as they should be, or a detector is not made for the model.
    """
    for key in ("name", "root", "trainer"):
        if any(getattr(c.settings, key) != getattr(configs[0].settings, key) for c in configs):
            raise ConfigError(f"{key} must be the same for all detectors of a run; give one value, or run twice")
    cells: dict[str, DetectionCell] = {}
    prompts: dict[str, list[Prompt]] = {}
    for config in configs:
        key = digest(asdict(config.settings.prompts))
        if key not in prompts:
            prompts[key] = read_listed(config.settings.prompts)
        cell = _cell(config, prompts[key])
        cells.setdefault(cell.id, cell)
    return list(cells.values())


def _cell(config: CellConfig, prompts: list[Prompt]) -> DetectionCell:
    settings = config.settings
    model = settings.model
    detector: Detector = build(settings.detector, "detector")
    source = source_of(model)
    source.check()
    detector.check(source.family.pipeline_class, model.guidance, compiled=model.compiled)
    check_scheduler(source, model, predicts=True)
    if isinstance(detector, NoiseDifference) and (size := source.latent_size):
        similarity_of(model).check(size, detector.protocol.similarity)
    if detector.steps is not None and detector.steps > model.steps:
        msg = f"{detector.title} is to watch {detector.steps} steps, and this model makes model.steps={model.steps}"
        raise ConfigError(f"{msg}; give detector.steps at most that, or null for all")
    identity = {
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
    names = {group: config.names.get(group, group) for group in ("model", "detector", "prompts")}
    folder = "__".join([*names.values(), digest(identity, 8)])
    spec = {
        "cell": folder,
        **names,
        "title": detector.title,
        "settings": identity,
        "families": [str(found) for found in config.families],
        "digests": {"model": identity["model"]["weights"], "prompts": identity["prompts"]},
        "citations": {detector.title: detector.citation} if detector.citation else {},
    }
    store = Store(Path(settings.root) / settings.name / folder)
    return DetectionCell(config=config, detector=detector, prompts=prompts, spec=spec, store=store)


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
    settings = cells[0].config.settings
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


def is_pending(cells: Sequence[DetectionCell]) -> bool:
    """Whether anything is left to be scored."""
    return any(cell.store.pending_ids(STAGE, [task.id for task in cell.tasks]) for cell in cells)
