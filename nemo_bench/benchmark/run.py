"""From cells to results: images, scores, table and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_bench.benchmark.pending import SETS_FILE, scored_tasks, task_ids, track_cells
from nemo_bench.benchmark.plan import SCORING_FILE, Cell, has_stale_scores, metrics_of, scoring_of, with_sources
from nemo_bench.benchmark.processes import is_main
from nemo_bench.benchmark.runner import Runner, note_start, open_folder
from nemo_bench.benchmark.summary import summarize
from nemo_bench.localization.published import PublishedRow, by_position, published_text
from nemo_bench.records.images import unreadable
from nemo_bench.records.io import read_file, write_json, write_text
from nemo_bench.records.results import Results, load_detections, load_results
from nemo_bench.records.schema import Layers, LocalizationRecord, ScoreRecord
from nemo_bench.records.store import Store, read_localizations
from nemo_bench.report import write_report
from nemo_bench.report.detection import write_detection
from nemo_bench.tracking import sweep_trial


def run(cells: Sequence[Cell], command: str, say: Callable[[str], None] = print, *, progress: bool = True) -> Path:
    """Runs what is pending of some cells, to the report.

    Args:
        cells: From :func:`nemo_bench.benchmark.plan.plan`, of one name and root.
        command: What the user typed, for the records.
        say: Where single lines go.
        progress: Whether bars are shown.

    Returns:
        The folder of the run, with ``report.html`` and the leaderboard.

    Raises:
        NemoBenchError: As by the plan, or a results folder belongs to something else.
    """
    settings = cells[0].config.settings
    folder = Path(settings.root) / settings.name
    if settings.logger.wandb:
        sweep_trial({cell.id: str(cell.spec.method) for cell in cells})
    runner = Runner(settings.trainer, progress=progress)
    runner.start()
    if is_main():
        open_folder(folder, cells, instead=True)
        for cell in with_sources(cells):
            cell.store.open(cell.spec)
            note_start(cell, command, runner)
            _reopen(cell)
        renew_scores(cells)
        report_damaged(cells, say)
    runner.wait()
    for cell in cells:
        runner.generate(cell)
    if is_main():
        for cell in cells:
            _publish(cell)
    finish(cells, runner, say)
    return folder


def report_damaged(cells: Sequence[Cell], say: Callable[[str], None]) -> None:
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


def renew_scores(cells: Sequence[Cell]) -> None:
    """Downloads the weights of metrics that are pending; forgets scores that can't stay."""
    stale = [cell for cell in cells if has_stale_scores(cell)]
    for cell in cells:
        cell.store.recount(ScoreRecord, [task.id for task in scored_tasks(cell)])
        if cell in stale or not cell.store.is_done(ScoreRecord):
            for metric in metrics_of(cell).values():
                metric.space.fetch()
    for cell in stale:
        _forget_scores(cell.store)
        write_json(cell.store.folder / SCORING_FILE, scoring_of(cell))


def finish(cells: Sequence[Cell], runner: Runner, say: Callable[[str], None] = print) -> None:
    """Scores pending images of cells of one run, to its report."""
    for cell in cells:
        runner.score(cell)
    if is_main():
        folder = cells[0].store.folder.parent
        for cell in cells:
            write_json(cell.store.folder / "metrics.json", summarize(cell))
        # Another command of this name may have taken them off the list while they were not finished.
        open_folder(folder, cells)
        results = write_pages(folder)
        track_cells(results, cells, say)


def write_pages(folder: Path) -> Results:
    """Writes the report of a run, and the page of its detectors where there are any: the pages link to each other."""
    results = load_results(folder)
    write_report(results)
    if (folder / "detection.html").is_file():
        write_detection(load_detections(folder))
    return results


def _reopen(cell: Cell) -> None:
    """Reopens finished stages that miss something; images that are made again are scored again."""
    store = cell.store
    for kind in cell.stages:
        if kind is ScoreRecord or not store.is_done(kind):
            continue
        if store.pending_ids(kind, task_ids(cell, kind)):
            store.reopen(kind)
            _forget_scores(store)


def _forget_scores(store: Store) -> None:
    store.forget(ScoreRecord)
    (store.folder / SETS_FILE).unlink(missing_ok=True)


def _publish(cell: Cell) -> None:
    """Writes the neurons in the published form, beside the records; without prompts that failed."""
    if LocalizationRecord not in cell.stages:
        return
    widths = read_file(cell.store.folder / "layers.json", Layers)
    localizations = read_localizations(cell.store.folder)
    rows = []
    for prompt in cell.prompts:
        if prompt.id not in localizations:
            continue
        result = localizations[prompt.id]
        initial = by_position(result.listed_initial or result.initial, widths)
        refined = by_position(result.listed or result.neurons, widths)
        url = next(iter(prompt.links), "")
        rows.append(PublishedRow(prompt.text, url, initial, result.initial_score, refined, result.refined_score))
    write_text(cell.store.folder / "neurons.csv", published_text(rows))
