"""Starts the workers of a run and follows them to their end."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nemo_bench.benchmark.launch.base import UNFINISHED, Worker, Workers, log_folder
from nemo_bench.benchmark.pending import task_ids
from nemo_bench.benchmark.plan import Cell
from nemo_bench.benchmark.run import log_file
from nemo_bench.benchmark.runner import open_folder
from nemo_bench.benchmark.status import CellStatus, read_status
from nemo_bench.errors import LaunchError, counted
from nemo_bench.records.lease import Leases

POLL = 5.0
"""Seconds between two looks at the workers."""
PROGRESS = 60.0
"""Least seconds between two looks at the records, as long as the workers stay as they are."""

log = logging.getLogger(__name__)


def launch(cells: Sequence[Cell], overrides: Sequence[str], conf: Path | None) -> Path:
    """Has workers run what is pending of some cells, and follows them to their end.

    Args:
        cells: From :func:`nemo_bench.benchmark.plan.plan`, of one name, root and launcher other than this process.
        overrides: The ``key=value`` words that the cells were made of.
        conf: The user's folder of YAML files.

    Returns:
        The folder of the run.

    Raises:
        ConfigError: The launcher is not installed.
        LaunchError: The launcher does not start workers, or some of them failed; the others went on without them.
    """
    settings = cells[0].config.settings
    folder = cells[0].store.folder.parent
    with Leases().owning(folder):
        open_folder(folder, cells, instead=True)
    workers: Workers
    with log_file(folder):
        if settings.launcher.kind == "slurm":
            from nemo_bench.benchmark.launch.slurm import SlurmWorkers

            workers = SlurmWorkers(overrides, conf, settings)
        else:
            from nemo_bench.benchmark.launch.ray import RayWorkers

            workers = RayWorkers(overrides, conf, settings)
        log.info("%s, logs: %s", counted(settings.launcher.workers, "worker"), log_folder(settings))
        try:
            ended = _follow(workers, cells)
        finally:
            workers.stop()
    if failed := [worker for worker in ended if worker.state == "failed"]:
        lines = [f"{worker.name}: {worker.note}; {_last_line(worker.log)}" for worker in failed]
        lines += [f"{cell.cell}: {cell.failure}" for cell in _statuses(cells) if cell.state == "failed"]
        what = f"{len(failed)} of {counted(len(ended), 'worker')} failed"
        raise LaunchError("\n  ".join([f"{what}; what is finished is kept, and the same command goes on", *lines]))
    return folder


def _follow(workers: Workers, cells: Sequence[Cell]) -> list[Worker]:
    """Says how the workers are and how far the cells, until all workers are over; gives what became of them."""
    total = sum(len(task_ids(cell, kind)) for cell in cells for kind in cell.stages)
    failures = {cell.failure for cell in _statuses(cells)}  # of earlier tries
    shown = trouble = ""
    due = 0.0
    while True:
        try:
            found = workers.look()
        except LaunchError as error:  # such as of a controller that restarts
            if str(error) != trouble:
                trouble = str(error)
                log.warning("%s; asked again every %g s", trouble, POLL)
            time.sleep(POLL)
            continue
        states = _states(found)
        is_over = not any(worker.state in UNFINISHED for worker in found)
        start = time.monotonic()
        if states != shown or start >= due or is_over:
            statuses = _statuses(cells)
            for cell in statuses:
                if cell.failure and cell.failure not in failures:
                    failures.add(cell.failure)
                    log.error("%s failed: %s", cell.cell, cell.failure)
            finished = sum(cell.state == "finished" for cell in statuses)
            done = sum(cell.done for cell in statuses)
            rest = f"{finished:,} of {counted(len(cells), 'cell')} and {done:,} of {counted(total, 'record')} done"
            log.info("workers: %s; %s", states, rest)
            if finished == len(cells) and any(worker.state == "waiting" for worker in found):
                try:
                    workers.release()
                except LaunchError as error:
                    log.warning("%s; workers that wait end by themselves once they begin", error)
            shown = states
            end = time.monotonic()
            due = end + max(PROGRESS, 20 * (end - start))  # looking takes a twentieth of the time at most
        if is_over:
            return found
        time.sleep(POLL)


def _states(workers: Sequence[Worker]) -> str:
    """Such as ``3 running, 1 waiting (Resources)``."""
    parts = []
    for state, count in Counter(worker.state for worker in workers).items():
        why = {worker.note for worker in workers if worker.state == state == "waiting" and worker.note}
        parts.append(f"{count} {state}" + (f" ({', '.join(sorted(why))})" if why else ""))
    return ", ".join(parts)


def _statuses(cells: Sequence[Cell]) -> list[CellStatus]:
    """How far those cells are."""
    names = {cell.id for cell in cells}
    return [status for status in read_status(cells[0].store.folder.parent) if status.cell in names]


def _last_line(file: Path) -> str:
    """The last line of a log and its place."""
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines() if file.is_file() else []
    return f"{lines[-1].strip()} ({file})" if lines else f"it printed nothing ({file})"
