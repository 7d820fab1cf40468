"""Activation statistics and similarities of noise differences of general prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from nemo_bench.benchmark.stages.base import CHUNK, Stage
from nemo_bench.diffusion import Diffusion
from nemo_bench.localization import (
    ENCODED,
    PAPER,
    Protocol,
    activation_moments,
    pair_scores,
    save_moments,
)
from nemo_bench.prompts.data import PromptTask
from nemo_bench.records.data import Prompt, Record
from nemo_bench.records.io import digest
from nemo_bench.records.store import Store


class PromptChunk(NamedTuple):
    """Prompts whose activation statistics are taken together.

    Attributes:
        id: Record id.
        texts: The prompts, at most :data:`CHUNK`.
    """

    id: str
    texts: tuple[str, ...]

    @classmethod
    def split(cls, prompts: Sequence[Prompt]) -> list[PromptChunk]:
        """Chunks of some prompts, in their order; ids depend on the prompts' ids alone."""
        parts = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
        return [cls(digest([p.id for p in part]), tuple(p.text for p in part)) for part in parts]

    @property
    def file(self) -> str:
        """Where its moments lie, in the folder of the store."""
        return f"statistics/{self.id}.safetensors"


class StatisticsStage(Stage):
    """Moments of the activations of general prompts, from which mean and standard deviation come.

    Args:
        model: The model.
        store: Where files and records go.
    """

    def __init__(self, model: Diffusion, store: Store) -> None:
        super().__init__(store, "statistics")
        self.model = model

    def handle(self, tasks: Sequence[PromptChunk]) -> list[Record]:
        """Moments of each chunk; no UNet pass is needed."""
        for chunk in tasks:
            path = self.store.folder / chunk.file
            path.parent.mkdir(exist_ok=True)
            batches = (chunk.texts[i : i + ENCODED] for i in range(0, len(chunk.texts), ENCODED))
            save_moments(path, activation_moments(self.model, batches))
        return [{"id": chunk.id, "file": chunk.file, "prompts": len(chunk.texts)} for chunk in tasks]


class CalibrationStage(Stage):
    """Pairwise similarity of noise differences of general prompts, from which the threshold comes.

    Args:
        model: The model.
        seeds: Seeds a prompt.
        store: Where records go.
        protocol: How noise differences are taken.
        batch_size: Rows in a UNet pass at most.
    """

    def __init__(
        self, model: Diffusion, seeds: int, store: Store, protocol: Protocol = PAPER, batch_size: int = 32
    ) -> None:
        super().__init__(store, "calibrate")
        self.model, self.seeds, self.protocol, self.batch_size = model, seeds, protocol, batch_size

    def handle(self, tasks: Sequence[PromptTask]) -> list[Record]:
        """Pairwise similarities, several prompts in one batch."""
        before = self.model.row_passes
        scores = pair_scores(self.model, [t.prompt for t in tasks], self.seeds, self.protocol, self.batch_size)
        each = (self.model.row_passes - before) // len(tasks)
        return [
            {"id": task.id, "prompt": task.prompt.id, **_pairs(pairs), "cost": {"row_passes": each}}
            for task, pairs in zip(tasks, scores, strict=True)
        ]


def _pairs(pairs: Sequence[float]) -> Record:
    """The similarities of a calibration record; why there are none where one of them is not finite."""
    return {"pairs": pairs} if all(map(math.isfinite, pairs)) else {"failed": "noise differences are not finite"}
