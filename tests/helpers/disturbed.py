"""A small run that is disturbed while workers do it, and what its records must be all the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_bench.records.schema import RECORDS
from on_disk import read_records
from small_runs import small

QUICK = ["~metrics.alignment", "~metrics.diversity", "~metrics.ssim_nearest"]
WORDS = [*small(seeds=8), "batch_size=1", "method=none,embedding_noise", "prompts.limit=1", *QUICK]
"""A run whose batches no kill can cut, so that its results are equal bit for bit."""
WITHIN = 100
"""Seconds that anything may take to come about."""


def lines(root: Path) -> int:
    """Number of records that were written so far."""
    return sum(path.read_bytes().count(b"\n") for path in root.glob("**/records/*.jsonl"))


def results(root: Path) -> dict[str, Any]:
    """All records of a run without their cost, and the bytes of its images, by cell."""
    found: dict[str, Any] = {}
    for cell in sorted(path.parent for path in root.glob("*/*/spec.json")):
        for kind in RECORDS:
            for name, record in read_records(cell, kind.stage).items():
                found[f"{cell.name} {kind.stage} {name}"] = {k: v for k, v in record.items() if k != "cost"}
        found |= {f"{cell.name} {path.name}": path.read_bytes() for path in (cell / "images").iterdir()}
    return found


def wait_for(condition: Callable[[], object]) -> None:
    """Waits until something has come about."""
    end = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


@contextmanager
def meanwhile(disturb: Callable[[], None]) -> Any:
    """Does something in a thread while the block runs; an error of it is raised at the end."""
    errors = []

    def work() -> None:
        try:
            disturb()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()
    if errors:
        raise errors[0]
