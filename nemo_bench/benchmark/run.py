"""From cells to results: images, scores, table and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_bench.benchmark.plan import STAGES, Cell, ImageCell, metrics_of, with_sources
from nemo_bench.benchmark.runner import (
    SETS,
    Runner,
    by_prompt,
    is_main,
    mostly_failed,
    note_start,
    open_folder,
    scored_tasks,
)
from nemo_bench.benchmark.stages.localize import localization_of
from nemo_bench.benchmark.summary import summary_of
from nemo_bench.errors import ModelError, NemoBenchError
from nemo_bench.localization.published import PublishedRow, by_position, published_text
from nemo_bench.methods import Method
from nemo_bench.prompts import references_digest
from nemo_bench.records.images import unreadable
from nemo_bench.records.io import as_json, is_whole, read_json, write_json, write_text
from nemo_bench.records.store import Store, iterate_records
from nemo_bench.report import write_report
from nemo_bench.report.detection import write_detection
from nemo_bench.tracking import sweep_trial, track


def run(cells: Sequence[Cell], command: str, say: Callable[[str], None] = print, *, progress: bool = True) -> Path:
    """Runs what is open of some cells, to the report.

    Args:
        cells: From :func:`nemo_bench.benchmark.plan.plan`, of one name and root.
        command: What the user typed, for the records.
        say: Where single lines go.
        progress: Whether bars are shown.

    Returns:
        The folder of the run, with ``report.html`` and the leaderboard.

    Raises:
        NemoBenchError: See :func:`nemo_bench.benchmark.plan.plan`; also where a results folder belongs to something
            else.
    """
    settings = cells[0].config.settings
    folder = Path(settings.root) / settings.name
    if settings.logger.wandb:
        sweep_trial({cell.id: cell.spec["method"] for cell in cells})
    runner = Runner(settings.trainer, progress=progress)
    runner.start()
    if is_main():
        open_folder(folder, cells, instead=True)
        for cell in with_sources(cells):
            cell.store.open(cell.spec)
            note_start(cell, command, runner)
            _reopen(cell)
        renew_scores(cells)
        tell_damaged(cells, say)
    runner.trainer.strategy.barrier()
    for cell in cells:
        runner.make(cell)
    if is_main():
        for cell in cells:
            _publish(cell)
    finish(cells, runner, say)
    return folder


def tell_damaged(cells: Sequence[ImageCell], say: Callable[[str], None]) -> None:
    """Says how many training images can't be decoded, and how many prompts have no similarity to any for it."""
    prompts = {prompt.id: prompt for cell in cells for prompt in cell.prompts}.values()
    files = list(dict.fromkeys(file for prompt in prompts for file in prompt.damaged_references))
    if files:
        total = len({file for prompt in prompts for file in (*prompt.references, *prompt.damaged_references)})
        alone = sum(not prompt.references for prompt in prompts if prompt.damaged_references)
        why = unreadable(files[:1], "training images").get(files[0], "mended by now")
        what = f"{len(files)} of {total} training images can't be decoded and are left out: {files[0]} ({why})"
        more = ", ..." if len(files) > 1 else ""
        say(f"{what}{more}. Prompts that have no other, so no similarity to training images: {alone}")


def renew_scores(cells: Sequence[ImageCell]) -> None:
    """Downloads what open metrics are to download; forgets scores that can't stay."""
    stale = [cell for cell in cells if _scores_are_stale(cell)]
    for cell in cells:
        cell.store.recount("score", [task.id for task in scored_tasks(cell)])
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
        folder, logger = cells[0].store.folder.parent, cells[0].config.settings.logger
        for cell in cells:
            write_json(cell.store.folder / "metrics.json", summary_of(cell))
        # Another command of this name may have taken them off the list while they were not finished.
        open_folder(folder, cells)
        write_report(folder)
        if (folder / "detection.html").is_file():
            write_detection(folder)  # the pages link to one another
        try:
            track(folder, logger, cells=[cell.id for cell in cells], say=say)
        except NemoBenchError as error:
            say(str(error))


def _reopen(cell: Cell) -> None:
    """Opens stages again that were done once and miss something now; what is made again is scored again."""
    store = cell.store
    for stage in STAGES[:-1]:
        if store.is_done(stage) and store.pending_ids(stage, cell.ids(stage)):
            store.reopen(stage)
            _forget_scores(store)


def _forget_scores(store: Store) -> None:
    store.forget("score")
    (store.folder / SETS).unlink(missing_ok=True)


def _scoring(cell: ImageCell) -> dict[str, Any]:
    """What decides the scores of given images."""
    nodes, metrics = cell.config.settings.metrics, metrics_of(cell)
    paired = cell.unmitigated and any("unmitigated" in metric.needs for metric in metrics.values())
    content = {
        "metrics": {name: {**nodes[name], **metric.fingerprint()} for name, metric in metrics.items()},
        "unmitigated": cell.unmitigated.id if cell.unmitigated and paired else None,
        "references": references_digest(cell.prompts),
    }
    return json.loads(as_json(content))  # as it will be read again


def _scores_are_stale(cell: ImageCell) -> bool:
    """Whether scores are of other metrics or reference images, or some of them were lost.

    The scores of a prompt are written after those of its images, so no kill leaves the first without the others.
    """
    path = cell.store.folder / "scoring.json"
    if not is_whole(path) or read_json(path) != _scoring(cell):
        return True
    scored = {(record["prompt"], record["seed"]) for record in iterate_records(cell.store.folder, "score")}
    images = [(r["prompt"], r["seed"]) for r in iterate_records(cell.store.folder, "generate") if "image" in r]
    return any((prompt, None) in scored and (prompt, seed) not in scored for prompt, seed in images)


def _publish(cell: Cell) -> None:
    """Writes what a method found in the published form, beside the records; without prompts that failed."""
    if type(cell.method).localize is Method.localize:
        return
    widths, found = read_json(cell.store.folder / "layers.json"), by_prompt(cell.store)
    rows = []
    for prompt in cell.prompts:
        if "neurons" not in found[prompt.id]:
            continue
        result = localization_of(found[prompt.id])
        initial = by_position(result.listed_initial or result.initial, widths)
        refined = by_position(result.listed or result.neurons, widths)
        url = next(iter(prompt.links), "")
        rows.append(PublishedRow(prompt.text, url, initial, result.initial_score, refined, result.refined_score))
    write_text(cell.store.folder / "neurons.csv", published_text(rows))


def check_made(cells: Sequence[ImageCell]) -> None:
    """Looks whether most images of each cell are there, once everything else is done and written.

    Raises:
        ModelError: More than half of a cell's images failed; the reasons are named, and what may help.
    """
    if lines := mostly_failed([cell.store for cell in cells], "generate", "images"):
        hint = (
            "half precision may overflow: try model.dtype=float32 or bfloat16; else the weights, the scheduler or the "
            "method's settings are at fault. Failed images are recorded, and have no score"
        )
        raise ModelError("\n".join([*lines, hint]))


def outlook(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What a run would do, without loading or writing anything.

    Returns:
        One entry a cell, and before them one for each source that was not asked for: open records by stage, whether it
        is calibrated (None where it need not be), missing references.
    """
    rows = []
    for cell in with_sources(cells):
        stages = STAGES if cell in cells else STAGES[:1]
        pending_ids = {stage: len(cell.store.pending_ids(stage, cell.ids(stage))) for stage in stages}
        if "score" in pending_ids and _scores_are_stale(cell):
            pending_ids["score"] = len(cell.prompts)
        rows.append(
            {
                "cell": cell.id,
                "pending": pending_ids,
                "calibrated": cell.is_calibrated if cell.method.needs_calibration else None,
                "prompts_without_reference": sum(bool(p.kind) and not p.references for p in cell.prompts),
            }
        )
    return rows
