"""Which files of a run are written by a process that does not own its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_bench.records import io
from nemo_bench.records.lease import read_lease


def watch_writes(patch: pytest.MonkeyPatch, folder: Path) -> tuple[set[str], set[str]]:
    """Names of the files that are written into a folder from now on: with its lease held, and without."""
    held: set[str] = set()
    others: set[str] = set()
    replacing = io.replacing

    @contextmanager
    def watched(path: Path) -> Iterator[Path]:
        if path.parent == folder and not path.name.startswith(".lease."):
            (held if read_lease(folder) else others).add(path.name)
        with replacing(path) as part:
            yield part

    patch.setattr(io, "replacing", watched)
    return held, others
