"""Work for the predict loops: what is still open, shared out over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import lightning as L
from torch.utils.data import DataLoader

from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest
from nemo_bench.records.store import Store


def seeds_of(prompt: Prompt, purpose: str, seeds: Iterable[int]) -> list[int]:
    """Generator seeds of a prompt, by its id, so that order, batches and processes can't change them.

    Args:
        prompt: The prompt.
        purpose: ``"localize"`` or ``"generate"``: localizing never sees the noise that images start from.
        seeds: Numbers from 0.

    Returns:
        Seeds from 0 to 2^63 - 1.
    """
    return [int(digest([purpose, prompt.id, seed]), 16) >> 1 for seed in seeds]


class PromptTask(NamedTuple):
    """A prompt to be handled as a whole.

    Attributes:
        id: Record id.
        prompt: The prompt.
    """

    id: str
    prompt: Prompt

    @classmethod
    def from_prompt(cls, prompt: Prompt) -> PromptTask:
        """The task of a prompt; its id depends on the prompt's id alone."""
        return cls(digest([prompt.id]), prompt)


class ImageTask(NamedTuple):
    """One image of a prompt.

    Attributes:
        id: Record id.
        prompt: The prompt.
        seed: Number of the image among those of the prompt, from 0.
    """

    id: str
    prompt: Prompt
    seed: int

    @classmethod
    def from_prompt(cls, prompt: Prompt, seed: int) -> ImageTask:
        """The task of an image; its id depends on prompt id and seed alone."""
        return cls(digest([prompt.id, seed]), prompt, seed)


Task = TypeVar("Task", PromptTask, ImageTask)


class PromptDataModule(L.LightningDataModule, Generic[Task]):
    """Gives every process its part of the tasks that have no record yet.

    Lightning's own sampler is not used: it fails where fewer tasks than processes are open. Rank 0 alone reads what is
    done, so that all ranks share out the same list while records are being written.

    Args:
        tasks: All tasks of the stage.
        store: Where the records are.
        stage: Name of the stage.
        batch_size: Tasks in a batch.
        read: Makes a batch of tasks into what the stage takes.
        workers: Processes that read ahead.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        store: Store,
        stage: str,
        batch_size: int,
        read: Callable[[list[Task]], Any] = list,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.tasks: dict[str, Task] = {task.id: task for task in tasks}
        self.store, self.stage_name, self.batch_size = store, stage, batch_size
        self.read: Callable[[list[Task]], Any] = read
        self.workers = workers
        self.open: list[Task] = []

    def setup(self, stage: str) -> None:
        """Shares out the open tasks: rank r of w takes every w-th, beginning with the r-th."""
        trainer = self.trainer
        assert trainer is not None
        todo = self.store.pending_ids(self.stage_name, self.tasks) if trainer.is_global_zero else []
        todo = trainer.strategy.broadcast(todo)
        self.open = [self.tasks[i] for i in todo[trainer.global_rank :: trainer.world_size]]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of open tasks, read."""
        options: dict[str, Any] = {"collate_fn": self.read, "num_workers": min(self.workers, len(self.open))}
        return DataLoader(self.open, batch_size=self.batch_size, **options)  # type: ignore[arg-type]
