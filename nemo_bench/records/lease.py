"""Leases: one run at a time works on a folder, and a run that died loses it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from nemo_bench.errors import StoreError, UnwritableError
from nemo_bench.records.io import read_file, write_json, writing
from nemo_bench.records.schema import Lease, Progress
from nemo_bench.records.writers import place, process

BEAT = 5.0
"""Seconds between two signs of life of an owner."""
PATIENCE = 60.0
"""Seconds without one after which an owner on another machine counts as dead; many, since shared file systems lag."""
POLL = 2.0
"""Seconds between two looks whether another run is through with something."""
_NAME = re.compile(r"\.lease\.(\d+)\.json")

log = logging.getLogger(__name__)


class Leases:
    """The folders that this process owns; a thread gives signs of life as long as there are any.

    The owner of a folder is named in ``.lease.<n>.json``, of several such files in the one with the highest number: who
    takes a folder from a dead owner makes the file with the next number, which only one can make. Whether an owner is
    alive is known by its process where that is on this machine, else by whether its file changes; no clock is compared.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._own: dict[Path, tuple[Path, Lease]] = {}
        self._seen: dict[Path, tuple[tuple[Path, bytes], float]] = {}
        self._lock = threading.Lock()
        self._beating: threading.Thread | None = None

    def claim(self, folder: Path) -> bool:
        """Takes a folder, which is made if need be, unless another run has it.

        Raises:
            UnwritableError: It can't be written to; nothing is left in it.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files = _files(folder)
        if files and not self._is_dead(folder, files[-1]):
            return False
        number = int(_NAME.fullmatch(files[-1].name)[1]) + 1 if files else 0  # type: ignore[index]
        path = folder / f".lease.{number}.json"
        own = Lease(
            host=socket.gethostname(),
            pid=os.getpid(),
            process=process(os.getpid()),
            place=place(),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        with writing(path):
            try:
                path.open("x").close()
            except FileExistsError:
                return False
        try:
            write_json(path, own)
        except UnwritableError:
            path.unlink(missing_ok=True)  # an empty file counts as that of an owner who is just writing it
            raise
        for file in files:
            file.unlink(missing_ok=True)
        with self._lock:
            self._own[folder] = (path, own)
            if self._beating is None:
                self._beating = threading.Thread(target=self._beat, daemon=True, name="leases")
                self._beating.start()
        return True

    @contextlib.contextmanager
    def owning(self, folder: Path) -> Iterator[None]:
        """Owns a folder, once no other run does; it is said of whom this one waits for."""
        waited = False
        while not self.claim(folder):
            if not waited:
                log.info("%s; waiting", holder(folder))
            waited = True
            time.sleep(POLL)
        try:
            yield
        finally:
            self.release(folder)

    def note(self, progress: Progress) -> None:
        """Adds progress to the next sign of life in every folder."""
        with self._lock:
            self._own = {
                folder: (path, own.model_copy(update={"progress": progress}))
                for folder, (path, own) in self._own.items()
            }

    def release(self, folder: Path) -> None:
        """Gives a folder back; nothing where it is not owned."""
        with self._lock:
            path, own = self._own.pop(folder, (None, None))
        if path and own and _is_of(read_lease(folder), own):
            path.unlink(missing_ok=True)

    def release_all(self) -> None:
        """Gives every folder back."""
        for folder in list(self._own):
            self.release(folder)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            with self._lock:
                for folder, (path, own) in list(self._own.items()):
                    # A full disk ends the run where it writes its results; a mount may be away for a moment.
                    with contextlib.suppress(OSError):
                        owner = read_lease(folder)
                        if owner is not None and not _is_of(owner, own):
                            # This one was taken for dead, such as after a machine slept; records of both are the same.
                            log.warning("%s: another run took over", folder)
                            del self._own[folder]
                            continue
                        own = own.model_copy(update={"beat": own.beat + 1})
                        self._own[folder] = (path, own)
                        write_json(path, own)
                if not self._own:
                    self._beating = None
                    return

    def _is_dead(self, folder: Path, path: Path) -> bool:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False  # it was given back or taken over just now
        lease = read_lease(folder)
        if lease and lease.place == place():
            return is_dead(lease)
        seen, since = self._seen.get(folder, (None, 0.0))
        if seen != (path, content):
            self._seen[folder] = ((path, content), time.monotonic())
            return False
        return time.monotonic() - since > self.patience


def read_lease(folder: Path) -> Lease | None:
    """Who has a folder, whether alive or not; None where nobody does or its file is being written."""
    for path in reversed(_files(folder)):
        try:
            return read_file(path, Lease)
        except StoreError:
            return None
    return None


def holder(folder: Path) -> str:
    """Who works on a folder, and since when, for a message."""
    lease = read_lease(folder)
    if lease is None:
        return f"{folder}: another run works on it"
    return f"{folder}: process {lease.pid} on {lease.host} has been working on it since {lease.since}"


def _is_of(lease: Lease | None, own: Lease) -> bool:
    """Whether a lease is the one given, at any sign of life."""
    return lease is not None and (lease.place, lease.process, lease.since) == (own.place, own.process, own.since)


def is_dead(lease: Lease) -> bool:
    """Whether an owner is known to be dead: its process was on this machine, and is no more."""
    return lease.place == place() and lease.process != process(lease.pid)


def _files(folder: Path) -> list[Path]:
    """Files of leases, the owner's last."""
    found = [(int(match[1]), path) for path in folder.glob(".lease.*.json") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
