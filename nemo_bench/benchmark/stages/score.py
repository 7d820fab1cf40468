"""Scores of images by every metric."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_bench.benchmark.stages.base import CHUNK, Stage, file_name
from nemo_bench.benchmark.stages.features import save_features, set_spaces
from nemo_bench.errors import StoreError
from nemo_bench.metrics import BenchMetric, ImageSpace, Network, OpenClip, SetMetric
from nemo_bench.prompts.data import PromptTask
from nemo_bench.records.data import Record
from nemo_bench.records.images import open_image
from nemo_bench.records.io import digest
from nemo_bench.records.store import Store


class PromptSample:
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

    def field(self, field: str, space: ImageSpace, device: torch.device) -> Any:
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


class SampleReader:
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

    def __call__(self, tasks: Sequence[PromptTask]) -> list[PromptSample] | StoreError:
        """The scenes of some prompts, or why a picture can't be read.

        Raised in a process of the loader, an error would arrive with that process's traceback for its message.
        """
        try:
            return [self._scene(task) for task in tasks]
        except StoreError as error:
            return error

    def _scene(self, task: PromptTask) -> PromptSample:
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
        return PromptSample(task, records, files, self.localizations.get(task.prompt.id), paired, size)

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

    It takes what :class:`SampleReader` reads.

    Args:
        metrics: Metrics by name.
        store: Where records go.
        pool: Reference images of all prompts.
    """

    def __init__(self, metrics: Mapping[str, BenchMetric], store: Store, pool: Sequence[Path] = ()) -> None:
        super().__init__(store, "score")
        self.metrics = {name: metric for name, metric in metrics.items() if metric.per != "set"}
        self.set_spaces = set_spaces(metrics.values())
        self.whole_sets = {n: digest(m.space.fingerprint()) for n, m in metrics.items() if isinstance(m, SetMetric)}
        self._pool_files = tuple(pool)
        self._pools: dict[tuple[Hashable, tuple[int, int]], Tensor] = {}

    def handle(self, tasks: Sequence[PromptSample] | StoreError) -> list[Record]:
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

    def _score(self, scene: PromptSample) -> list[Record]:
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

    def _values(self, metric: BenchMetric, scene: PromptSample) -> dict[int, float]:
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

    def _field(self, field: str, space: ImageSpace, scene: PromptSample) -> Any:
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


def embed_together(scenes: Sequence[PromptSample], field: str, space: Network, device: torch.device) -> None:
    """Embeds the pictures of some prompts at once; networks are slow on few."""
    having = [scene for scene in scenes if scene.has(field)]
    if having:
        pictures = [picture for scene in having for picture in scene.pictures[field]]
        vectors = space.embed(pictures, having[0].size, device)
        for scene, part in zip(having, vectors.split([len(scene.pictures[field]) for scene in having]), strict=True):
            scene.seen[field, space.view] = part
