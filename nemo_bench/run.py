"""From cells to results: images, scores, table and report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from nemo_bench.aggregate import aggregate, presets
from nemo_bench.cells import STAGES, STATISTICS, THRESHOLD, Cell, ImageCell, metrics_of, with_sources
from nemo_bench.config import ModelSettings, SimilaritySettings, resolve
from nemo_bench.errors import ConfigError, NemoBenchError, StoreError, nearest
from nemo_bench.localization.published import PublishedRow, by_position, published_text
from nemo_bench.methods import Method
from nemo_bench.metrics import detection
from nemo_bench.modules import localization_of
from nemo_bench.prompts import dead_references, references_digest
from nemo_bench.report import write_report
from nemo_bench.runner import SETS, Runner, by_prompt, is_main, load_model, note_start, open_folder
from nemo_bench.store import SCHEMA, Store, read_json, write_json, write_text
from nemo_bench.tracking import sweep_trial, track
from nemo_bench.types import Neurons, Record


def run(cells: Sequence[Cell], command: str, say: Callable[[str], None] = print, *, progress: bool = True) -> Path:
    """Runs what is open of some cells, to the report.

    Args:
        cells: From :func:`nemo_bench.cells.plan`, of one name and root.
        command: What the user typed, for the records.
        say: Where single lines go.
        progress: Whether bars are shown.

    Returns:
        The folder of the run, with ``report.html`` and the leaderboard.

    Raises:
        NemoBenchError: See :func:`nemo_bench.cells.plan`; also where a results folder belongs to something else.
    """
    settings = cells[0].choice.settings
    folder = Path(settings.root) / settings.name
    if settings.logger.wandb:
        sweep_trial({cell.id: cell.spec["method"] for cell in cells})
    runner = Runner(settings.trainer, progress=progress)
    runner.start()
    if is_main():
        open_folder(folder, cells)
        for cell in with_sources(cells):
            cell.store.open(cell.spec)
            note_start(cell, command, runner)
            _reopen(cell)
        renew_scores(cells)
    runner.trainer.strategy.barrier()
    for cell in cells:
        runner.make(cell)
    if is_main():
        for cell in cells:
            _publish(cell)
    finish(cells, runner, say)
    return folder


def renew_scores(cells: Sequence[ImageCell]) -> None:
    """Downloads what open metrics are to download; forgets scores of other metrics or other reference images."""
    stale = [cell for cell in cells if _scores_are_stale(cell)]
    for cell in cells:
        for metric in metrics_of(cell).values() if cell in stale or not cell.store.is_done("score") else ():
            metric.space.fetch()
    for cell in stale:
        _forget_scores(cell.store)
        write_json(cell.store.folder / "scoring.json", _scoring(cell))


def finish(cells: Sequence[ImageCell], runner: Runner, say: Callable[[str], None] = print) -> None:
    """Scores what is open of cells whose images are there, to the report of their run.

    Args:
        cells: Cells of one run.
        runner: The trainer.
        say: Where single lines go.
    """
    for cell in cells:
        runner.score(cell)
    if is_main():
        folder, logger = cells[0].store.folder.parent, cells[0].choice.settings.logger
        for cell in cells:
            write_json(cell.store.folder / "metrics.json", _summary(cell))
        write_report(folder)
        try:
            track(folder, logger, cells=[cell.id for cell in cells], say=say)
        except NemoBenchError as error:
            say(str(error))


def calibrate(cells: Sequence[Cell], *, progress: bool = True) -> list[dict[str, Any]]:
    """Measures on general prompts what the methods of some cells, or their sources, need; once, then it is cached.

    Args:
        cells: From :func:`nemo_bench.cells.plan`, of one root.
        progress: Whether bars are shown.

    Returns:
        One entry a calibration: model; threshold; mean and standard deviation of the pairwise scores it comes from
        (None where it was given); number of general prompts; file of the statistics; folder of what was measured.

    Raises:
        NemoBenchError: See :func:`nemo_bench.cells.plan`; also where no method takes a calibration.
    """
    needed = [cell for cell in with_sources(cells) if cell.method.needs_calibration]
    if not needed:
        raise ConfigError("none of the methods asked for takes a calibration; name one that does, such as method=nemo")
    if not all(cell.is_calibrated for cell in needed):
        runner = Runner(needed[0].choice.settings.trainer, progress=progress)
        runner.start()
        for cell in needed:
            runner.calibrate(cell)
    rows = [_calibration_of(cell) for cell in needed]
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def _calibration_of(cell: Cell) -> dict[str, Any]:
    folder, given = cell.calibration.folder, cell.choice.settings.model.statistics
    scores = {"threshold": cell.method.threshold, "mean": None, "std": None, "prompts": len(cell.calibration_prompts)}
    return {
        "model": cell.spec["model"],
        **(read_json(folder / THRESHOLD) if cell.method.threshold is None else scores),
        **cell.method.protocol.of_threshold,
        "statistics": resolve(given) if given else str(folder / STATISTICS),
        "folder": str(folder) if cell.measured else None,
    }


def _reopen(cell: Cell) -> None:
    """Opens stages again that were done once and miss something now."""
    store = cell.store
    for stage in STAGES:
        if store.is_done(stage) and store.open_ids(stage, cell.ids(stage)):
            store.reopen(stage)
            _forget_scores(store)


def _forget_scores(store: Store) -> None:
    store.forget("score")
    (store.folder / SETS).unlink(missing_ok=True)


def _scoring(cell: ImageCell) -> dict[str, Any]:
    """What decides the scores of given images."""
    nodes, metrics = cell.choice.settings.metrics, metrics_of(cell)
    paired = cell.unmitigated and any("unmitigated" in metric.needs for metric in metrics.values())
    content = {
        "metrics": {name: {**nodes[name], **metric.content()} for name, metric in metrics.items()},
        "unmitigated": cell.unmitigated.id if cell.unmitigated and paired else None,
        "references": references_digest(cell.prompts),
    }
    return json.loads(json.dumps(content))  # as it will be read again


def _scores_are_stale(cell: ImageCell) -> bool:
    path = cell.store.folder / "scoring.json"
    return not path.exists() or read_json(path) != _scoring(cell)


def _publish(cell: Cell) -> None:
    """Writes what a method found in the published form, beside the records."""
    if type(cell.method).localize is Method.localize:
        return
    widths, found = read_json(cell.store.folder / "layers.json"), by_prompt(cell.store)
    rows = []
    for prompt in cell.prompts:
        result = localization_of(found[prompt.id])
        initial = by_position(result.listed_initial or result.initial, widths)
        refined = by_position(result.listed or result.neurons, widths)
        url = next(iter(prompt.links), "")
        rows.append(PublishedRow(prompt.text, url, initial, result.initial_score, refined, result.refined_score))
    write_text(cell.store.folder / "neurons.csv", published_text(rows))


def _summary(cell: ImageCell) -> dict[str, Any]:
    store = cell.store
    localized, generated = store.records("localize").values(), store.records("generate").values()
    scored = store.records("score").values()
    peak = max((r.get("cost", {}) for r in [*localized, *generated]), key=lambda cost: cost.get("peak_memory_mb", 0))
    about = {name: metric.describe() for name, metric in metrics_of(cell).items()}
    aggregates = aggregate(scored, cell.prompts, _scores_without_mitigation(cell))
    for group, row in read_json(store.folder / SETS).items():
        count = sum(group in ("all", p.group) for p in cell.prompts)
        nothing = dict.fromkeys(("low", "high", "median", "mad"))
        aggregates.setdefault(group, {}).update(
            {name: {"mean": value, **nothing, "prompts": count} for name, value in row.items()}
        )

    def costs(records: Iterable[Record], field: str) -> list[float]:
        return [record["cost"][field] for record in records if field in record.get("cost", {})]

    measured = {
        "localize_seconds_per_prompt": costs(localized, "seconds"),
        "once_seconds_per_prompt": costs(localized, "once_seconds"),
        "once_row_passes_per_prompt": costs(localized, "once_row_passes"),
        "generate_seconds_per_image": costs(generated, "seconds"),
        "row_passes_per_image": costs(generated, "row_passes"),
    }
    memory = costs([*localized, *generated], "peak_memory_mb")
    return {
        "schema": SCHEMA,
        "unmitigated": cell.unmitigated.id if cell.unmitigated else None,
        "metrics": about,
        "aggregates": aggregates,
        "presets": presets(scored, cell.prompts, about),
        "detection": _detection(cell, localized),
        "counts": {
            "images": len(generated),
            "prompts": len(cell.prompts),
            "truncated": sum(bool(record.get("truncated")) for record in scored),
            "without_reference": sum(bool(p.kind) and not p.references for p in cell.prompts),
            "dead_references": len(dead_references(cell.prompts)),
        },
        # Nothing is known of the cost of images that were made elsewhere.
        "cost": {
            **{name: round(sum(values) / len(values), 4) for name, values in measured.items() if values},
            **({"peak_memory_mb": max(memory)} if memory else {}),
        },
        "peak_memory_of": "process" if peak.get("device", "cpu") == "cpu" else "GPU",
    }


def _scores_without_mitigation(cell: ImageCell) -> Iterable[Record]:
    """Scores to pair with those of a cell; none where other metrics or reference images made them."""
    none = cell.unmitigated
    if none is None or not none.store.is_done("score"):
        return ()
    own, other = (read_json(store.folder / "scoring.json") for store in (cell.store, none.store))
    same = all(own[key] == other[key] for key in ("metrics", "references"))
    return none.store.records("score").values() if same else ()


def _detection(cell: ImageCell, localized: Iterable[Record]) -> dict[str, Any]:
    """How well the memorization score tells memorized prompts from others: without mitigation, where both are there."""
    kinds = {p.id: bool(p.kind) for p in cell.prompts}
    scores = {kind: [r["memorization"] for r in localized if kinds[r["prompt"]] == kind] for kind in (True, False)}
    if cell.is_mitigated or not all(scores.values()):
        return {}
    if not all(math.isfinite(score) for those in scores.values() for score in those):
        return {}  # half precision may overflow; what else there is to tell stands without it
    return {"memorization": {"title": "Memorization score", **detection(scores[True], scores[False])}}


def outlook(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What a run would do, without loading or writing anything.

    Returns:
        One entry a cell, and before them one for each source that was not asked for: open records by stage, whether it
        is calibrated (None where it need not be), missing references.
    """
    rows = []
    for cell in with_sources(cells):
        stages = STAGES if cell in cells else STAGES[:1]
        open_ids = {stage: len(cell.store.open_ids(stage, cell.ids(stage))) for stage in stages}
        if "score" in open_ids and _scores_are_stale(cell):
            open_ids["score"] = len(cell.prompts)
        rows.append(
            {
                "cell": cell.id,
                "open": open_ids,
                "calibrated": cell.is_calibrated if cell.method.needs_calibration else None,
                "prompts_without_reference": sum(bool(p.kind) and not p.references for p in cell.prompts),
            }
        )
    return rows


def export(cell: Path, folder: Path, prompt: str | None = None) -> Neurons:
    """Saves a cell's pipeline with the neurons of its localization switched off for good.

    Args:
        cell: A cell's folder.
        folder: Where the plain diffusers folder goes; must not hold anything yet.
        prompt: Id of the prompt whose neurons are taken; None takes those of all memorized prompts together, or of
            all prompts where none is known to be memorized.

    Returns:
        What was switched off.

    Raises:
        NemoBenchError: The cell has no localization, the prompt is unknown, or the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} is not empty; name a new folder to export to")
    found = {name: Neurons(record["neurons"]) for name, record in by_prompt(Store(cell)).items()}
    if not found:
        raise StoreError(f"{cell} holds no localization; give results/<name>/<cell> of a finished run")
    if prompt is not None and prompt not in found:
        raise ConfigError(f"no prompt '{prompt}' in {cell}. {nearest(prompt, found)}")
    lines = (cell / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    memorized = [found[p["id"]] for p in map(json.loads, lines) if p["kind"] and p["id"] in found]
    neurons = found[prompt] if prompt is not None else reduce(or_, memorized or found.values())
    if not neurons:
        raise StoreError(f"{cell} switches nothing off; name the cell of a method that localizes, such as nemo")
    settings = read_json(cell / "env.json")["starts"][-1]["settings"]
    model = settings["model"]
    loaded = load_model(ModelSettings(**{**model, "similarity": SimilaritySettings(**model["similarity"])}))
    loaded.export(folder, neurons, settings["method"].get("factor", 0.0))
    return neurons
