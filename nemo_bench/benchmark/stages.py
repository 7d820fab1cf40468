"""The stages as LightningModules: predict loops that write records and return nothing."""

from __future__ import annotations

import hashlib
import math
import os
import re
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_bench.diffusion import Diffusion, Generated
from nemo_bench.errors import NotFiniteError, StoreError
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
from nemo_bench.metrics import BenchMetric, Network, OpenClip, SetMetric, Space
from nemo_bench.records.pictures import open_image
from nemo_bench.prompts import ImageTask, PromptTask, seeds_of
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.records.store import Store
from nemo_bench.records.data import Localization, Neurons, Prompt, Record, digest

PICTURED_SEEDS = 4
"""Noise differences of so many seeds are kept as pictures."""
UNLOCALIZED = "its prompt has no neurons: localizing it failed"
"""Why there are no images of a prompt."""
CHUNK = 256
"""Prompts or pictures that make one record; a constant, so that sums are rounded alike in every run."""


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
        measured = {"seconds": round(each, 4), "peak_memory_mb": peak_memory(self.device), "device": self.device.type}
        for record in records:
            record["cost"] = {**record.get("cost", {}), **measured}
        self.write(records)

    def on_predict_start(self) -> None:
        """Counts the GPU's memory from here."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @abstractmethod
    def handle(self, tasks: Any) -> list[Record]:
        """Computes the records of a batch."""


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


class LocalizationStage(Stage):
    """Localizes the neurons of each prompt and measures the noise differences with the method applied.

    Of what a record costs, ``once_row_passes`` and ``once_seconds`` are what the method takes once for a prompt; the
    rest is measuring.

    What is not finite is recorded as ``failed``, with the reason: without ``neurons`` where localizing failed, without
    ``memorization`` in any case.

    Args:
        model: The model.
        method: The mitigation.
        seeds: Seeds a prompt.
        store: Where records go.
        prompts: All prompts, not only those of the tasks.
    """

    def __init__(
        self, model: Diffusion, method: Method, seeds: int, store: Store, prompts: Sequence[Prompt] = ()
    ) -> None:
        super().__init__(store, "localize")
        self.model, self.method, self.seeds, self.prompts = model, method, seeds, prompts

    def handle(self, tasks: Sequence[PromptTask]) -> list[Record]:
        """Localizes each prompt."""
        return [self._localize(task) for task in tasks]

    def _localize(self, task: PromptTask) -> Record:
        prompt, method = task.prompt, self.method
        seeds = seeds_of(prompt, "localize", range(self.seeds))
        before, start = self.model.row_passes, time.perf_counter()
        record: Record = {"id": task.id, "prompt": prompt.id, "truncated": self.model.truncated(prompt.text)}

        def passes() -> dict[str, int]:
            return {"row_passes": self.model.row_passes - before}

        try:
            method.prepare(self.model, self.prompts)
            result = method.localize(self.model, prompt, method.protocol.latents(self.model, seeds))
            method.prepare_prompts(self.model, [prompt])
        except NotFiniteError as error:
            return {**record, "failed": str(error), "cost": passes()}
        once = {
            "once_row_passes": self.model.row_passes - before,
            "once_seconds": round(time.perf_counter() - start, 4),
        }
        name = file_name(prompt)
        result.neurons.save(self.store.folder / "neurons" / f"{name}.json")
        record |= {
            "neurons": dict(result.neurons),
            "initial": dict(result.initial),
            "gate_score": result.gate_score,
            "initial_score": result.initial_score,
            "refined_score": result.refined_score,
            "threshold": result.threshold,
            "passed_gate": result.passed_gate,
            "exhausted": result.exhausted,
            **({"listed": dict(result.listed)} if result.listed else {}),
            **({"listed_initial": dict(result.listed_initial)} if result.listed_initial else {}),
        }
        try:
            differences = self._differences(prompt, seeds, result.neurons)
            pairs = pair_values(pair_similarities(differences, self.model.similarity))
            require_finite("noise differences with the method applied", pairs)
        except NotFiniteError as error:
            return {**record, "failed": str(error), "cost": {**passes(), **once}}
        picture = strip(differences[:PICTURED_SEEDS])
        return {
            **record,
            "memorization": float(pairs.mean()),
            "noise": self.store.save_image(f"noise/{name}.png", picture),
            "cost": {**passes(), **once},
        }

    def _differences(self, prompt: Prompt, seeds: Sequence[int], neurons: Neurons) -> Tensor:
        """Noise differences with the method applied, (seeds, channels, height, width)."""
        method, latents = self.method, self.model.latents(seeds)
        text = self.model.encode([prompt.text])
        parts = []
        for part in slices(self.seeds, method.batch_size):
            size = len(latents[part])
            rows = text.rows([0] * size)
            batch = Batch((prompt,) * size, rows, latents[part], tuple(seeds[part]), (neurons,) * size)
            with method.apply(self.model, batch) as changed:
                parts.append(noise_differences(self.model, changed.text, changed.latents))
        return torch.cat(parts)


class GenerationStage(Stage):
    """Generates images with the method applied.

    An image that is not finite is recorded as ``failed``, with the reason and without a file; the others of its batch
    are not touched by it.

    Args:
        model: The model.
        method: The mitigation.
        neurons: What localizing found, by prompt id; images of other prompts fail.
        store: Where images and records go.
        prompts: All prompts, not only those of the tasks.
    """

    def __init__(
        self,
        model: Diffusion,
        method: Method,
        neurons: Mapping[str, Neurons],
        store: Store,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        super().__init__(store, "generate")
        self.model, self.method, self.neurons, self.prompts = model, method, neurons, prompts

    def handle(self, tasks: Sequence[ImageTask]) -> list[Record]:
        """Generates one image per task."""
        localized = [task for task in tasks if task.prompt.id in self.neurons]
        found = {record["id"]: record for record in (self._generate(localized) if localized else [])}
        return [found.get(task.id) or _failed(task, UNLOCALIZED) for task in tasks]

    def _generate(self, tasks: Sequence[ImageTask]) -> list[Record]:
        before = self.model.row_passes
        try:
            self.method.prepare(self.model, self.prompts)
            self.method.prepare_prompts(self.model, [task.prompt for task in tasks])
            before = self.model.row_passes  # what images share is no cost of theirs
            generated, notes = self._sample(tasks)
        except NotFiniteError as error:
            # It does not say which images it is about.
            if len(tasks) > 1:
                return [record for task in tasks for record in self._generate([task])]
            return [_failed(tasks[0], str(error), self.model.row_passes - before)]
        each = round((self.model.row_passes - before) / len(tasks), 2)
        records = []
        for row, (task, image, reason) in enumerate(zip(tasks, *generated, strict=True)):
            record = _failed(task, reason, each) if reason else self._save(task, image, each)
            records.append({**record, **({"notes": dict(notes[row])} if notes else {})})
        return records

    def _sample(self, tasks: Sequence[ImageTask]) -> tuple[Generated, Sequence[Mapping[str, Any]]]:
        """The images of a batch, and what the method notes of each."""
        prompts = tuple(t.prompt for t in tasks)
        seeds = tuple(seeds_of(t.prompt, "generate", [t.seed])[0] for t in tasks)
        neurons = tuple(self.neurons[p.id] for p in prompts)
        text = self.model.encode([p.text for p in prompts])
        batch = Batch(prompts, text, self.model.latents(seeds), seeds, neurons)
        with self.method.apply(self.model, batch) as changed:
            return changed.generate_checked(self.model), changed.notes

    def _save(self, task: ImageTask, image: Tensor, passes: float) -> Record:
        return {
            "id": task.id,
            "prompt": task.prompt.id,
            "seed": task.seed,
            "image": self.store.save_image(f"images/{file_name(task.prompt)}_{task.seed:02d}.png", to_image(image)),
            "cost": {"row_passes": passes},
        }


def _failed(task: ImageTask, reason: str, passes: float = 0) -> Record:
    """The record of an image that there is none of."""
    return {
        "id": task.id,
        "prompt": task.prompt.id,
        "seed": task.seed,
        "failed": reason,
        "cost": {"row_passes": passes},
    }


class Scene:
    """What there is to see of one prompt, embedded once for all metrics that look at it in the same space.

    Args:
        task: The prompt to be scored.
        records: Id and seed of its images, by seed.
        files: Its pictures: ``images``, none where all failed; ``references`` and ``unmitigated`` as far as they are
            needed and there are images.
        localization: Its localization record, or None.
        paired: Which of its images there are unmitigated ones of, in the order of those.
        size: Width and height that pictures are compared in; None for those of the first image.
    """

    def __init__(
        self,
        task: PromptTask,
        records: Sequence[Record],
        files: Mapping[str, Sequence[Path]],
        localization: Record | None = None,
        paired: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> None:
        self.task, self.records, self.localization, self.paired = task, records, localization, list(paired)
        self.pictures = {name: [open_image(path) for path in paths] for name, paths in files.items() if paths}
        self.seen: dict[tuple[str, Hashable], Tensor] = {}
        self.truncated = False
        self._size = size

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that pictures are compared in."""
        return self._size or self.pictures["images"][0].size

    def has(self, field: str) -> bool:
        """Whether there is anything of the kind."""
        return field in self.pictures or field == "text" or (field == "localization" and self.localization is not None)

    def field(self, field: str, space: Space, device: torch.device) -> Any:
        """See :class:`BenchMetric` for the fields."""
        if field == "localization":
            return self.localization
        key = (field, space.view)
        if key not in self.seen:
            if field == "text":
                assert isinstance(space, OpenClip)
                self.seen[key], is_cut = space.embed_text(self.task.prompt.text, device)
                self.truncated |= is_cut
            else:
                self.seen[key] = space.embed(self.pictures[field], self.size, device)
        return self.seen[key]


class SceneReader:
    """Reads the pictures of some prompts, in any process.

    Args:
        metrics: Metrics; what none of them needs is not read.
        folder: Where the files in ``images`` are.
        images: Generation records, with ``image`` a path in the folder or an absolute one.
        localizations: Localization records by prompt id.
        unmitigated: Files of the images without mitigation by id of the image's record.
        digests: SHA-256 that an image may have, by its path in the records; of others nothing is known.
    """

    def __init__(
        self,
        metrics: Iterable[BenchMetric],
        folder: Path,
        images: Iterable[Record],
        localizations: Mapping[str, Record] | None = None,
        unmitigated: Mapping[str, Path] | None = None,
        digests: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self.folder, self.localizations, self.unmitigated = folder, localizations or {}, unmitigated or {}
        self.needed = {field for metric in metrics for field in metric.needs}
        self.digests = digests or {}
        self.sizes: Counter[tuple[int, int]] = Counter()
        # No more than this is kept of the records: there may be very many.
        self.images: dict[str, list[tuple[int, str, str]]] = {}
        for record in images:
            if "image" in record:
                found = self.images.setdefault(record["prompt"], [])
                found.append((record["seed"], record["id"], record["image"]))
            if "size" in record:
                self.sizes[tuple(record["size"])] += 1

    def __call__(self, tasks: Sequence[PromptTask]) -> list[Scene] | StoreError:
        """The scenes of some prompts, or why a picture can't be read.

        Raised in a process of the loader, an error would arrive with that process's traceback for its message.
        """
        try:
            return [self._scene(task) for task in tasks]
        except StoreError as error:
            return error

    def _scene(self, task: PromptTask) -> Scene:
        images = sorted(self.images.get(task.prompt.id, ()))
        for _, _, image in images:
            self._check(image)
        files: dict[str, Sequence[Path]] = {"images": [self.folder / image for _, _, image in images]}
        paired = [row for row, (_, name, _) in enumerate(images) if name in self.unmitigated]
        if "references" in self.needed and images:
            files["references"] = task.prompt.references
        if "unmitigated" in self.needed:
            files["unmitigated"] = [self.unmitigated[images[row][1]] for row in paired]
        records = [{"id": name, "seed": seed} for seed, name, _ in images]
        size = self.sizes.most_common(1)[0][0] if self.sizes else None
        return Scene(task, records, files, self.localizations.get(task.prompt.id), paired, size)

    def _check(self, image: str) -> None:
        """Makes sure that an image is the one that was recorded: read before it is decoded, it costs next to nothing.

        Raises:
            StoreError: It is another one.
        """
        known, path = self.digests.get(image), self.folder / image
        try:
            is_other = known is not None and hashlib.sha256(path.read_bytes()).hexdigest() not in known
        except OSError as error:
            raise StoreError(
                f"{path} can't be read ({error.strerror}); the command that made it makes it again"
            ) from error
        if is_other:
            msg = f"{path} is not the image that was recorded"
            raise StoreError(f"{msg}; delete it, and the command that made it makes it again")


class ScoringStage(Stage):
    """Scores the images of each prompt with every metric, and keeps the features that metrics of whole sets need.

    It takes what :class:`SceneReader` reads.

    Args:
        metrics: Metrics by name.
        store: Where records go.
        pool: Reference images of all prompts.
    """

    def __init__(self, metrics: Mapping[str, BenchMetric], store: Store, pool: Sequence[Path] = ()) -> None:
        super().__init__(store, "score")
        self.metrics = {name: metric for name, metric in metrics.items() if metric.per != "set"}
        self.set_spaces = set_spaces(metrics.values())
        self.whole_sets = {n: digest(m.space.content()) for n, m in metrics.items() if isinstance(m, SetMetric)}
        self._pool_files = tuple(pool)
        self._pools: dict[tuple[Hashable, tuple[int, int]], Tensor] = {}

    def handle(self, tasks: Sequence[Scene] | StoreError) -> list[Record]:
        """Scores the images of each prompt.

        Raises:
            StoreError: A picture could not be read.
        """
        if isinstance(tasks, StoreError):
            raise tasks
        wanted = {(field, metric.space) for metric in self.metrics.values() for field in metric.needs}
        wanted |= {("images", space) for space in self.set_spaces.values()}
        for field, space in wanted:
            if isinstance(space, Network) and field in ("images", "references", "unmitigated"):
                embed_together(tasks, field, space, self.device)
        return [line for scene in tasks for line in self._score(scene)]

    def _score(self, scene: Scene) -> list[Record]:
        prompt = scene.task.prompt
        of_prompt: dict[str, float] = {}
        of_images: list[dict[str, float]] = [{} for _ in scene.records]
        for name, metric in self.metrics.items():
            if not all(scene.has(field) or (field == "pool" and self._pool_files) for field in metric.needs):
                continue
            values = self._values(metric, scene)
            if metric.per == "image":
                for row, value in values.items():
                    of_images[row][name] = round(value, 6)
            elif values:
                of_prompt[name] = round(values[0], 6)
        whole: Record = {"id": scene.task.id, "prompt": prompt.id, "seed": None}
        if any("text" in metric.needs for metric in self.metrics.values()):
            whole["truncated"] = scene.truncated
        if self.set_spaces and scene.records:
            whole["file"] = f"features/{file_name(prompt)}.safetensors"
            features = {name: scene.field("images", space, self.device) for name, space in self.set_spaces.items()}
            save_features(self.store.folder / whole["file"], features)
            finite = {name: bool(values.isfinite().all()) for name, values in features.items()}
            of_prompt |= {name: math.nan for name, space in self.whole_sets.items() if not finite[space]}
        lines = [
            {"id": record["id"], "prompt": prompt.id, "seed": record["seed"], **_finite_scores(scores)}
            for record, scores in zip(scene.records, of_images, strict=True)
        ]
        return [*lines, {**whole, **_finite_scores(of_prompt)}]

    def _values(self, metric: BenchMetric, scene: Scene) -> dict[int, float]:
        """A metric's values by number of the image, nan for images that can't be compared; one of a prompt as 0."""
        fields = {field: self._field(field, metric.space, scene) for field in metric.needs}
        rows = scene.paired if "unmitigated" in fields else list(range(len(scene.records)))
        compared = [field for field in ("images", "unmitigated") if field in fields]
        if compared and len(rows) < len(scene.records):
            fields["images"] = fields["images"][rows]
        finite = [all(one) for one in zip(*(_finite_rows(fields[field]) for field in compared), strict=True)]
        if not all(finite):
            for field in compared:
                fields[field] = fields[field][torch.tensor(finite)]
        if compared and not any(finite):
            return dict.fromkeys(rows if metric.per == "image" else [0], math.nan)
        values: list[float] = metric.score(**fields).tolist()
        if metric.per != "image":
            return dict(enumerate(values))
        kept = [row for row, is_finite in zip(rows, finite, strict=True) if is_finite]
        return dict.fromkeys(rows, math.nan) | dict(zip(kept, values, strict=True)) if values else {}

    def _field(self, field: str, space: Space, scene: Scene) -> Any:
        if field != "pool":
            return scene.field(field, space, self.device)
        key = (space.view, scene.size)
        if key not in self._pools:
            parts = [self._pool_files[i : i + CHUNK] for i in range(0, len(self._pool_files), CHUNK)]
            seen = (space.embed([open_image(path) for path in part], scene.size, self.device) for part in parts)
            self._pools[key] = torch.cat(list(seen))
        return self._pools[key]


def _finite_rows(embedded: Tensor) -> list[bool]:
    """Whether all numbers of each embedded picture are finite."""
    return embedded.isfinite().flatten(1).all(1).tolist()


def _finite_scores(scores: Mapping[str, float]) -> Record:
    """Scores by metric as they are recorded: those that are not finite under ``failed``, with the reason."""
    failed = {name: f"the score is {value}" for name, value in scores.items() if not math.isfinite(value)}
    finite = {name: value for name, value in scores.items() if name not in failed}
    return {"scores": finite, **({"failed": failed} if failed else {})}


def embed_together(scenes: Sequence[Scene], field: str, space: Network, device: torch.device) -> None:
    """Embeds the pictures of some prompts at once; networks are slow on few."""
    having = [scene for scene in scenes if scene.has(field)]
    if having:
        pictures = [picture for scene in having for picture in scene.pictures[field]]
        vectors = space.embed(pictures, having[0].size, device)
        for scene, part in zip(having, vectors.split([len(scene.pictures[field]) for scene in having]), strict=True):
            scene.seen[field, space.view] = part


class FolderChunk(NamedTuple):
    """Real pictures whose features are taken together.

    Attributes:
        id: Record id.
        files: The pictures, at most :data:`CHUNK`.
    """

    id: str
    files: tuple[Path, ...]

    @classmethod
    def split(cls, files: Sequence[Path]) -> list[FolderChunk]:
        """Chunks of some pictures, in their order."""
        parts = [tuple(files[i : i + CHUNK]) for i in range(0, len(files), CHUNK)]
        return [cls(digest([number, [path.name for path in part]]), part) for number, part in enumerate(parts)]

    @property
    def file(self) -> str:
        """Where its features lie, in the folder of the store."""
        return f"features/{self.id}.safetensors"


class FeatureStage(Stage):
    """Features of the real pictures of a folder, for metrics of whole sets.

    Args:
        space: The network.
        store: Where files and records go.
    """

    def __init__(self, space: Network, store: Store) -> None:
        super().__init__(store, "features")
        self.space = space

    def handle(self, tasks: Sequence[FolderChunk]) -> list[Record]:
        """Features of each chunk."""
        for chunk in tasks:
            pictures = [open_image(path) for path in chunk.files]
            features = self.space.embed(pictures, pictures[0].size, self.device)
            save_features(self.store.folder / chunk.file, {"real": features})
        return [{"id": chunk.id, "file": chunk.file, "pictures": len(chunk.files)} for chunk in tasks]


def set_spaces(metrics: Iterable[BenchMetric]) -> dict[str, Network]:
    """The networks whose features metrics of whole sets need, by the name they are kept under."""
    return {digest(m.space.content()): m.space for m in metrics if isinstance(m, SetMetric)}


def save_features(path: Path, features: Mapping[str, Tensor]) -> None:
    """Writes features under a temporary name, then renames the file."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({name: tensor.cpu().contiguous() for name, tensor in features.items()}, part)
    part.replace(path)


def read_features(paths: Iterable[Path], name: str) -> Tensor:
    """Features of several files in their order, (N, D); those that are not finite are left out."""
    features = torch.cat([load_file(path)[name] for path in paths])
    return features[features.isfinite().all(1)]


def peak_memory(device: torch.device) -> int:
    """Megabytes: on a GPU the most allocated in this stage, else the largest resident set of this process so far."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


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
        passed_gate=record.get("passed_gate"),
        exhausted=record.get("exhausted"),
        listed=_listed(record.get("listed", {})),
        listed_initial=_listed(record.get("listed_initial", {})),
    )


def _listed(layers: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {layer: tuple(ids) for layer, ids in layers.items()}


def file_name(prompt: Prompt) -> str:
    """A file name for a prompt: its id, where that is one, else the id's harmless part and a hash.

    Ids with capital letters have a hash too, since some file systems take names that differ in case for the same; no
    name begins with a dot, which hides a file.
    """
    plain = re.sub(r"[^a-z0-9._-]+", "-", prompt.id.lower())[:60].lstrip(".")
    return plain if plain == prompt.id else f"{plain}-{digest([prompt.id], 8)}"


def to_image(image: Tensor) -> Image.Image:
    """A picture of (3, H, W) values in [0, 1]."""
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def strip(differences: Tensor) -> Image.Image:
    """Noise differences side by side, their first three channels as colors.

    Args:
        differences: (N, channels, H, W) in [0, 1], at least three channels.
    """
    return to_image(torch.cat(list(differences[:, :3]), dim=2))
