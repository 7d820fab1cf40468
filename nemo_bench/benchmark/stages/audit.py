"""Searches of an audit, and scores of what they find."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.benchmark.diagnostics import diagnose
from nemo_bench.benchmark.stages.base import UNLOCALIZED, Chunk, Stage, file_name, save_tensors, to_image
from nemo_bench.diffusion import Conditioning, fitted_picture
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import Batch, Method, NoMitigation, Wanda
from nemo_bench.methods.embedding_search import RATE, SAMPLES, STEPS, random_embeddings, search_embeddings
from nemo_bench.metrics import BenchMetric
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import GENERAL, Prompt
from nemo_bench.records.images import open_image
from nemo_bench.records.io import batched, digest, file_digest, seed_of
from nemo_bench.records.ranges import Count, Index, Positive, Share
from nemo_bench.records.schema import Cost, Diagnosis, SearchRecord, SearchScoreRecord


@dataclass
class SearchSettings:
    """What all kinds of audits share."""

    #: Name of the kind.
    audit: ClassVar[str]
    #: Classes of pipelines that it works with; None for all.
    families: ClassVar[frozenset[str] | None] = None
    #: What images of a search are generated from, by row of its sheet.
    states: ClassVar[Mapping[str, str]]
    images: Count  #: Images of each state.

    #: Prompts with pictures that the model was not trained on; None for the general prompts of the run that have
    #: reference images, or else those that belong to its prompts.
    controls: str | None = None
    limit: Count | None = None  #: At most this many prompts of each kind.

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that change the result of a search."""
        kind = {} if self.audit == "embeddings" else {"audit": self.audit}  # the default kind is not written down
        return {**kind, **{key: value for key, value in asdict(self).items() if key not in ("controls", "limit")}}

    @property
    def key(self) -> str:
        """Names the folder of pictures."""
        return digest(self.identity, 8)


@dataclass
class AuditSettings(SearchSettings):
    """How an audit searches for embeddings: ``audit=embeddings``, the default."""

    audit = "embeddings"
    states: ClassVar[Mapping[str, str]] = {
        "prompt": "images of its prompt",
        "found": "images of the embedding found",
        "unmitigated": "the same without mitigation",
    }

    #: Steps of Adam. Enough of them bring back any picture, so stay with those of Kowalczuk et al. (2025).
    steps: Count = STEPS
    rate: Positive = RATE  #: Learning rate.
    samples: Count = SAMPLES  #: Noisy pictures a step.
    #: What a search starts from, the embedded ``prompt`` or ``random`` numbers.
    start: Literal["prompt", "random"] = "prompt"
    images: Count = 4  #: Images generated from a prompt and from what was found, of the seeds that the run has first.
    #: Searches more from random numbers for the picture of each memorized prompt, whose ends are compared with one
    #: another (see :func:`nemo_bench.benchmark.diagnostics.diagnose`); 0 for none. Kowalczuk et al. (2026) have 100.
    starts: Index = 0
    ratio: Share = 0.01  #: Share of weights that Wanda chooses for each of those.

    @property
    @override
    def identity(self) -> dict[str, Any]:
        return {key: value for key, value in super().identity.items() if self.starts or key not in ("starts", "ratio")}


class Search(NamedTuple):
    """A search for what brings a picture back."""

    id: str  #: Record id.
    prompt: Prompt  #: Whose neurons are blocked.
    #: Whose embedding it starts from, and whose picture it is after: the prompt itself or, for a control, another one.
    source: Prompt
    picture: Path  #: The picture.

    @classmethod
    def from_prompts(cls, prompt: Prompt, source: Prompt, settings: SearchSettings, *judge: Any) -> Search:
        """The search for the first reference image of a prompt; what judges its success, if anything, is part of it."""
        picture = source.references[0]
        content = [settings.identity, prompt.id, prompt.text, source.id, source.text, file_digest(picture), *judge]
        return cls(digest(content), prompt, source, picture)

    @property
    def is_control(self) -> bool:
        """Whether its picture is none of the prompt's."""
        return self.source != self.prompt  # a loop of Lightning copies tasks

    @property
    def name(self) -> str:
        """Name of its files; ids of controls may be those of prompts."""
        return "--".join([*dict.fromkeys((file_name(self.prompt), file_name(self.source))), self.id[:8]])


def search(
    stage: Stage, tasks: Sequence[Search], settings: AuditSettings, prompts: Sequence[Prompt]
) -> list[SearchRecord]:
    """Searches for embeddings that bring pictures back, and generates from them.

    Every search leaves a sheet of pictures, a row for each of the states: the picture it was after, then images.
    A search fails where its embedding or an image is not finite. ``prompts`` are all of the cell, with whose embeddings
    those of searches from many starts are compared.
    """
    localized = [task for task in tasks if task.prompt.id in stage.neurons]
    failed = [unsuccessful(task, None, UNLOCALIZED) for task in tasks if task not in localized]
    return [*failed, *(_search(stage, localized, settings, prompts) if localized else [])]


def _search(
    stage: Stage, tasks: Sequence[Search], settings: AuditSettings, prompts: Sequence[Prompt]
) -> list[SearchRecord]:
    before = stage.model.row_passes
    try:
        return _search_together(stage, tasks, settings, prompts)
    except NotFiniteError as error:
        reason = str(error)
    if len(tasks) == 1:
        return [unsuccessful(tasks[0], stage.model.row_passes - before, reason)]
    # It does not say which searches it is about.
    return [record for task in tasks for record in _search(stage, [task], settings, prompts)]


def _search_together(
    stage: Stage, tasks: Sequence[Search], settings: AuditSettings, prompts: Sequence[Prompt]
) -> list[SearchRecord]:
    model = stage.model
    before = model.row_passes
    method = stage.method()
    pictures = torch.stack([fitted_picture(task.picture, model.image_size) for task in tasks])
    batch = batch_of(stage, tasks)
    text = batch.text
    if settings.start == "random":
        batch = replace(batch, text=random_embeddings(model, text, batch.seeds))
    targets = model.encode_images(pictures)
    found = search_embeddings(
        model, method, batch, targets, steps=settings.steps, rate=settings.rate, samples=settings.samples
    )
    after = replace(batch, text=found.text.to(model.dtype))
    make = partial(generated, stage, tasks, settings.images)
    rows = {"prompt": make(method, replace(batch, text=text)), "found": make(method, after)}
    if not isinstance(method, NoMitigation):
        rows["unmitigated"] = make(NoMitigation(), after)
    diagnoses = [
        None if task.is_control or not settings.starts
        else _diagnose(stage, method, batch.rows([row]), targets[[row]], settings, prompts)
        for row, task in enumerate(tasks)
    ]  # fmt: skip
    passes = round((model.row_passes - before) / len(tasks), 2)
    records = []
    for row, task in enumerate(tasks):
        embedding = found.text.rows([row])
        own = {state: images[row] for state, images in rows.items()}
        if not _is_finite(embedding):
            records.append(unsuccessful(task, passes, "the embedding found is not finite"))
            continue
        pooled = {} if embedding.pooled is None else {"pooled": embedding.pooled}
        tensors = {"text": embedding.text, "losses": found.losses[row], **pooled}
        record = kept(stage, task, pictures[row], own, tensors, passes, settings)
        records.append(record.model_copy(update={"diagnosis": diagnoses[row]}))
    return records


def _is_finite(embedding: Conditioning) -> bool:
    parts = [part for part in (embedding.text, embedding.pooled) if part is not None]
    return all(bool(part.isfinite().all()) for part in parts)


def _diagnose(
    stage: Stage, method: Method, batch: Batch, target: Tensor, settings: AuditSettings, prompts: Sequence[Prompt]
) -> Diagnosis:
    """Compares the ends of searches from many starts for one picture, that of the only row of a batch."""
    model, count = stage.model, settings.starts
    seeds = tuple(seed_of(["start", batch.seeds[0], number]) for number in range(count))
    rows = batch.rows([0] * count)
    starts = random_embeddings(model, rows.text, seeds)
    found = search_embeddings(
        model, method, replace(rows, text=starts, seeds=seeds), target.expand(count, -1, -1, -1),
        steps=settings.steps, rate=settings.rate, samples=settings.samples,
    )  # fmt: skip
    if not _is_finite(found.text):
        raise NotFiniteError("an embedding found from random numbers is not finite")
    memorized = [prompt.text for prompt in prompts if prompt.kind][:count]
    general = [prompt.text for prompt in prompts if prompt.group == GENERAL][:count]
    wanda = Wanda(ratio=settings.ratio)
    wanda.batch_size = stage.batch_size
    with torch.inference_mode(False), method.apply(model, batch):
        return diagnose(model, found.text, starts, memorized, general, seed=batch.seeds[0], wanda=wanda)


def batch_of(stage: Stage, tasks: Sequence[Search]) -> Batch:
    """Searches as rows of a batch: prompt and neurons of the prompt, embedding of the source, and seed of a search."""
    seeds = tuple(seed_of([SearchRecord.stage, task.prompt.id, task.source.id]) for task in tasks)
    text = stage.model.encode([task.source.text for task in tasks])
    neurons = tuple(stage.neurons[task.prompt.id] for task in tasks)
    return Batch(tuple(task.prompt for task in tasks), text, stage.model.latents(seeds), seeds, neurons)


def generated(stage: Stage, tasks: Sequence[Search], count: int, method: Method, batch: Batch) -> Tensor:
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


def kept(
    stage: Stage, task: Search, picture: Tensor, rows: Mapping[str, Tensor], tensors: Mapping[str, Tensor],
    passes: float, settings: SearchSettings,
) -> SearchRecord:  # fmt: skip
    """Writes what a search found and its sheet, and gives its record; it failed where an image is not finite.

    Args:
        stage: The stage.
        task: The search.
        picture: The picture it was after, (3, height, width).
        rows: Images by state, (images, 3, height, width).
        tensors: What it found, by name.
        passes: UNet passes of it.
        settings: How it searched.
    """
    if wrong := [settings.states[state] for state, images in rows.items() if not images.isfinite().all()]:
        return unsuccessful(task, passes, f"not finite: {', '.join(wrong)}")
    store, name = stage.store, f"{SearchRecord.stage}/{settings.key}/{task.name}"
    file = store.folder / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(file, tensors)
    sheet = [torch.cat([picture.to(images), *images], 2) for images in rows.values()]
    image = store.save_image(f"{name}.png", to_image(torch.cat(sheet, 1)))
    return _record(task, passes, states=list(rows), file=f"{name}.safetensors", image=image)


def unsuccessful(task: Search, passes: float | None, reason: str) -> SearchRecord:
    """The record of a search that failed."""
    return _record(task, passes, failed=reason)


def _record(task: Search, passes: float | None, **result: Any) -> SearchRecord:
    cost = None if passes is None else Cost(row_passes=passes)
    return SearchRecord(id=task.id, prompt=task.prompt.id, source=task.source.id, cost=cost, **result)


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
