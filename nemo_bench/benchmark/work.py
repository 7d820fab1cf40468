"""Which cell a run works on next, where several runs may work on one folder."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone

from nemo_bench.benchmark.pending import is_up_to_date, task_ids
from nemo_bench.benchmark.plan import Cell, with_sources
from nemo_bench.benchmark.processes import is_main
from nemo_bench.benchmark.runner import MADE
from nemo_bench.errors import NemoBenchError, StoreError, counted, first_line
from nemo_bench.records import schema
from nemo_bench.records.io import read_whole, stated_version, write_json
from nemo_bench.records.lease import Leases, read_lease
from nemo_bench.records.schema import Failure, LocalizationRecord, Record

LOG_FILE = "run.log"
"""Messages of all runs on the folder of a run."""
FAILURE = "failure.json"
ASSISTED = 120.0
"""Seconds that a stage of another run has to take still for a run without work to assist it; that may load a model."""

log = logging.getLogger(__name__)


class Work:
    """The cells that a run takes to their end, and those that it gave up.

    Args:
        cells: Cells that are asked for.
        leases: Of this process.
        shard: ``(i, n)``: every n-th cell alone, from the i-th of 1 to n, with what these start from; None for all.
    """

    def __init__(self, cells: Sequence[Cell], leases: Leases, shard: tuple[int, int] | None = None) -> None:
        self.all = in_order(cells)
        self._by_folder = {cell.store.folder: cell for cell in self.all}
        wanted = self.all
        if shard:
            number, count = shard
            wanted = [need for cell in self.all[number - 1 :: count] for need in [*self._needs(cell), cell]]
        #: Cells that are not over as far as this run knows; of the first process alone, which hands them out.
        self.pending = [cell for cell in self.all if is_main() and cell in wanted and not _is_over(cell, cells)]
        self.failed: dict[Cell, Exception] = {}
        self._asked = cells
        self._leases = leases
        self._failures = {cell: _failure(cell) for cell in self.pending}
        self._assisted: set[tuple[Cell, type[Record]]] = set()

    def take(self) -> Cell | None:
        """Owns the next cell that can be worked on; None where all are over, or others have to finish theirs first."""
        for cell in list(self.pending):
            missing = self._needs(cell)
            failure = _failure(cell)
            if lost := [other for other in missing if other in self.failed]:
                self.give_up(cell, NemoBenchError(f"it needs {lost[0].id}, which failed"))
            elif failure is not None and failure != self._failures[cell]:
                self.give_up(cell, NemoBenchError(f"another run gave it up: {failure.error}"), is_new=False)
            elif not any(other in self.pending for other in missing) and self._leases.claim(cell.store.folder):
                cell.store.upgrade()
                cell.store.set_damaged_aside()
                if not _is_over(cell, self._asked):
                    return cell
                self.finish(cell)
        return None

    def assist(self) -> tuple[Cell, type[Record]] | None:
        """A cell of another run and its stage, where that takes so long that two are faster; each stage once."""
        for cell in self.pending:
            lease = read_lease(cell.store.folder)
            progress = lease.progress if lease else None
            if progress is None or (progress.left or 0) < ASSISTED or any(o in self.pending for o in self._needs(cell)):
                continue
            if stated_version(cell.store.folder / "spec.json") != schema.VERSION:
                continue  # its owner is an older program, which can't read what this one would write
            for kind in MADE:
                if kind.stage == progress.stage and (cell, kind) not in self._assisted:
                    self._assisted.add((cell, kind))
                    return cell, kind
        return None

    def finish(self, cell: Cell) -> None:
        """Gives a cell back that is over."""
        self.pending.remove(cell)
        (cell.store.folder / FAILURE).unlink(missing_ok=True)
        self._leases.release(cell.store.folder)

    def give_up(self, cell: Cell, error: Exception, *, is_new: bool = True) -> None:
        """Gives a cell back that failed, and notes why."""
        self.pending.remove(cell)
        self.failed[cell] = error
        if is_new and cell.store.folder.is_dir():
            failure = Failure(
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                host=socket.gethostname(),
                pid=os.getpid(),
                error=str(error) or type(error).__name__,
                log=LOG_FILE,
            )
            write_json(cell.store.folder / FAILURE, failure)
        self._leases.release(cell.store.folder)
        log.error("%s failed: %s", cell.id, first_line(error))
        log.debug("%s", cell.id, exc_info=error)

    def check(self) -> None:
        """Raises the error that all cells have which were given up, or one that names all of them."""
        if not self.failed:
            return
        first = next(iter(self.failed.values()))
        if isinstance(first, NemoBenchError) and len({str(error) for error in self.failed.values()}) == 1:
            raise first
        failed = "".join(f"\n  {cell.id}: {first_line(error)}" for cell, error in self.failed.items())
        folder = next(iter(self.failed)).store.folder.parent
        raise NemoBenchError(f"{counted(len(self.failed), 'cell')} failed, see {folder / LOG_FILE}:{failed}") from first

    def _needs(self, cell: Cell) -> list[Cell]:
        """Cells of the run that have to come first."""
        needs = []
        if cell.unmitigated and (other := self._by_folder.get(cell.unmitigated.folder)):
            needs.append(other)
        if cell.source and not cell.store.is_done(LocalizationRecord):
            needs += [] if cell.source.store.is_done(LocalizationRecord) else [*self._needs(cell.source), cell.source]
        return needs


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells and the sources that were not asked for: first what others start from or are compared with."""
    ordered = with_sources(cells)
    first = {cell.source for cell in ordered}
    compared = {cell.unmitigated.folder for cell in ordered if cell.unmitigated}
    return sorted(ordered, key=lambda cell: (cell not in first) and cell.store.folder not in compared)


def _is_over(cell: Cell, asked: Iterable[Cell]) -> bool:
    try:
        if cell in asked:
            return is_up_to_date(cell)
        return not cell.store.pending_ids(LocalizationRecord, task_ids(cell, LocalizationRecord))
    except StoreError:  # damaged lines are set aside by who owns the cell
        return False


def _failure(cell: Cell) -> Failure | None:
    return read_whole(cell.store.folder / FAILURE, Failure)
