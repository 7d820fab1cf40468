"""The stages as LightningModules: predict loops that write records and return nothing."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import StoreError
from nemo_bench.localization import (
    ENCODED,
    PAPER,
    Protocol,
    activation_moments,
    noise_differences,
    pair_scores,
    pair_similarities,
    pair_values,
    save_moments,
)
from nemo_bench.methods import Batch, Method
from nemo_bench.metrics import BenchMetric, ClipJudge
from nemo_bench.prompts import ImageTask, PromptTask, seeds_of
from nemo_bench.store import Store
from nemo_bench.types import Localization, Neurons, Prompt, Record, digest

FIELDS = frozenset({"images", "references", "pool", "embeddings", "text_embedding", "localization"})
"""What a metric can ask for; see :class:`nemo_bench.metrics.BenchMetric`."""
PICTURED_SEEDS = 4
"""Noise differences of so many seeds are kept as pictures."""
CHUNK = 256
"""Prompts whose activations make one record; a constant, so that sums are rounded alike in every run."""


class Stage(L.LightningModule, ABC):
    """A predict loop over tasks; each batch ends with its records on disk.

    Args:
        store: Where records go.
        name: Name of the stage.
    """

    def __init__(self, store: Store, name: str) -> None:
        super().__init__()
        self.store, self.name = store, name
        self.write = store.writer(name)

    def predict_step(self, tasks: Any, batch_idx: int) -> None:
        """Handles one batch and writes its records."""
        start = time.perf_counter()
        records = self.handle(tasks)
        each = (time.perf_counter() - start) / len(tasks)
        for record in records:
            record["cost"] = {**record.get("cost", {}), "seconds": round(each, 4)}
        self.write(records)

    @abstractmethod
    def handle(self, tasks: Sequence[Any]) -> list[Record]:
        """Computes the records of some tasks."""


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
        scores = pair_scores(self.model, [t.prompt for t in tasks], self.seeds, self.protocol, self.batch_size)
        return [
            {"id": task.id, "prompt": task.prompt.id, "pairs": pairs, "cost": {"row_passes": self.seeds}}
            for task, pairs in zip(tasks, scores, strict=True)
        ]


class LocalizationStage(Stage):
    """Localizes the neurons of each prompt and measures the noise differences with the method applied.

    Args:
        model: The model.
        method: The mitigation.
        seeds: Seeds a prompt.
        store: Where records go.
    """

    def __init__(self, model: Diffusion, method: Method, seeds: int, store: Store) -> None:
        super().__init__(store, "localize")
        self.model, self.method, self.seeds = model, method, seeds

    def handle(self, tasks: Sequence[PromptTask]) -> list[Record]:
        """Localizes each prompt."""
        return [self._localize(task) for task in tasks]

    def _localize(self, task: PromptTask) -> Record:
        prompt, method = task.prompt, self.method
        seeds = seeds_of(prompt, "localize", range(self.seeds))
        result = method.localize(self.model, prompt, method.protocol.latents(self.model, seeds))
        latents = self.model.latents(seeds)
        text = self.model.encode([prompt.text])
        parts = []
        for part in slices(self.seeds, method.batch_size):
            size = len(latents[part])
            rows = text.rows([0] * size)
            batch = Batch((prompt,) * size, rows, latents[part], tuple(seeds[part]), (result.neurons,) * size)
            with method.apply(self.model, batch) as changed:
                parts.append(noise_differences(self.model, changed.text, changed.latents))
        differences = torch.cat(parts)
        pairs = pair_values(pair_similarities(differences, self.model.similarity))
        name = file_name(prompt)
        result.neurons.save(self.store.folder / "neurons" / f"{name}.json")
        picture = strip(differences[:PICTURED_SEEDS])
        return {
            "id": task.id,
            "prompt": prompt.id,
            "neurons": dict(result.neurons),
            "initial": dict(result.initial),
            "gate_score": result.gate_score,
            "initial_score": result.initial_score,
            "refined_score": result.refined_score,
            "threshold": result.threshold,
            "truncated": self.model.truncated(prompt.text),
            "memorization": float(pairs.mean()),
            "noise": self.store.save_image(f"noise/{name}.png", picture),
            "cost": {"row_passes": result.row_passes + self.seeds},
        }


class GenerationStage(Stage):
    """Generates images with the method applied.

    Args:
        model: The model.
        method: The mitigation.
        neurons: What localizing found, by prompt id.
        store: Where images and records go.
    """

    def __init__(self, model: Diffusion, method: Method, neurons: Mapping[str, Neurons], store: Store) -> None:
        super().__init__(store, "generate")
        self.model, self.method, self.neurons = model, method, neurons

    def handle(self, tasks: Sequence[ImageTask]) -> list[Record]:
        """Generates one image per task."""
        prompts = tuple(t.prompt for t in tasks)
        seeds = tuple(seeds_of(t.prompt, "generate", [t.seed])[0] for t in tasks)
        neurons = tuple(self.neurons.get(p.id, Neurons()) for p in prompts)
        text = self.model.encode([p.text for p in prompts])
        batch = Batch(prompts, text, self.model.latents(seeds), seeds, neurons)
        with self.method.apply(self.model, batch) as changed:
            images = self.model.generate(changed.text, changed.latents, changed.unconditional)
        return [
            {
                "id": task.id,
                "prompt": task.prompt.id,
                "seed": task.seed,
                "image": self.store.save_image(f"images/{file_name(task.prompt)}_{task.seed:02d}.png", to_image(image)),
                "cost": {"row_passes": self.model.passes_per_image},
            }
            for task, image in zip(tasks, images, strict=True)
        ]


class ScoringStage(Stage):
    """Scores the images of each prompt with every metric.

    Args:
        metrics: Metrics by name.
        judge: Embeds images and texts.
        pool: Reference images of all prompts.
        images: Generation records.
        localizations: Localization records by prompt id.
        store: Where images are and records go.
    """

    def __init__(
        self,
        metrics: Mapping[str, BenchMetric],
        judge: ClipJudge,
        pool: Sequence[Path],
        images: Iterable[Record],
        localizations: Mapping[str, Record],
        store: Store,
    ) -> None:
        super().__init__(store, "score")
        self.metrics, self.judge, self.localizations = dict(metrics), judge, localizations
        self.images: dict[str, list[Record]] = {}
        for record in sorted(images, key=lambda r: r["seed"]):
            self.images.setdefault(record["prompt"], []).append(record)
        self._pool_files = tuple(pool)
        self._pool: Tensor | None = None

    def handle(self, tasks: Sequence[PromptTask]) -> list[Record]:
        """Scores the images of each prompt."""
        return [record for task in tasks for record in self._score(task)]

    def _score(self, task: PromptTask) -> list[Record]:
        prompt, records = task.prompt, self.images[task.prompt.id]
        pictures = [open_image(self.store.folder / record["image"]) for record in records]
        size = pictures[0].size
        fields: dict[str, Any] = {
            "images": to_tensor(pictures).to(self.device),
            "references": load_images(prompt.references, size).to(self.device),
            "pool": self._references(size).to(self.device),
            "embeddings": self.judge.embed_images(pictures),
            "text_embedding": self.judge.embed_text(prompt.text),
            "localization": self.localizations[prompt.id],
        }
        of_prompt: dict[str, float] = {}
        of_images: list[dict[str, float]] = [{} for _ in records]
        for name, metric in self.metrics.items():
            values = metric.score(**{field: fields[field] for field in metric.needs}).tolist()
            if metric.per_image:
                for scores, value in zip(of_images, values, strict=bool(values)):
                    scores[name] = round(value, 6)
            elif values:
                of_prompt[name] = round(values[0], 6)
        lines = [
            {"id": record["id"], "prompt": prompt.id, "seed": record["seed"], "scores": scores}
            for record, scores in zip(records, of_images, strict=True)
        ]
        return [*lines, {"id": task.id, "prompt": prompt.id, "seed": None, "scores": of_prompt}]

    def _references(self, size: tuple[int, int]) -> Tensor:
        if self._pool is None:
            self._pool = load_images(self._pool_files, size)
        return self._pool


def slices(rows: int, size: int) -> list[slice]:
    """Rows 0 to ``rows`` in parts of at most ``size``."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def localization_of(record: Record) -> Localization:
    """The localization in a record."""
    return Localization(
        neurons=Neurons(record["neurons"]),
        initial=Neurons(record["initial"]),
        gate_score=record["gate_score"],
        initial_score=record["initial_score"],
        refined_score=record["refined_score"],
        threshold=record["threshold"],
    )


def file_name(prompt: Prompt) -> str:
    """A file name for a prompt: its id, where that is one, else the id's harmless part and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", prompt.id)[:60]
    return plain if plain == prompt.id and plain.strip(".") else f"{plain}-{digest([prompt.id], 8)}"


def to_image(image: Tensor) -> Image.Image:
    """A picture of (3, H, W) values in [0, 1]."""
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def strip(differences: Tensor) -> Image.Image:
    """Noise differences side by side, their first three channels as colors.

    Args:
        differences: (N, channels, H, W) in [0, 1], at least three channels.
    """
    return to_image(torch.cat(list(differences[:, :3]), dim=2))


def open_image(path: Path) -> Image.Image:
    """An RGB picture.

    Raises:
        StoreError: The file is missing or is no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise StoreError(f"{path} can't be read as an image ({error}); delete it and run again") from error


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (N, 3, H, W) values in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


def load_images(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Images brought to one size.

    Args:
        paths: N files.
        size: Width and height in pixels.

    Returns:
        (N, 3, height, width) values in [0, 1].
    """
    if not paths:
        return torch.empty(0, 3, size[1], size[0])
    pictures = [open_image(path) for path in paths]
    return to_tensor([p if p.size == size else p.resize(size, Image.Resampling.BICUBIC) for p in pictures])
