"""Searches of an audit, and scores of what they find."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor

from nemo_bench.benchmark.embedding_search import RATE, SAMPLES, STEPS, random_embeddings, search_embeddings
from nemo_bench.benchmark.plan import ImageCell
from nemo_bench.benchmark.runner import neurons_by_prompt
from nemo_bench.benchmark.stages.base import UNLOCALIZED, Stage, file_name, slices, to_image
from nemo_bench.diffusion import Conditioning, Diffusion, file_digest
from nemo_bench.errors import ConfigError, NotFiniteError, did_you_mean
from nemo_bench.methods import Batch, Method, NoMitigation
from nemo_bench.metrics import BenchMetric
from nemo_bench.prompts.data import seeds_of
from nemo_bench.records.data import Prompt, Record
from nemo_bench.records.images import open_image
from nemo_bench.records.io import digest
from nemo_bench.records.store import Store

STAGE, SCORES = "audit", "audit_scores"
STATES = {
    "prompt": "images of its prompt",
    "found": "images of the embedding found",
    "unmitigated": "the same without mitigation",
}
"""What images of a search are generated from, and whether the method is applied."""


@dataclass
class AuditSettings:
    """How an audit searches.

    Attributes:
        steps: Steps of Adam. Enough of them bring back any picture, so stay with those of Kowalczuk et al. (2025).
        rate: Learning rate.
        samples: Noisy pictures a step.
        start: What a search starts from, the embedded ``prompt`` or ``random`` numbers.
        images: Images generated from a prompt and from what was found, of the seeds that the run has first.
        controls: Prompts with pictures that the model was not trained on; None for the general prompts of the run that
            have reference images, or else those that belong to its prompts.
        limit: Audit so many prompts of each kind.
    """

    steps: int = STEPS
    rate: float = RATE
    samples: int = SAMPLES
    start: str = "prompt"
    images: int = 4
    controls: Optional[str] = None  # noqa: UP045 - OmegaConf reads the old form only
    limit: Optional[int] = None  # noqa: UP045

    def check(self) -> None:
        """Raises ConfigError where a value is out of range."""
        if self.start not in ("prompt", "random"):
            raise ConfigError(f"start={self.start}: unknown value. {did_you_mean(self.start, ('prompt', 'random'))}")
        least = {"steps": 1, "rate": 1e-12, "samples": 1, "images": 1, "limit": 1}
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and not low <= value < float("inf"):
                raise ConfigError(f"{key}={value}: expected {'more than 0' if key == 'rate' else 'at least 1'}")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result of a search."""
        return {key: value for key, value in asdict(self).items() if key not in ("controls", "limit")}

    @property
    def key(self) -> str:
        """Names the folder of pictures."""
        return digest(self.identity, 8)


class AuditTask(NamedTuple):
    """One search.

    Attributes:
        id: Record id.
        prompt: Whose neurons are switched off.
        source: Whose embedding it starts from, and whose picture it is after: the prompt itself or, for a control,
            another one.
        picture: The picture.
    """

    id: str
    prompt: Prompt
    source: Prompt
    picture: Path

    @classmethod
    def from_prompts(cls, prompt: Prompt, source: Prompt, settings: AuditSettings) -> AuditTask:
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


@dataclass(frozen=True)
class AuditCell:
    """A finished cell and the searches that audit it.

    Attributes:
        cell: The cell.
        method: Its method.
        metrics: Metrics that compare images with training images, by name.
        settings: How is searched.
        tasks: All searches: each memorized prompt's, followed by its control.
    """

    cell: ImageCell
    method: Method
    metrics: Mapping[str, BenchMetric]
    settings: AuditSettings
    tasks: Sequence[AuditTask]

    @property
    def store(self) -> Store:
        """The cell's folder."""
        return self.cell.store

    @property
    def id(self) -> str:
        """Names the entry in ``audit.json``: other settings, prompts or controls make another one."""
        return digest([task.id for task in self.tasks], 8)

    def score_id(self, task: AuditTask) -> str:
        """Record id of the scores of a search."""
        nodes = self.cell.config.settings.metrics
        return digest(
            [task.id, {name: {**nodes[name], **metric.fingerprint()} for name, metric in self.metrics.items()}]
        )


class AuditStage(Stage):
    """Searches for embeddings that bring pictures back, and generates from them.

    Every search leaves a sheet of pictures, a row for each of :data:`STATES`: the picture it was after, then images.

    Args:
        model: The model.
        audited: The cell and its searches.
    """

    def __init__(self, model: Diffusion, audited: AuditCell) -> None:
        super().__init__(audited.store, STAGE)
        self.model, self.audited = model, audited
        self.neurons = neurons_by_prompt(audited.store)
        (self.store.folder / STAGE / audited.settings.key).mkdir(parents=True, exist_ok=True)

    def handle(self, tasks: Sequence[AuditTask]) -> list[Record]:
        """Searches for the picture of each task; what is not finite is recorded as ``failed``, with the reason."""
        localized = [task for task in tasks if task.prompt.id in self.neurons]
        failed = [_failed(task, UNLOCALIZED) for task in tasks if task not in localized]
        return [*failed, *(self._search(localized) if localized else [])]

    def _search(self, tasks: Sequence[AuditTask]) -> list[Record]:
        before = self.model.row_passes
        try:
            return self._search_together(tasks)
        except NotFiniteError as error:
            reason = str(error)
        if len(tasks) == 1:
            return [{**_failed(tasks[0], reason), "cost": {"row_passes": self.model.row_passes - before}}]
        # It does not say which searches it is about.
        return [record for task in tasks for record in self._search([task])]

    def _search_together(self, tasks: Sequence[AuditTask]) -> list[Record]:
        model, method, settings = self.model, self.audited.method, self.audited.settings
        before = model.row_passes
        method.prepare(model, self.audited.cell.prompts)
        pictures = torch.stack([fitted_picture(task.picture, model.image_size) for task in tasks])
        text = model.encode([task.source.text for task in tasks])
        seeds = tuple(int(digest([STAGE, task.prompt.id, task.source.id]), 16) >> 1 for task in tasks)
        start = text if settings.start == "prompt" else random_embeddings(model, text, seeds)
        neurons = tuple(self.neurons[task.prompt.id] for task in tasks)
        batch = Batch(tuple(task.prompt for task in tasks), start, model.latents(seeds), seeds, neurons)
        options = {"steps": settings.steps, "rate": settings.rate, "samples": settings.samples}
        found = search_embeddings(model, method, batch, model.encode_images(pictures), **options)  # type: ignore[arg-type]
        after = replace(batch, text=found.text.to(model.dtype))
        rows = {"prompt": self._generate(method, tasks, replace(batch, text=text))}
        rows["found"] = self._generate(method, tasks, after)
        if not isinstance(method, NoMitigation):
            rows["unmitigated"] = self._generate(NoMitigation(), tasks, after)
        passes = round((model.row_passes - before) / len(tasks), 2)
        records = []
        for row, task in enumerate(tasks):
            if reason := _failure(found.text.rows([row]), {state: images[row] for state, images in rows.items()}):
                records.append({**_failed(task, reason), "cost": {"row_passes": passes}})
                continue
            name = f"{STAGE}/{settings.key}/{task.name}"
            _save_search(self.store.folder / f"{name}.safetensors", found.text.rows([row]), found.losses[row])
            sheet = [torch.cat([pictures[row].to(images), *images[row]], 2) for images in rows.values()]
            records.append(
                {
                    "id": task.id,
                    "prompt": task.prompt.id,
                    "source": task.source.id,
                    "states": list(rows),
                    "file": f"{name}.safetensors",
                    "image": self.store.save_image(f"{name}.png", to_image(torch.cat(sheet, 1))),
                    "cost": {"row_passes": passes},
                }
            )
        return records

    def _generate(self, method: Method, tasks: Sequence[AuditTask], batch: Batch) -> Tensor:
        """Images of each task, (tasks, images, 3, height, width), from the noise that the run starts them from."""
        model, count = self.model, self.audited.settings.images
        owner = [row for row in range(len(tasks)) for _ in range(count)]
        seeds = [seed for task in tasks for seed in seeds_of(task.source, "generate", range(count))]
        parts = []
        for part in slices(len(owner), method.batch_size):
            rows = owner[part]
            own = Batch(
                tuple(batch.prompts[row] for row in rows),
                batch.text.rows(rows),
                model.latents(seeds[part]),
                tuple(seeds[part]),
                tuple(batch.neurons[row] for row in rows),
            )
            with method.apply(model, own) as changed:
                parts.append(changed.generate_checked(model).images)
        return torch.cat(parts).unflatten(0, (len(tasks), count))


def _failed(task: AuditTask, reason: str) -> Record:
    """The record of a search that came to nothing."""
    return {"id": task.id, "prompt": task.prompt.id, "source": task.source.id, "failed": reason}


def _failure(text: Conditioning, images: Mapping[str, Tensor]) -> str:
    """Why a search failed, given the embedding found and its images by state; empty where it did not."""
    if not text.text.isfinite().all() or (text.pooled is not None and not text.pooled.isfinite().all()):
        return "the embedding found is not finite"
    states = [STATES[state] for state, those in images.items() if not those.isfinite().all()]
    return f"not finite: {', '.join(states)}" if states else ""


def fitted_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture as training saw it: its middle, brought to the size of the model's images.

    Args:
        path: The file.
        size: Width and height in pixels.

    Returns:
        (3, H, W), float32, in [0, 1].

    Raises:
        StoreError: The file can't be read.
    """
    fitted = ImageOps.fit(open_image(path), size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def _save_search(path: Path, text: Conditioning, losses: Tensor) -> None:
    parts = {"text": text.text, "losses": losses, **({} if text.pooled is None else {"pooled": text.pooled})}
    save_file({name: tensor.cpu().contiguous() for name, tensor in parts.items()}, path)


class ScoreTask(NamedTuple):
    """A search whose sheet is scored.

    Attributes:
        id: Record id.
        task: The search.
        record: Its record.
    """

    id: str
    task: AuditTask
    record: Record


class AuditScoringStage(Stage):
    """Compares the images of each search with the picture it was after.

    Args:
        audited: The cell and its searches.
    """

    def __init__(self, audited: AuditCell) -> None:
        super().__init__(audited.store, SCORES)
        self.audited = audited

    def handle(self, tasks: Sequence[ScoreTask]) -> list[Record]:
        """Scores the sheet of each search."""
        return [{"id": t.id, "search": t.task.id, **self._result(t.record)} for t in tasks]

    def _result(self, record: Record) -> Record:
        """Scores of a search, or which of them are not finite."""
        scores = self._score(record)
        wrong = {m for row in scores.values() for m, values in row.items() if not all(map(math.isfinite, values))}
        return {"failed": f"scores are not finite: {', '.join(sorted(wrong))}"} if wrong else {"scores": scores}

    def _score(self, record: Record) -> dict[str, dict[str, list[float]]]:
        sheet, columns = open_image(self.store.folder / record["image"]), self.audited.settings.images + 1
        width, height = size = sheet.width // columns, sheet.height // len(record["states"])
        scores: dict[str, dict[str, list[float]]] = {}
        for row, state in enumerate(record["states"]):
            boxes = [(c * width, row * height, (c + 1) * width, (row + 1) * height) for c in range(columns)]
            target, *images = (sheet.crop(box) for box in boxes)
            scores[state] = {}
            for name, metric in self.audited.metrics.items():
                seen = (metric.space.embed(pictures, size, self.device) for pictures in (images, [target]))
                values = metric.score(**dict(zip(("images", "references"), seen, strict=True)))
                scores[state][name] = [round(value, 6) for value in values.tolist()]
        return scores
