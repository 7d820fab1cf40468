"""How far a stage is: a bar on a terminal, else a line now and then; both over all processes."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import lightning as L
from tqdm import tqdm
from typing_extensions import override

from nemo_bench.prompts.data import Counters
from nemo_bench.records import schema

FIRST, LONGEST = 10.0, 600.0
"""Seconds before the first line of a stage, and at most between two: each takes as long as all before it."""

log = logging.getLogger(__name__)


class ProgressReport(L.Callback):
    """Counts the records of a stage over all processes, and shows them where the first one is.

    Args:
        counters: Counters of the processes.
        show: Whether anything is shown.
    """

    def __init__(self, counters: Counters, *, show: bool = True) -> None:
        self.counters = counters
        self.show = show
        self.listeners: list[Callable[[schema.Progress], None]] = []
        """Called after each batch of the first process."""
        self._progress: schema.Progress | None = None
        self._before = 0
        self._start = self._next = 0.0
        self._name = ""
        self._bar: tqdm[Any] | None = None

    def begin(self, name: str, stage: str, label: str, done: int, total: int) -> None:
        """Begins to count; ``name`` is that of no other stage of this run."""
        self._name = name
        self._before = done
        self._progress = schema.Progress(stage=stage, label=label, done=done, total=total, seconds=0, computed=0)
        self._start = time.monotonic()
        self._next = FIRST

    def add(self, records: Sequence[schema.Record], tasks: int, *, is_main: bool) -> None:
        """Counts tasks that this process finished, and their records."""
        computed, skipped = self.counters.add(f"{self._name} done", tasks), self.counters.add(self._skipped, 0)
        before = self._progress
        if before is None or not is_main:
            return
        costs = [record.cost.row_passes for record in records if record.cost and record.cost.row_passes]
        self._progress = before.model_copy(
            update={
                "done": self._before + skipped + computed,
                "computed": computed,
                "seconds": time.monotonic() - self._start,
                "failed": before.failed + sum(record.failed is not None for record in records),
                "row_passes": before.row_passes + sum(costs),
            }
        )
        self._display(self._progress)
        for listener in self.listeners:
            listener(self._progress)

    def skip(self, tasks: int) -> None:
        """Counts tasks that another run finished meanwhile: they are done, and say nothing of how fast this run is."""
        self.counters.add(self._skipped, tasks)

    @property
    def _skipped(self) -> str:
        return f"{self._name} skipped"

    def end(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._progress = None

    def _display(self, progress: schema.Progress) -> None:
        if not self.show:
            return
        if sys.stderr.isatty():
            if self._bar is None:
                name = f"{progress.stage:>12} {progress.label:<8}"
                self._bar = tqdm(total=progress.total, initial=progress.done - progress.computed, desc=name)
            self._bar.update(progress.done - self._bar.n)
        elif progress.seconds >= self._next and progress.done < progress.total:
            log.info("%s %s", time.strftime("%H:%M:%S"), line(progress))
            self._next = progress.seconds + min(progress.seconds, LONGEST)

    @override
    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any, **options: Any
    ) -> None:
        self.add(pl_module.written, len(batch), is_main=trainer.is_global_zero)


def line(progress: schema.Progress) -> str:
    """A line such as ``generate nemo: 20 of 144, 3.2 a second, 0:00:39 left``."""
    rate = f"{progress.rate:.1f} a second" if progress.rate >= 1 else f"{1 / max(progress.rate, 1e-9):.1f} s each"
    left = f", {timedelta(seconds=round(progress.left))} left" if progress.left is not None else ""
    return f"{progress.stage} {progress.label}: {progress.done:,} of {progress.total:,}, {rate}{left}"
