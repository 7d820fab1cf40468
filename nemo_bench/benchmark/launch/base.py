"""Workers of a run: what starts one, and what a launcher says of those that it started."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_bench.config import RunSettings
from nemo_bench.config.schema import words_within

UNFINISHED = ("waiting", "running")
"""States of workers that are not over."""


@dataclass(frozen=True)
class Worker:
    """What is known of a worker now."""

    name: str  #: Such as ``1234_0``.
    state: Literal["waiting", "running", "done", "failed"]
    note: str  #: Why it waits or failed, or where it runs.
    log: Path  #: What it printed, in all of its tries.


class Workers(ABC):
    """The workers of a run that a launcher started."""

    @abstractmethod
    def look(self) -> list[Worker]:
        """What is known of each worker now."""

    @abstractmethod
    def release(self) -> None:
        """Takes back workers that wait for a machine, once nothing is left to do; they count as done."""

    @abstractmethod
    def stop(self) -> None:
        """Stops workers that are not over as Ctrl-C does, and lets go of the launcher."""


def worker_words(overrides: Sequence[str], conf: Path | None) -> list[str]:
    """What follows ``nemo-bench`` in the command of a worker: the same run, in the worker's own process."""
    of_launcher = words_within(overrides, ["launcher"])
    own = [word for word in overrides if word not in of_launcher]
    return ["run", *own, "launcher=local", "launcher.workers=1", *(["--conf", str(conf.resolve())] if conf else [])]


def worker_command(overrides: Sequence[str], conf: Path | None) -> list[str]:
    """The command of a worker, in this Python."""
    return [sys.executable, "-m", "nemo_bench", *worker_words(overrides, conf)]


def log_folder(settings: RunSettings) -> Path:
    """Where the logs of workers go."""
    return (Path(settings.root) / settings.name / "logs").resolve()


def threads(settings: RunSettings) -> int:
    """Threads of each rank of a worker."""
    return max(1, settings.launcher.cpus // (settings.trainer.devices or 1))
