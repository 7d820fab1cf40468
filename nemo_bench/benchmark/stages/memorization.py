"""The memorization score of each prompt with the method applied."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from nemo_bench.benchmark.stages.base import UNLOCALIZED, Stage, file_name, to_image
from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.errors import NotFiniteError
from nemo_bench.localization import noise_differences, pair_similarities, pair_values
from nemo_bench.methods import Batch, Method
from nemo_bench.prompts.tasks import Task, seeds_of
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.io import batched
from nemo_bench.records.schema import Cost, MemorizationRecord
from nemo_bench.records.store import Store

PICTURED_SEEDS = 4
"""Number of seeds whose noise differences are pictured."""


class MemorizationStage(Stage[MemorizationRecord]):
    """Similarity of the noise differences of all pairs of seeds; a prompt of which they are not finite fails.

    Of a record's cost, ``once_row_passes`` and ``once_seconds`` are what the method takes once for a prompt before the
    score is measured.

    Args:
        model: The model.
        method: Gives the mitigation, set up; the first call counts to the first prompt.
        neurons: Localized neurons by prompt id; other prompts fail.
        seeds: Seeds a prompt.
        batch_size: Rows in a UNet pass at most.
        store: Where records go.
    """

    def __init__(
        self,
        model: Diffusion,
        method: Callable[[], Method],
        neurons: Mapping[str, Neurons],
        seeds: int,
        batch_size: int,
        store: Store,
    ) -> None:
        super().__init__(store, MemorizationRecord)
        self.model = model
        self.method = method
        self.neurons = neurons
        self.seeds = seeds
        self.batch_size = batch_size

    @override
    def handle(self, tasks: Sequence[Task]) -> list[MemorizationRecord]:
        return [self._measure(task) for task in tasks]

    def _measure(self, task: Task) -> MemorizationRecord:
        model, prompt = self.model, task.prompt
        record = MemorizationRecord(id=task.id, prompt=prompt.id, truncated=model.truncated(prompt.text))
        if prompt.id not in self.neurons:
            return record.model_copy(update={"failed": UNLOCALIZED})
        start = time.perf_counter()
        before = model.row_passes
        once = Cost()
        try:
            method = self.method()
            method.prepare_prompts(model, [prompt])
            seconds = round(time.perf_counter() - start, 4)
            once = Cost(once_row_passes=model.row_passes - before, once_seconds=seconds)
            differences = self._differences(method, prompt)
            pairs = pair_values(pair_similarities(differences, model.similarity))
            require_finite("noise differences with the method applied", pairs)
        except NotFiniteError as error:
            cost = once.model_copy(update={"row_passes": model.row_passes - before})
            return record.model_copy(update={"failed": str(error), "cost": cost})
        picture = strip(differences[:PICTURED_SEEDS])
        return record.model_copy(
            update={
                "score": float(pairs.mean()),
                "image": self.store.save_image(f"noise/{file_name(prompt)}.png", picture),
                "cost": once.model_copy(update={"row_passes": model.row_passes - before}),
            }
        )

    def _differences(self, method: Method, prompt: Prompt) -> Tensor:
        """Noise differences with the method applied, (seeds, channels, height, width)."""
        seeds = seeds_of(prompt, "localize", range(self.seeds))
        latents = self.model.latents(seeds)
        text = self.model.encode([prompt.text])
        parts = []
        for rows in batched(range(self.seeds), self.batch_size):
            size = len(rows)
            batch = Batch(
                (prompt,) * size,
                text.rows([0] * size),
                latents[rows[0] : rows[-1] + 1],
                tuple(seeds[row] for row in rows),
                (self.neurons[prompt.id],) * size,
            )
            with method.apply(self.model, batch) as changed:
                parts.append(noise_differences(self.model, changed.text, changed.latents))
        return torch.cat(parts)


def strip(differences: Tensor) -> Image.Image:
    """Noise differences side by side, their first three channels as colors.

    Args:
        differences: (N, channels, H, W) in [0, 1], at least three channels.
    """
    return to_image(torch.cat(list(differences[:, :3]), dim=2))
