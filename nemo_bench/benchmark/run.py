"""From cells to results: images, scores, table and report."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from nemo_bench.benchmark.pending import (
    SETS_FILE,
    date_after,
    is_current,
    is_finished,
    score_files,
    scored_tasks,
    task_ids,
    write_pages,
)
from nemo_bench.benchmark.plan import (
    SCORING_FILE,
    Cell,
    has_current_scores,
    has_stale_scores,
    metrics_of,
    scoring_of,
    with_sources,
)
from nemo_bench.benchmark.processes import is_main
from nemo_bench.benchmark.runner import Runner, note_start, open_folder
from nemo_bench.benchmark.summary import summarize
from nemo_bench.benchmark.work import LOG_FILE, Work
from nemo_bench.errors import RankError, UnwritableError, first_line
from nemo_bench.localization.published import PublishedRow, by_position, published_text
from nemo_bench.records.images import unreadable
from nemo_bench.records.io import read_file, write_json, write_text
from nemo_bench.records.lease import POLL, holder
from nemo_bench.records.schema import Layers, LocalizationRecord, Record, ScoreRecord
from nemo_bench.records.store import Store, read_localizations, read_run
from nemo_bench.tracking.live import Live

log = logging.getLogger(__name__)


def run(cells: Sequence[Cell], command: str, *, progress: bool = True, shard: tuple[int, int] | None = None) -> Path:
    """Runs what is pending of some cells, one after the other to its scores, and the report.

    Any number of runs may work on one folder at a time: each takes the next cell that no other one has. A cell that
    fails does not stop the others.

    Args:
        cells: From :func:`nemo_bench.benchmark.plan.plan`, of one name and root.
        command: What the user typed, for the records.
        progress: Whether progress is shown.
        shard: ``(i, n)``: every n-th cell alone, from the i-th of 1 to n; None for all.

    Returns:
        The folder of the run, with ``report.html`` and the leaderboard.

    Raises:
        NemoBenchError: As by the plan, or a results folder belongs to something else; also once everything else is
            done, where cells failed.
    """
    settings = cells[0].config.settings
    folder = Path(settings.root) / settings.name
    live = Live(settings.logger, {cell.id: str(cell.spec.method) for cell in cells})
    runner = Runner(settings.trainer, progress=progress)
    runner.progress.listeners.append(live.note)
    runner.start()
    if is_main():
        with runner.leases.owning(folder):
            open_folder(folder, cells, instead=True)
    with log_file(folder):
        if is_main():
            for cell in with_sources(cells):
                cell.store.open(cell.spec)
            for cell in cells:
                fetch_weights(cell)
            report_damaged(cells)
        work = Work(cells, runner.leases, shard)
        try:
            with live:
                _work_off(work, cells, runner, command, live)
        finally:
            runner.leases.release_all()
    work.check()
    return folder


def _work_off(work: Work, cells: Sequence[Cell], runner: Runner, command: str, live: Live) -> None:
    """Takes cells to their end until all are over."""
    folder = cells[0].store.folder.parent
    report = Report(folder, runner)
    said: set[str] = set()
    while True:
        # All processes of a run work on the cell that the first one took.
        step, number, kind = runner.agree(partial(_next, work))
        if step == "over":
            break
        if step == "wait":
            if is_main():
                for cell in work.pending:
                    if (held := holder(cell.store.folder)) not in said:
                        said.add(held)
                        log.info("%s; waiting", held)
            time.sleep(POLL)
            continue
        cell = work.all[number]
        if step == "assist":
            try:
                runner.make(kind, cell, assisting=True)
            except Exception as error:
                if runner.trainer.world_size > 1:
                    raise
                log.warning("assisting %s failed, its own run goes on: %s", cell.id, first_line(error))
            time.sleep(POLL)
            continue
        try:
            _take_to_end(cell, runner, command, live if cell in cells else None)
        except Exception as error:
            # A disk that is full is so for all cells, and a process that was killed can't help any.
            if isinstance(error, UnwritableError | RankError):
                raise
            if is_main():
                work.give_up(cell, error)
                live.give_up()
            if runner.trainer.world_size > 1:  # other processes would wait for this one
                raise
            continue
        if is_main():
            work.finish(cell)
            if cell in cells:
                report.keep_listed(cell)
                report.write()
                live.end()
    if is_main() and any(is_finished(cell.store.folder) for cell in cells):
        report.write_last()
    runner.wait()  # the caller in any process may read what the first one has written


def _next(work: Work) -> tuple[Literal["take", "assist", "wait", "over"], int, type[Record]]:
    """What to do next, the number of the cell to do it with, and the stage where it is assisted."""
    if cell := work.take():
        return "take", work.all.index(cell), Record
    if not work.pending:
        return "over", -1, Record
    if assisted := work.assist():
        log.info("%s; assisting it", holder(assisted[0].store.folder))
        return "assist", work.all.index(assisted[0]), assisted[1]
    return "wait", -1, Record


def _take_to_end(cell: Cell, runner: Runner, command: str, live: Live | None) -> None:
    """Takes a cell to its table; of a source that was not asked for, which has no ``live``, to its neurons."""
    if is_main():
        note_start(cell, command, runner)
        reopen(cell)
        if live:
            live.begin(cell.store.folder)
    runner.wait()
    if not live:
        runner.localize(cell)
        return
    runner.generate(cell)
    if is_main():
        _publish(cell)
    take_to_table(cell, runner)


def take_to_table(cell: Cell, runner: Runner) -> None:
    """Scores the images of a cell where that is not done, and writes its table."""
    if is_main():
        renew_scores(cell)
    runner.wait()
    runner.score(cell)
    if is_main():
        table = cell.store.folder / "metrics.json"
        write_json(table, summarize(cell))
        date_after(table, score_files(cell))


class Report:
    """The report of a run, written again as cells finish, which takes a tenth of the time at most.

    Args:
        folder: Of the run.
        runner: Its leases keep another run from writing at the same time, which may know less.
    """

    def __init__(self, folder: Path, runner: Runner) -> None:
        self.folder = folder
        self.runner = runner
        self._next = 0.0

    def keep_listed(self, cell: Cell) -> None:
        """Puts a finished cell on the list of the run again, if another run took it off before it was finished."""
        if cell.id not in read_run(self.folder).cells:
            with self.runner.leases.owning(self.folder):
                open_folder(self.folder, [cell])

    def write(self) -> None:
        """Writes the report if that is due and no other run does."""
        start = time.monotonic()
        if start < self._next or not self.runner.leases.claim(self.folder):
            return
        try:
            write_pages(self.folder)
        finally:
            self.runner.leases.release(self.folder)
        end = time.monotonic()
        self._next = end + 9 * (end - start)

    def write_last(self) -> None:
        """Writes the report if anything has changed since, once no other run does."""
        with self.runner.leases.owning(self.folder):
            if not is_current(self.folder):
                write_pages(self.folder)


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Has all messages of the first process also go to a file in the folder of a run, each with its time.

    Those for debugging go to that file alone, where the logging of a program that imports the package has none so far.
    """
    if not is_main():
        yield
        return
    logger = logging.getLogger("nemo_bench")
    level = logger.level
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    form = f"%(asctime)s {socket.gethostname()} {os.getpid()} %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(form))
    former = logger.getEffectiveLevel()

    def is_as_before(record: logging.LogRecord) -> bool:
        return record.levelno >= former or record.name.partition(".")[0] != logger.name

    others = [*logger.handlers, *logging.getLogger().handlers]
    for other in others:
        other.addFilter(is_as_before)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)  # at which failures have their tracebacks
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        for other in others:
            other.removeFilter(is_as_before)
        handler.close()


def report_damaged(cells: Sequence[Cell]) -> None:
    """Says how many training images can't be decoded, and how many prompts have no similarity to any for it."""
    prompts = {prompt.id: prompt for cell in cells for prompt in cell.prompts}.values()
    files = list(dict.fromkeys(file for prompt in prompts for file in prompt.damaged_references))
    if files:
        total = len({file for prompt in prompts for file in (*prompt.references, *prompt.damaged_references)})
        alone = sum(not prompt.references for prompt in prompts if prompt.damaged_references)
        why = unreadable(files[:1], "training images").get(files[0], "mended by now")
        what = f"{len(files)} of {total} training images can't be decoded and are left out: {files[0]} ({why})"
        more = ", ..." if len(files) > 1 else ""
        log.warning("%s%s. Prompts that have no other, so no similarity to training images: %d", what, more, alone)


def fetch_weights(cell: Cell) -> None:
    """Downloads the weights of metrics where scores are pending."""
    if not has_current_scores(cell):
        for metric in metrics_of(cell).values():
            metric.space.fetch()


def renew_scores(cell: Cell) -> None:
    """Forgets scores that can't stay."""
    cell.store.recount(ScoreRecord, [task.id for task in scored_tasks(cell)])
    if has_stale_scores(cell):
        _forget_scores(cell.store)
        write_json(cell.store.folder / SCORING_FILE, scoring_of(cell))


def reopen(cell: Cell) -> None:
    """Reopens finished stages that miss something; images that are made again are scored again."""
    store = cell.store
    for kind in cell.stages:
        if kind is ScoreRecord or not store.is_done(kind):
            continue
        if store.pending_ids(kind, task_ids(cell, kind)):
            _forget_scores(store)  # first, so that a kill leaves no old scores of images that are made again
            store.reopen(kind)


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
