"""How far a run is, read from its folder; any process may look, while others work on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_bench.benchmark.pending import is_finished
from nemo_bench.benchmark.work import FAILURE
from nemo_bench.errors import StoreError, first_line
from nemo_bench.records.io import read_whole
from nemo_bench.records.lease import is_dead, read_lease
from nemo_bench.records.schema import RECORDS, Failure, ImageRecord, Lease, LocalizationRecord, ScoreRecord, Spec
from nemo_bench.records.store import read_cell_prompts, read_records, read_run, read_spec

State = Literal["finished", "running", "failed", "pending"]


@dataclass(frozen=True)
class CellStatus:
    """How far a cell is."""

    cell: str  #: Name of its folder.
    state: State
    done: int  #: Records of all stages that are there.
    total: int | None  #: All records; None before the cell was begun for the first time.
    stage: str = ""  #: What is computed now, by whoever works on it.
    rate: float | None = None  #: Records of that stage a second.
    left: float | None = None  #: Seconds that are left of that stage.
    owner: str = ""  #: Host and process that work on it, and since when.
    failure: str = ""  #: Why it was given up, or can't be read.


def read_status(folder: Path) -> list[CellStatus]:
    """The cells of a run in the order asked for, such as of ``results/default``; sources that work goes on in as well.

    Raises:
        StoreError: The folder holds no run.
    """
    names = read_run(folder).cells
    held = [path.parent.name for path in folder.glob("*/.lease.*.json")]
    return [_of_cell(folder / name) for name in dict.fromkeys([*names, *held])]


def _of_cell(cell: Path) -> CellStatus:
    lease = read_lease(cell)
    if lease is not None and is_dead(lease):
        lease = None
    try:
        spec = read_spec(cell)
        done, total = _count(cell, spec)
    except StoreError as error:
        return CellStatus(cell.name, "running" if lease else "pending", 0, None, failure=first_line(error))
    failed = read_whole(cell / FAILURE, Failure)
    why = first_line(Exception(failed.error)) if failed else ""
    if lease is not None:
        return _running(cell.name, done, total, lease)
    state: State = "failed" if why else "finished" if is_finished(cell) else "pending"
    return CellStatus(cell.name, state, done, total, failure=why)


def _running(name: str, done: int, total: int | None, lease: Lease) -> CellStatus:
    owner = f"{lease.host} {lease.pid} since {lease.since}"
    progress = lease.progress
    if progress is None:
        return CellStatus(name, "running", done, total, owner=owner)
    left = None if progress.left is None else round(progress.left, 1)
    return CellStatus(name, "running", done, total, progress.stage, round(progress.rate, 3), left, owner)


def _count(cell: Path, spec: Spec) -> tuple[int, int | None]:
    """Records that are there, and all; the scores of a prompt with its images count once."""
    done = {}
    for kind in (kind for kind in RECORDS if kind.stage in spec.stages):
        records = read_records(cell, kind).values()
        done[kind] = sum(not isinstance(record, ScoreRecord) or record.seed is None for record in records)
    if not (cell / "prompts.jsonl").is_file():
        return sum(done.values()), None
    listed = read_cell_prompts(cell, spec)
    prompts, originals = len(listed), sum(not prompt.axis for prompt in listed)
    # External images are as many as there are.
    images = prompts * spec.settings["seeds"] if "seeds" in spec.settings else done.get(ImageRecord, 0)
    of_kind = {ImageRecord: images, LocalizationRecord: originals}
    total = sum(of_kind.get(kind, prompts) for kind in done)
    return sum(done.values()), total
