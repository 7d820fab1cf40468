"""Tasks of the predict loops, and how pending ones are shared out over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import lightning as L
from torch.utils.data import DataLoader
from typing_extensions import override

from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest, seed_of


def seeds_of(prompt: Prompt, purpose: str, seeds: Iterable[int]) -> list[int]:
    """Generator seeds of a prompt, by its id, so that order, batches and processes can't change them.

    Args:
        prompt: The prompt.
        purpose: ``"localize"`` or ``"generate"``: localizing never sees the noise that images start from.
        seeds: Numbers from 0.

    Returns:
        Seeds from 0 to 2^63 - 1.
    """
    return [seed_of([purpose, prompt.id, seed]) for seed in seeds]


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


class PromptDataModule(L.LightningDataModule):
    """Gives every process its part of the pending tasks.

    Lightning's own sampler is not used: it fails where fewer tasks than processes are pending. Rank 0 alone reads what
    is done, so that all ranks share out the same list while records are being written.

    Args:
        pending: Finds the pending tasks, in their order; called on rank 0.
        batch_size: Tasks in a batch.
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
