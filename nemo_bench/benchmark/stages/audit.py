"""Searches of an audit, and scores of what they find."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nemo_bench.benchmark.stages.base import UNLOCALIZED, Chunk, Stage, file_name, save_tensors, to_image
from nemo_bench.diffusion import Conditioning, fitted_picture
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import Batch, Method, NoMitigation
from nemo_bench.methods.embedding_search import RATE, SAMPLES, STEPS, random_embeddings, search_embeddings
from nemo_bench.metrics import BenchMetric
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import open_image
from nemo_bench.records.io import batched, digest, file_digest, seed_of
from nemo_bench.records.ranges import Count, Positive
from nemo_bench.records.schema import Cost, SearchRecord, SearchScoreRecord

STATES = {
    "prompt": "images of its prompt",
    "found": "images of the embedding found",
    "unmitigated": "the same without mitigation",
}
"""What images of a search are generated from, and whether the method is applied."""


@dataclass
class AuditSettings:
    """How an audit searches."""

    #: Steps of Adam. Enough of them bring back any picture, so stay with those of Kowalczuk et al. (2025).
    steps: Count = STEPS
    rate: Positive = RATE  #: Learning rate.
    samples: Count = SAMPLES  #: Noisy pictures a step.
    #: What a search starts from, the embedded ``prompt`` or ``random`` numbers.
    start: Literal["prompt", "random"] = "prompt"
    images: Count = 4  #: Images generated from a prompt and from what was found, of the seeds that the run has first.
    #: Prompts with pictures that the model was not trained on; None for the general prompts of the run that have
    #: reference images, or else those that belong to its prompts.
    controls: str | None = None
    limit: Count | None = None  #: At most this many prompts of each kind.

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that change the result of a search."""
        return {key: value for key, value in asdict(self).items() if key not in ("controls", "limit")}

    @property
    def key(self) -> str:
        """Names the folder of pictures."""
        return digest(self.identity, 8)


class Search(NamedTuple):
    """A search for an embedding that brings a picture back."""

    id: str  #: Record id.
    prompt: Prompt  #: Whose neurons are blocked.
    #: Whose embedding it starts from, and whose picture it is after: the prompt itself or, for a control, another one.
    source: Prompt
    picture: Path  #: The picture.

    @classmethod
    def from_prompts(cls, prompt: Prompt, source: Prompt, settings: AuditSettings) -> Search:
        """The search for the first reference image of a prompt."""
        picture = source.references[0]
        content = [settings.identity, prompt.id, prompt.text, source.id, source.text, file_digest(picture)]
        return cls(digest(content), prompt, source, picture)

    @property
    def is_control(self) -> bool:
        """Whether its picture is none of the prompt's."""
        return self.source is not self.prompt

    @property
    def name(self) -> str:
        """Name of its files; ids of controls may be those of prompts."""
        return "--".join([*dict.fromkeys((file_name(self.prompt), file_name(self.source))), self.id[:8]])


def search(stage: Stage, tasks: Sequence[Search], settings: AuditSettings) -> list[SearchRecord]:
    """Searches for embeddings that bring pictures back, and generates from them.

    Every search leaves a sheet of pictures, a row for each of :data:`STATES`: the picture it was after, then images.
    A search fails where its embedding or an image is not finite.
    """
    localized = [task for task in tasks if task.prompt.id in stage.neurons]
    failed = [_record(task, None, failed=UNLOCALIZED) for task in tasks if task not in localized]
    return [*failed, *(_search(stage, localized, settings) if localized else [])]


def _search(stage: Stage, tasks: Sequence[Search], settings: AuditSettings) -> list[SearchRecord]:
    before = stage.model.row_passes
    try:
        return _search_together(stage, tasks, settings)
    except NotFiniteError as error:
        reason = str(error)
    if len(tasks) == 1:
        return [_record(tasks[0], stage.model.row_passes - before, failed=reason)]
    # It does not say which searches it is about.
    return [record for task in tasks for record in _search(stage, [task], settings)]


def _search_together(stage: Stage, tasks: Sequence[Search], settings: AuditSettings) -> list[SearchRecord]:
    model, store = stage.model, stage.store
    before = model.row_passes
    method = stage.method()
    pictures = torch.stack([fitted_picture(task.picture, model.image_size) for task in tasks])
    text = model.encode([task.source.text for task in tasks])
    seeds = tuple(seed_of([SearchRecord.stage, task.prompt.id, task.source.id]) for task in tasks)
    start = text if settings.start == "prompt" else random_embeddings(model, text, seeds)
    neurons = tuple(stage.neurons[task.prompt.id] for task in tasks)
    batch = Batch(tuple(task.prompt for task in tasks), start, model.latents(seeds), seeds, neurons)
    targets = model.encode_images(pictures)
    found = search_embeddings(
        model, method, batch, targets, steps=settings.steps, rate=settings.rate, samples=settings.samples
    )
    after = replace(batch, text=found.text.to(model.dtype))
    generated = partial(_generated, stage, tasks, settings.images)
    rows = {"prompt": generated(method, replace(batch, text=text)), "found": generated(method, after)}
    if not isinstance(method, NoMitigation):
        rows["unmitigated"] = generated(NoMitigation(), after)
    passes = round((model.row_passes - before) / len(tasks), 2)
    folder = f"{SearchRecord.stage}/{settings.key}"
    (store.folder / folder).mkdir(parents=True, exist_ok=True)
    records = []
    for row, task in enumerate(tasks):
        embedding = found.text.rows([row])
        if reason := _failure(embedding, {state: images[row] for state, images in rows.items()}):
            records.append(_record(task, passes, failed=reason))
            continue
        name = f"{folder}/{task.name}"
        pooled = {} if embedding.pooled is None else {"pooled": embedding.pooled}
        tensors = {"text": embedding.text, "losses": found.losses[row], **pooled}
        save_tensors(store.folder / f"{name}.safetensors", tensors)
        sheet = [torch.cat([pictures[row].to(images), *images[row]], 2) for images in rows.values()]
        image = store.save_image(f"{name}.png", to_image(torch.cat(sheet, 1)))
        records.append(_record(task, passes, states=list(rows), file=f"{name}.safetensors", image=image))
    return records


def _generated(stage: Stage, tasks: Sequence[Search], count: int, method: Method, batch: Batch) -> Tensor:
    """Images of each task, (tasks, images, 3, height, width), from the noise that the run starts them from."""
    model = stage.model
    rows = [row for row in range(len(tasks)) for _ in range(count)]
    seeds = [seed for task in tasks for seed in seeds_of(task.source, "generate", range(count))]
    images = []
    for part in batched(list(zip(rows, seeds, strict=True)), stage.batch_size):
        own = tuple(seed for _, seed in part)
        noised = replace(batch.rows([row for row, _ in part]), latents=model.latents(own), seeds=own)
        with method.apply(model, noised) as changed:
            images.append(changed.generate_checked(model).images)
    return torch.cat(images).unflatten(0, (len(tasks), count))


def _record(task: Search, passes: float | None, **result: Any) -> SearchRecord:
    cost = None if passes is None else Cost(row_passes=passes)
    return SearchRecord(id=task.id, prompt=task.prompt.id, source=task.source.id, cost=cost, **result)


def _failure(text: Conditioning, images: Mapping[str, Tensor]) -> str:
    """Why a search failed, given its embedding and its images by state; empty where it did not."""
    if not text.text.isfinite().all() or (text.pooled is not None and not text.pooled.isfinite().all()):
        return "the embedding found is not finite"
    states = [STATES[state] for state, those in images.items() if not those.isfinite().all()]
    return f"not finite: {', '.join(states)}" if states else ""


def score_sheets(
    stage: Stage, tasks: Sequence[Chunk], metrics: Mapping[str, BenchMetric], images: int
) -> list[SearchScoreRecord]:
    """Compares the images of each search with the picture it was after.

    Args:
        stage: The stage.
        tasks: The record of the search that left a sheet is the only item of each.
        metrics: Metrics that compare images with training images, by name.
        images: Images in a row of a sheet, beside the picture.
    """
    records = []
    for task in tasks:
        (found,) = task.items
        scores = _scores(stage, found, metrics, images + 1)
        wrong = {m for row in scores.values() for m, values in row.items() if not all(map(math.isfinite, values))}
        failed = f"scores are not finite: {', '.join(sorted(wrong))}" if wrong else None
        kept = None if wrong else scores
        records.append(SearchScoreRecord(id=task.id, search=found.id, scores=kept, failed=failed))
    return records


def _scores(
    stage: Stage, record: SearchRecord, metrics: Mapping[str, BenchMetric], columns: int
) -> dict[str, dict[str, list[float]]]:
    sheet = open_image(stage.store.folder / str(record.image))
    width, height = size = sheet.width // columns, sheet.height // len(record.states)
    scores: dict[str, dict[str, list[float]]] = {}
    for row, state in enumerate(record.states):
        boxes = [(c * width, row * height, (c + 1) * width, (row + 1) * height) for c in range(columns)]
        target, *images = (sheet.crop(box) for box in boxes)
        scores[state] = {}
        for name, metric in metrics.items():
            seen = (metric.space.embed(pictures, size, stage.device) for pictures in (images, [target]))
            values = metric.score(**dict(zip(("images", "references"), seen, strict=True)))
            scores[state][name] = [round(value, 6) for value in values.tolist()]
    return scores
