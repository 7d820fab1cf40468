"""Tasks of a cell and what is left of them, found without loading a model or starting Lightning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nemo_bench.benchmark.plan import SCORING_FILE, Cell, has_stale_scores, with_sources
from nemo_bench.errors import ModelError, NemoBenchError, StoreError
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.io import read_file
from nemo_bench.records.results import Results, load_results
from nemo_bench.records.schema import (
    ImageRecord,
    Leaderboard,
    LocalizationRecord,
    PromptRecord,
    Record,
    ScoreRecord,
    Spec,
)
from nemo_bench.records.store import Store
from nemo_bench.report import REPORT_FILES
from nemo_bench.tracking import track

P = TypeVar("P", bound=PromptRecord)

SETS_FILE = "sets.json"
SCORE_FILES = (f"{ScoreRecord.stage}.done", SCORING_FILE, SETS_FILE)
"""Files of a cell that are written with its scores."""


def prompt_tasks(cell: Cell) -> list[Task]:
    """All prompts of a cell."""
    return [Task.of_prompt(prompt) for prompt in cell.prompts]


def image_tasks(cell: Cell) -> list[Task]:
    """All images of a cell, prompt by prompt."""
    seeds = range(cell.config.settings.seeds)
    return [Task.of_image(prompt, seed) for prompt in cell.prompts for seed in seeds]


def scored_tasks(cell: Cell) -> list[Task]:
    """The prompts of a cell that have images."""
    having = {record.prompt for record in cell.store.records(ImageRecord).values()}
    return [task for task in prompt_tasks(cell) if task.prompt.id in having]


def tasks_of(cell: Cell, kind: type[Record]) -> Sequence[Task]:
    """All tasks of a stage of a cell."""
    return image_tasks(cell) if kind is ImageRecord else prompt_tasks(cell)


def read_by_prompt(store: Store, kind: type[P]) -> dict[str, P]:
    """The records of a stage by prompt id."""
    return {record.prompt: record for record in store.records(kind).values()}


def localized_neurons(store: Store, spec: Spec, prompts: Sequence[Prompt]) -> dict[str, Neurons]:
    """Neurons by prompt id, without prompts that failed; none for every prompt where the method localizes nothing.

    What was blocked for external images is not known: no prompt is in it.
    """
    if spec.task == "external":
        return {}
    if LocalizationRecord.stage not in spec.stages:
        return {prompt.id: Neurons() for prompt in prompts}
    records = store.records(LocalizationRecord).values()
    return {record.prompt: Neurons(record.neurons) for record in records if record.neurons is not None}


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


@dataclass(frozen=True)
class Pending:
    """Work that is left of a cell.

    Attributes:
        cell: The cell.
        records: Number of missing records by stage.
        calibrated: Whether its calibration is there; None where it needs none.
    """

    cell: Cell
    records: dict[str, int]
    calibrated: bool | None


def pending_work(cells: Sequence[Cell]) -> list[Pending]:
    """Work that is left, without loading or writing anything.

    Returns:
        One entry a cell, and before them one for each source that was not asked for, of which the neurons alone count.
    """
    rows: list[Pending] = []
    unlocalized: set[Cell] = set()
    for cell in reversed(with_sources(cells)):
        records = {kind.stage: _count_pending(cell, kind) for kind in cell.stages}
        if cell not in cells:
            # Its neurons alone count, and those only where something starts from them still.
            is_needed = any(other.source is cell for other in unlocalized)
            records = {LocalizationRecord.stage: records[LocalizationRecord.stage] if is_needed else 0}
        if records.get(LocalizationRecord.stage):
            unlocalized.add(cell)
        if ScoreRecord.stage in records and has_stale_scores(cell):
            records[ScoreRecord.stage] = len(cell.prompts)
        needs_calibration = cell.method is not None and cell.method.needs_calibration
        rows.append(Pending(cell, records, cell.is_calibrated if needs_calibration else None))
    return rows[::-1]


def _count_pending(cell: Cell, kind: type[Record]) -> int:
    return len(cell.store.pending_ids(kind, [task.id for task in tasks_of(cell, kind)]))


def is_complete(cells: Sequence[Cell]) -> bool:
    """Whether a run has nothing to do: all is there and whole, and table and report were made from the last of it."""
    folder = cells[0].store.folder.parent
    try:
        results = load_results(folder)
        board = read_file(folder / "leaderboard.json", Leaderboard)
    except StoreError:
        return False
    shown = {row.cell for row in board.rows}
    # Cells that are listed, but neither finished nor asked for, are taken off the list.
    if results.unfinished or board.unfinished or shown != {cell.name for cell in results.cells}:
        return False
    if not all(cell.id in shown and _is_summarized(cell, results) for cell in cells):
        return False
    tables = [_written(cell.folder / "metrics.json") for cell in results.cells]
    if not all(_written(folder / name) >= max(tables) for name in REPORT_FILES):
        return False
    return not any(sum(work.records.values()) for work in pending_work(cells))


def _is_summarized(cell: Cell, results: Results) -> bool:
    """Whether the table of a cell was made from its last scores, and from those without mitigation that it has now."""
    summary = next(found.summary for found in results.cells if found.name == cell.id)
    others = [cell.unmitigated] if cell.unmitigated else []
    if summary.unmitigated != (others[0].folder.name if others else None):
        return False
    sources = [store.folder / name for store in (cell.store, *others) for name in SCORE_FILES]
    return _written(cell.store.folder / "metrics.json") >= max(map(_written, sources))


def _written(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def track_cells(results: Results, cells: Sequence[Cell], say: Callable[[str], None]) -> None:
    """Logs finished cells of a run; a logger that fails costs a line, and the results nothing."""
    try:
        track(results, cells[0].config.settings.logger, cells=[cell.id for cell in cells], say=say)
    except NemoBenchError as error:
        say(str(error))


def mostly_failed(stores: Iterable[Store], kind: type[Record], what: str) -> list[str]:
    """A line for each cell of which more than half of a stage's records failed.

    Args:
        stores: Folders of cells.
        kind: Class of the records.
        what: What they are of, such as ``images``.

    Returns:
        Cell, numbers, and the most frequent reason.
    """
    lines = []
    for store in stores:
        records = store.records(kind).values()
        reasons = Counter(record.failed for record in records if record.failed)
        if 2 * reasons.total() > len(records):
            reason, count = reasons.most_common(1)[0]
            of_them = "" if len(reasons) == 1 else f" ({count} of them)"
            lines.append(f"{store.folder.name}: {reasons.total()} of {len(records)} {what} failed: {reason}{of_them}")
    return lines


def check_images(cells: Sequence[Cell]) -> None:
    """Makes sure that most images of each cell are there, once everything else is done and written.

    Raises:
        ModelError: More than half of a cell's images failed; the reasons are named, and what may help.
    """
    if lines := mostly_failed([cell.store for cell in cells], ImageRecord, "images"):
        hint = (
            "half precision may overflow: try model.dtype=float32 or bfloat16; else the weights, the scheduler or the "
            "method's settings are at fault. Failed images are recorded, and have no score"
        )
        raise ModelError("\n".join([*lines, hint]))
