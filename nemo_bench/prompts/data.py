"""Batches of tasks for a predict loop, which processes take as they get free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
from torch import distributed
from torch.utils.data import DataLoader
from typing_extensions import override


class Counters:
    """Counters that all processes of a run share, in the store of their process group."""

    def __init__(self) -> None:
        self._own: dict[str, int] = {}

    def add(self, name: str, amount: int) -> int:
        """Adds to a counter, which begins with 0, and gives the sum; never the same sum to two processes."""
        if distributed.is_available() and distributed.is_initialized():
            return int(distributed.distributed_c10d._get_default_store().add(name, amount))
        self._own[name] = self._own.get(name, 0) + amount
        return self._own[name]


class SharedBatches:
    """Batches in their order, each for the process that asks next.

    This is no sampler of Lightning's: those deal tasks out beforehand, though they differ tenfold in cost, and fail
    where there are fewer tasks than processes. Batches do not depend on the number of processes.

    Args:
        batches: All batches.
        take: Gives 1, 2, ... in turn, each number to one process.
        read: Makes a batch of tasks into what the stage takes.
        workers: Processes that read ahead.
        is_pending: Whether another run has left a batch to do; asked when the batch is taken.
        skip: Called with the number of tasks of each batch that another run has done.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[Any]],
        take: Callable[[], int],
        read: Callable[[Any], Any] = list,
        workers: int = 0,
        is_pending: Callable[[Sequence[Any]], bool] = bool,
        skip: Callable[[int], None] = lambda tasks: None,
    ) -> None:
        self.batches = batches
        self.take = take
        self.read = read
        self.workers = workers
        self.is_pending = is_pending
        self.skip = skip

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        tasks = [task for batch in self.batches for task in batch]
        workers = min(self.workers, len(tasks))
        # Workers take no more ahead than they must, which other processes could do.
        ahead = {"num_workers": workers, "prefetch_factor": 1 if workers else None}
        yield from DataLoader(tasks, batch_sampler=self._taken(), collate_fn=self.read, **ahead)  # type: ignore[arg-type]

    def _taken(self) -> Iterator[list[int]]:
        starts = [0]
        for batch in self.batches:
            starts.append(starts[-1] + len(batch))
        while (number := self.take()) <= len(self.batches):
            batch = self.batches[number - 1]
            if self.is_pending(batch):
                yield list(range(starts[number - 1], starts[number]))
            else:
                self.skip(len(batch))


class PromptDataModule(L.LightningDataModule):
    """Gives every process the next batch of pending tasks when it is free; see :class:`SharedBatches`."""

    def __init__(self, batches: SharedBatches) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.batches = batches

    @override
    def predict_dataloader(self) -> SharedBatches:
        return self.batches
