"""Images with the method applied."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemo_bench.benchmark.stages.base import UNLOCALIZED, Stage, file_name, to_images
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import Batch
from nemo_bench.prompts.tasks import Task, seeds_of
from nemo_bench.records.schema import Cost, ImageRecord


def generate(stage: Stage, tasks: Sequence[Task]) -> list[ImageRecord]:
    """Generates images with the method applied.

    An image that is not finite is recorded as ``failed``, with the reason and without a file; the others of its batch
    are not touched by it. Images that are done are made again, since they round the others of their batch, and dropped.
    """
    localized = [task for task in tasks if task.prompt.id in stage.neurons]
    records = {record.id: record for record in (_generate(stage, localized) if localized else [])}
    records |= {t.id: _record(t, 0, failed=UNLOCALIZED) for t in tasks if t.prompt.id not in stage.neurons}
    return [records[task.id] for task in tasks if task.id in records and task.id not in stage.done]


def _generate(stage: Stage, tasks: Sequence[Task]) -> list[ImageRecord]:
    model = stage.model
    before = model.row_passes
    try:
        method = stage.method()
        prompts = tuple(task.prompt for task in tasks)
        method.prepare_prompts(model, prompts)
        before = model.row_passes  # what images share is no cost of theirs
        seeds = tuple(seeds_of(task.prompt, "generate", [task.seed])[0] for task in tasks)
        neurons = tuple(stage.neurons[prompt.id] for prompt in prompts)
        text = model.encode([prompt.text for prompt in prompts])
        with method.apply(model, Batch(prompts, text, model.latents(seeds), seeds, neurons)) as changed:
            generated = changed.generate_checked(model)
    except NotFiniteError as error:
        # It does not say which images it is about.
        if len(tasks) > 1:
            return [record for task in tasks for record in _generate(stage, [task])]
        return [_record(tasks[0], model.row_passes - before, failed=str(error))]
    passes = round((model.row_passes - before) / len(tasks), 2)
    # What the owner of the cell recorded meanwhile is left as it is.
    recorded = stage.store.records(ImageRecord) if stage.assisting else {}
    pending = [row for row, task in enumerate(tasks) if task.id not in stage.done and task.id not in recorded]
    made = [row for row in pending if not generated.failed[row]]
    names = [f"images/{file_name(tasks[row].prompt)}_{tasks[row].seed:02d}.png" for row in made]
    with ThreadPoolExecutor() as threads:
        # All files are there, or an error of a thread is raised, before there is a record of one.
        saved = dict(
            zip(made, threads.map(stage.store.save_image, names, to_images(generated.images[made])), strict=True)
        )
    records = []
    for row in pending:
        notes = dict(changed.notes[row]) if changed.notes else None
        result = {"image": saved.get(row), "failed": generated.failed[row], "notes": notes}
        records.append(_record(tasks[row], passes, **result))
    return records


def _record(task: Task, passes: float, **result: Any) -> ImageRecord:
    cost = Cost(row_passes=passes)
    return ImageRecord(id=task.id, prompt=task.prompt.id, seed=task.seed, cost=cost, **result)
