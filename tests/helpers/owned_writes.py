"""Which files of a run are written by a process that does not own its folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_bench.records import io
from nemo_bench.records.lease import read_lease
from nemo_bench.records.writers import place


def watch_writes(patch: pytest.MonkeyPatch, folder: Path) -> tuple[set[str], set[str]]:
    """Names of the files that are written into a folder from now on: as its owner, and else."""
    held: set[str] = set()
    others: set[str] = set()
    replacing = io.replacing

    @contextmanager
    def watched(path: Path) -> Iterator[Path]:
        if path.parent == folder and not path.name.startswith(".lease."):
            lease = read_lease(folder)
            is_own = lease is not None and (lease.place, lease.pid) == (place(), os.getpid())
            (held if is_own else others).add(path.name)
        with replacing(path) as part:
            yield part

    for name, module in list(sys.modules.items()):
        if name.startswith("nemo_bench.") and getattr(module, "replacing", None) is replacing:
            patch.setattr(module, "replacing", watched)
    return held, others
