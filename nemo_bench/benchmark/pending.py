"""Tasks of a cell and what is left of them, found without loading a model or starting Lightning."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_bench.benchmark.plan import SCORING_FILE, Cell, has_stale_scores, with_sources
from nemo_bench.errors import ModelError, NemoBenchError, StoreError
from nemo_bench.localization.localizers import ranks
from nemo_bench.prompts.tasks import Task
from nemo_bench.records import schema
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.io import is_whole, read_file
from nemo_bench.records.results import Results, load_cell, load_detections, load_results
from nemo_bench.records.schema import ImageRecord, LocalizationRecord, PromptRecord, Record, ScoreRecord, Spec
from nemo_bench.records.store import Store, read_localizations, read_records, read_scores
from nemo_bench.report import REPORT_FILES, write_report
from nemo_bench.report.detection import write_detection
from nemo_bench.report.localizers import FILES as LOCALIZER_FILES
from nemo_bench.report.localizers import localized, write_localizers
from nemo_bench.report.memsinks import FILES as SINKS_FILES
from nemo_bench.report.memsinks import has_sinks, write_sinks
from nemo_bench.tracking import track

SETS_FILE = "sets.json"
SCORE_FILES = (f"{ScoreRecord.stage}.done", SCORING_FILE, SETS_FILE)
"""Files of a cell that are written with its scores."""

log = logging.getLogger(__name__)


def prompt_tasks(cell: Cell, kind: type[Record] = PromptRecord) -> list[Task]:
    """All prompts of a cell; for localizations without variants, which have those of the prompts that they vary."""
    return [Task.of_prompt(p) for p in cell.prompts if kind is not LocalizationRecord or not p.axis]


def image_tasks(cell: Cell) -> list[Task]:
    """All images of a cell, prompt by prompt."""
    seeds = range(cell.config.settings.seeds)
    return [Task.of_image(prompt, seed) for prompt in cell.prompts for seed in seeds]


def scored_tasks(cell: Cell) -> list[Task]:
    """The prompts of a cell that have images."""
    having = {record.prompt for record in cell.store.records(ImageRecord).values()}
    return [task for task in prompt_tasks(cell) if task.prompt.id in having]


def task_ids(cell: Cell, kind: type[Record]) -> list[str]:
    """Record ids of a stage of a cell."""
    return [task.id for task in (image_tasks(cell) if kind is ImageRecord else prompt_tasks(cell, kind))]


def localized_neurons(store: Store, spec: Spec, prompts: Sequence[Prompt]) -> dict[str, Neurons]:
    """Neurons by prompt id, without prompts that failed; none for every prompt where the method localizes nothing.

    What was blocked for external images is not known: no prompt is in it.
    """
    if spec.task == "external":
        return {}
    if LocalizationRecord.stage not in spec.stages:
        return {prompt.id: Neurons() for prompt in prompts}
    return {prompt: found.neurons for prompt, found in read_localizations(store.folder, prompts).items()}


def rankings(store: Store, spec: Spec) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Places of all neurons by prompt id, of a cell or else of the one that its neurons come from."""
    folder = store.folder.parent / spec.source if spec.source else store.folder
    records = read_records(folder, LocalizationRecord).values()
    return {r.prompt: ranks(read_scores(folder / r.file), r.prompt) for r in records if r.file}


def unmitigated_images(cell: Cell) -> dict[str, Path]:
    """Files of the images without mitigation by record id, none where no cell has them."""
    if cell.unmitigated is None:
        return {}
    folder = cell.unmitigated.folder
    records = cell.unmitigated.records(ImageRecord).values()
    return {record.id: (folder / record.image).resolve() for record in records if record.image}


def is_finished(folder: Path) -> bool:
    """Whether a cell was taken to its scores."""
    return Store(folder).is_done(ScoreRecord) and (folder / "metrics.json").is_file()


def pending_work(cells: Sequence[Cell]) -> list[tuple[Cell, dict[str, int]]]:
    """Number of missing records by stage of each cell; nothing is loaded or written.

    Before them come sources that were not asked for, of which the neurons alone count.
    """
    rows: list[tuple[Cell, dict[str, int]]] = []
    asked, unlocalized = set(cells), set[Cell]()
    for cell in reversed(with_sources(cells)):
        records = _count_pending(cell)
        if cell not in asked:
            # Its neurons alone count, and those only where something starts from them still.
            is_needed = any(other.source is cell for other in unlocalized)
            records = {LocalizationRecord.stage: records[LocalizationRecord.stage] if is_needed else 0}
        if records.get(LocalizationRecord.stage):
            unlocalized.add(cell)
        rows.append((cell, records))
    return rows[::-1]


def _count_pending(cell: Cell) -> dict[str, int]:
    try:
        records = {kind.stage: len(cell.store.pending_ids(kind, task_ids(cell, kind))) for kind in cell.stages}
        if ScoreRecord.stage in records and has_stale_scores(cell):
            records[ScoreRecord.stage] = len(cell.prompts)
    except StoreError:  # who owns the cell sets aside what is damaged; how much is pending is not known before
        records = {kind.stage: len(task_ids(cell, kind)) for kind in cell.stages}
    return records


def is_complete(cells: Sequence[Cell]) -> bool:
    """Whether a run has nothing to do: all is there and whole, and table and report were made from the last of it."""
    folder = cells[0].store.folder.parent
    if not is_current(folder) or not all(map(_is_summarized, cells)):
        return False
    shown = {row.cell for row in read_file(folder / "leaderboard.json", schema.Leaderboard).rows}
    if not all(cell.id in shown for cell in cells):
        return False
    return not any(sum(records.values()) for _, records in pending_work(cells))


def is_current(folder: Path) -> bool:
    """Whether the pages of a run show all of its cells, in their last state, and no unfinished one."""
    try:
        results = load_results(folder)
        board = read_file(folder / "leaderboard.json", schema.Leaderboard)
    except StoreError:
        return False
    # Cells that are listed, but neither finished nor asked for, are taken off the list.
    if results.unfinished or board.unfinished or {row.cell for row in board.rows} != {c.name for c in results.cells}:
        return False
    tables = [_written(cell.folder / "metrics.json") for cell in results.cells]
    localizers, sinks = LOCALIZER_FILES if localized(results) else (), SINKS_FILES if has_sinks(results) else ()
    files = [*REPORT_FILES, *localizers, *sinks]
    return all(_written(folder / name) >= max(tables) for name in files)


def is_up_to_date(cell: Cell) -> bool:
    """Whether a cell has all its records and files, and a table made from the last of them."""
    try:
        load_cell(cell.store.folder)
    except StoreError:
        return False
    names = [*SCORE_FILES, *(["neurons.csv"] if LocalizationRecord in cell.stages else [])]
    if not all((cell.store.folder / name).is_file() for name in names):
        return False
    if not _is_summarized(cell) or has_stale_scores(cell):
        return False
    return not any(cell.store.pending_ids(kind, task_ids(cell, kind)) for kind in cell.stages)


def _is_summarized(cell: Cell) -> bool:
    """Whether the table of a cell was made from its last scores, and from those without mitigation that it has now."""
    path = cell.store.folder / "metrics.json"
    if not is_whole(path, schema.Summary) or not cell.store.is_done(ScoreRecord):
        return False
    if read_file(path, schema.Summary).unmitigated != (cell.unmitigated.folder.name if cell.unmitigated else None):
        return False
    return _written(path) >= max(map(_written, score_files(cell)))


def score_files(cell: Cell) -> list[Path]:
    """What the table of a cell is made from: its scores, and those without mitigation."""
    others = [cell.unmitigated] if cell.unmitigated else []
    return [store.folder / name for store in (cell.store, *others) for name in SCORE_FILES]


def date_after(file: Path, sources: Iterable[Path]) -> None:
    """Dates a file no earlier than what it was just made from; else it seems stale where the clock was set back."""
    latest = max(map(_written, sources))
    if _written(file) < latest:
        os.utime(file, ns=(latest, latest))


def write_pages(folder: Path) -> Results:
    """Writes the report of a run, and the pages of localizers, sinks and detectors where there are any."""
    results = load_results(folder)
    write_report(results)
    localizers = LOCALIZER_FILES if write_localizers(results) else ()
    sinks = SINKS_FILES if write_sinks(results) else ()
    for name in (*REPORT_FILES, *localizers, *sinks):
        date_after(folder / name, [cell.folder / "metrics.json" for cell in results.cells])
    if (folder / "detection.html").is_file():
        write_detection(load_detections(folder))
    return results


def _written(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def track_cells(results: Results, cells: Sequence[Cell]) -> None:
    """Logs finished cells of a run; a logger that fails costs a line, and the results nothing."""
    try:
        track(results, cells[0].config.settings.logger, cells=[cell.id for cell in cells])
    except NemoBenchError as error:
        log.warning("%s", error)


def check_failures(cells: Sequence[Cell]) -> None:
    """Raises ModelError where most images of a cell or most scores of a detector failed, with the most frequent reason.

    Called once everything else is done and written.
    """
    lines = []
    is_overflow = False
    for cell in cells:
        kind: type[PromptRecord] = ImageRecord if cell.detector is None else schema.DetectionRecord
        records = cell.store.records(kind).values()
        unlocalized = _unlocalized(cell)
        reasons = Counter(unlocalized.get(record.prompt, record.failed) for record in records if record.failed)
        if 2 * reasons.total() > len(records):
            reason, count = reasons.most_common(1)[0]
            what = f"{len(records)} {'images' if cell.detector is None else 'prompts'}"
            of_them = "" if len(reasons) == 1 else f" ({count} of them)"
            lines.append(f"{cell.id}: {reasons.total()} of {what} failed: {reason}{of_them}")
            is_overflow |= "finite" in reason
    if lines:
        hints = []
        if is_overflow:
            hints.append("half precision may overflow: try model.dtype=float32 or bfloat16")
        if is_overflow and cells[0].detector is None:
            hints.append("else the weights, the scheduler or the method's settings are at fault")
        if cells[0].detector is None:
            hints.append("failed images are recorded, and have no score")
        raise ModelError("\n".join([*lines, "; ".join(hints)]))


def _unlocalized(cell: Cell) -> dict[str, str]:
    """Why localizing failed, by prompt id: where neurons come from another cell, what failed there."""
    names = [cell.id, *([cell.spec.source] if cell.spec.source else [])]
    records = (read_records(cell.store.folder.parent / name, LocalizationRecord).values() for name in names)
    return {record.prompt: record.failed for each in records for record in each if record.failed}
