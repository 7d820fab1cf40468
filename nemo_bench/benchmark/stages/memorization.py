"""The memorization score of each prompt with the method applied."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_bench.benchmark.stages.base import UNLOCALIZED, Stage, file_name, to_image
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.errors import NotFiniteError
from nemo_bench.localization import noise_differences, pair_similarities, pair_values
from nemo_bench.methods import Batch, Method
from nemo_bench.prompts.tasks import Task, seeds_of
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched
from nemo_bench.records.schema import Cost, MemorizationRecord

PICTURED_SEEDS = 4
"""Number of seeds whose noise differences are pictured."""


def measure_memorization(stage: Stage, tasks: Sequence[Task], seeds: int) -> list[MemorizationRecord]:
    """Similarity of the noise differences of all pairs of seeds; a prompt of which they are not finite fails.

    Of a record's cost, ``once_row_passes`` and ``once_seconds`` are what the method takes once for a prompt before the
    score is measured.
    """
    return [_measure(stage, task, seeds) for task in tasks]


def _measure(stage: Stage, task: Task, seeds: int) -> MemorizationRecord:
    model, prompt = stage.model, task.prompt
    record = MemorizationRecord(id=task.id, prompt=prompt.id, truncated=model.truncated(prompt.text))
    if prompt.id not in stage.neurons:
        return record.model_copy(update={"failed": UNLOCALIZED})
    start = time.perf_counter()
    before = model.row_passes
    once = Cost()
    result: dict[str, object]
    try:
        method = stage.method()
        method.prepare_prompts(model, [prompt])
        seconds = round(time.perf_counter() - start, 4)
        once = Cost(once_row_passes=model.row_passes - before, once_seconds=seconds)
        differences = _differences(stage, method, prompt, seeds)
        pairs = pair_values(pair_similarities(differences, model.similarity))
        require_finite("noise differences with the method applied", pairs)
    except NotFiniteError as error:
        result = {"failed": str(error)}
    else:
        # Side by side, their first three channels as colors.
        strip = torch.cat(list(differences[:PICTURED_SEEDS, :3]), dim=2)
        image = stage.store.save_image(f"noise/{file_name(prompt)}.png", to_image(strip))
        result = {"score": float(pairs.mean()), "image": image}
    cost = once.model_copy(update={"row_passes": model.row_passes - before})
    return record.model_copy(update={**result, "cost": cost})


def _differences(stage: Stage, method: Method, prompt: Prompt, seeds: int) -> Tensor:
    """Noise differences with the method applied, (seeds, channels, height, width)."""
    model = stage.model
    text = model.encode([prompt.text]).rows([0] * seeds)
    noise = tuple(seeds_of(prompt, "localize", range(seeds)))
    whole = Batch((prompt,) * seeds, text, model.latents(noise), noise, (stage.neurons[prompt.id],) * seeds)
    parts = []
    for rows in batched(range(seeds), stage.batch_size):
        with method.apply(model, whole.rows(rows)) as changed:
            parts.append(noise_differences(model, changed.text, changed.latents))
    return torch.cat(parts)
