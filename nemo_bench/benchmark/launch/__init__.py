"""Runs past one machine: workers that take one cell after another from a shared results folder.

A launcher starts the workers, keeps them alive and says how they are. It hands out no work: every worker is the command
``nemo-bench run`` itself, which takes the next cell without an owner, so that what a dead worker leaves is not lost.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from nemo_bench.benchmark.launch.base import worker_words
from nemo_bench.config import RunSettings
from nemo_bench.errors import ConfigError


def check_launcher(settings: RunSettings, shard: tuple[int, int] | None = None) -> None:
    """Raises ConfigError where several workers are asked for of this process, or a share of the cells for workers."""
    kind, workers = settings.launcher.kind, settings.launcher.workers
    if kind == "local" and workers > 1:
        raise ConfigError(
            f"launcher=local is this process alone, but launcher.workers={workers}: add launcher=slurm or "
            "launcher=ray, or --print for commands to be started by hand"
        )
    if kind != "local" and shard:
        raise ConfigError(
            f"--shard {shard[0]}/{shard[1]}: workers of launcher={kind} take the next cell by themselves; leave "
            "out one of the two"
        )


def printed(overrides: Sequence[str], conf: Path | None, settings: RunSettings) -> str:
    """What would be started: the batch script for Slurm, else a command for each worker, with its share of cells."""
    if settings.launcher.kind == "slurm":
        from nemo_bench.benchmark.launch.slurm import script

        return script(overrides, conf, settings)
    count = settings.launcher.workers
    line = shlex.join(["nemo-bench", *worker_words(overrides, conf)])
    return "".join(f"{line} --shard {number}/{count}\n" for number in range(1, count + 1))
