"""The memorization score of each prompt with the method applied, and the training loss of its pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_bench.benchmark.stages.base import UNLOCALIZED, Stage, file_name, to_image
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.errors import NotFiniteError
from nemo_bench.localization import noise_differences, pair_similarities, pair_values
from nemo_bench.localization.objectives import ReplayOfAll
from nemo_bench.methods import Batch, Method
from nemo_bench.prompts.tasks import Task, seeds_of
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched
from nemo_bench.records.schema import Cost, MemorizationRecord

PICTURED_SEEDS = 4
"""Number of seeds whose noise differences are pictured."""


def measure_memorization(
    stage: Stage,
    tasks: Sequence[Task],
    seeds: int,
    draws: int = 0,
    pictures: Mapping[str, tuple[Path, ...]] | None = None,
) -> list[MemorizationRecord]:
    """Similarity of the noise differences of all pairs of seeds; a prompt of which they are not finite fails.

    Of a record's cost, ``once_row_passes`` and ``once_seconds`` are what the method takes once for a prompt before the
    score is measured. The training loss of the prompts that have pictures is the mean over ``draws`` of noise and
    timestep.
    """
    return [_measure(stage, task, seeds, draws, (pictures or {}).get(task.prompt.id)) for task in tasks]


def _measure(stage: Stage, task: Task, seeds: int, draws: int, pictures: tuple[Path, ...] | None) -> MemorizationRecord:
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
        loss = _training_loss(stage, method, prompt._replace(references=pictures), draws) if pictures else None
    except NotFiniteError as error:
        result = {"failed": str(error)}
    else:
        # Side by side, their first three channels as colors.
        strip = torch.cat(list(differences[:PICTURED_SEEDS, :3]), dim=2)
        image = stage.store.save_image(f"noise/{file_name(prompt)}.png", to_image(strip))
        result = {"score": float(pairs.mean()), "loss": loss, "image": image}
    cost = once.model_copy(update={"row_passes": model.row_passes - before})
    return record.model_copy(update={**result, "cost": cost})


def _differences(stage: Stage, method: Method, prompt: Prompt, seeds: int) -> Tensor:
    """Noise differences with the method applied, (seeds, channels, height, width)."""
    whole = _batch(stage, prompt, seeds)
    parts = []
    for rows in batched(range(seeds), stage.batch_size):
        with method.apply(stage.model, whole.rows(rows)) as changed:
            parts.append(noise_differences(stage.model, changed.text, changed.latents))
    return torch.cat(parts)


def _batch(stage: Stage, prompt: Prompt, seeds: int) -> Batch:
    """A row for each seed of noise differences."""
    model = stage.model
    text = model.encode([prompt.text]).rows([0] * seeds)
    noise = tuple(seeds_of(prompt, "localize", range(seeds)))
    return Batch((prompt,) * seeds, text, model.latents(noise), noise, (stage.neurons[prompt.id],) * seeds)


@torch.no_grad()
def _training_loss(stage: Stage, method: Method, prompt: Prompt, draws: int) -> float:
    """Mean training loss of the prompt's pictures with the method applied."""
    model, whole = stage.model, _batch(stage, prompt, draws)
    drawn = ReplayOfAll(model, prompt, draws, stage.batch_size)
    parts = []
    for rows in map(list, batched(range(draws), stage.batch_size)):
        with method.apply(model, whole.rows(rows)) as changed:
            parts.append(
                model.training_losses(drawn.clean[rows], drawn.timesteps[rows], drawn.noises[rows], changed.text)
            )
    losses = torch.cat(parts)
    require_finite("training losses with the method applied", losses)
    return float(losses.double().mean())
