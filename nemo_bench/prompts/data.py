"""Pending tasks of a predict loop, shared out over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader
from typing_extensions import override


class PromptDataModule(L.LightningDataModule):
    """Gives every process its part of the pending tasks.

    Lightning's own sampler is not used: it fails where fewer tasks than processes are pending. Rank 0 alone reads what
    is done, so that all ranks share out the same list while records are being written.

    Args:
        pending: Finds the pending tasks, in their order; called on rank 0.
        batch_size: Most tasks in a batch.
        read: Makes a batch of tasks into what the stage takes.
        workers: Processes that read ahead.
    """

    def __init__(
        self,
        pending: Callable[[], Sequence[Any]],
        batch_size: int,
        read: Callable[[list[Any]], Any] = list,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.pending = pending
        self.batch_size = batch_size
        self.read = read
        self.workers = workers
        self.tasks: Sequence[Any] = []

    @override
    def setup(self, stage: str) -> None:
        trainer = self.trainer
        assert trainer is not None
        pending = trainer.strategy.broadcast(self.pending() if trainer.is_global_zero else [])
        # Rank r of w takes every w-th, beginning with the r-th.
        self.tasks = pending[trainer.global_rank :: trainer.world_size]

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        options: dict[str, Any] = {"collate_fn": self.read, "num_workers": min(self.workers, len(self.tasks))}
        return DataLoader(self.tasks, batch_size=self.batch_size, **options)  # type: ignore[arg-type]
