"""Scores of images by every metric, and features of pictures for metrics of whole sets."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nemo_bench.benchmark.stages.base import CHUNK, Chunk, Stage, file_name, save_tensors
from nemo_bench.errors import StoreError
from nemo_bench.metrics import BenchMetric, ImageSpace, NearestTrainingImage, Network, OpenClip, SetMetric
from nemo_bench.metrics.similarity import ReferenceMetric
from nemo_bench.metrics.spaces import Pool
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.images import open_image
from nemo_bench.records.io import batched, digest
from nemo_bench.records.schema import ChunkRecord, ImageRecord, ScoreRecord


@dataclass
class PromptSample:
    """What there is to see of one prompt, embedded once for all metrics that look at it in the same space."""

    task: Task  #: The prompt to be scored.
    images: Sequence[ImageRecord]  #: Records of its images, by seed.
    #: ``images``, none where all failed; ``references`` and ``unmitigated`` as far as they are needed and there are
    #: images.
    pictures: dict[str, list[Image.Image]]
    #: ``localization``, ``memorization``, ``loss``, ``ranking`` and ``truth`` of the prompt, where there are any.
    values: Mapping[str, Any]
    paired: list[int]  #: Which of its images there are unmitigated ones of, in the order of those.
    size: tuple[int, int]  #: Width and height that pictures are compared in.

    def __post_init__(self) -> None:
        self.seen: dict[tuple[str, Hashable], Tensor] = {}
        self.truncated = False

    def has(self, field: str) -> bool:
        """Whether there is anything of the kind."""
        return field in ("text", "prompt") or field in self.pictures or field in self.values

    def field(self, field: str, space: ImageSpace, device: torch.device) -> Any:
        """See :class:`BenchMetric` for the fields."""
        if field in self.values:
            return self.values[field]
        if field == "prompt":
            return self.task.prompt
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
        images: Records of images.
        neurons: Localized neurons by prompt id.
        memorization: Memorization scores by prompt id.
        losses: Training losses by prompt id.
        rankings: Places of all neurons by prompt id.
        truth: Neurons that are known to memorize a prompt, by its id.
        unmitigated: Files of the images without mitigation by id of the image's record.
        digests: SHA-256 that an image may have, by its path in the records; of others nothing is known.
    """

    def __init__(
        self,
        metrics: Iterable[BenchMetric],
        folder: Path,
        images: Iterable[ImageRecord],
        neurons: Mapping[str, Neurons] | None = None,
        memorization: Mapping[str, float] | None = None,
        losses: Mapping[str, float] | None = None,
        rankings: Mapping[str, Any] | None = None,
        truth: Mapping[str, Neurons] | None = None,
        unmitigated: Mapping[str, Path] | None = None,
        digests: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self.folder = folder
        self.values: dict[str, Mapping[str, Any]] = {
            "localization": neurons or {},
            "memorization": memorization or {},
            "loss": losses or {},
            "ranking": rankings or {},
            "truth": truth or {},
        }
        self.unmitigated = unmitigated or {}
        self.needed = {field for metric in metrics for field in metric.needs}
        self.digests = digests or {}
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.images: dict[str, list[ImageRecord]] = {}
        for record in images:
            if record.image:
                self.images.setdefault(record.prompt, []).append(record)
            if record.size:
                self.sizes[record.size] += 1

    def __call__(self, tasks: Sequence[Task]) -> list[PromptSample] | StoreError:
        """The samples of some prompts, or why a picture can't be read.

        Raised in a process of the loader, an error would arrive with that process's traceback for its message.
        """
        try:
            return [self._sample(task) for task in tasks]
        except StoreError as error:
            return error

    def _sample(self, task: Task) -> PromptSample:
        name = task.prompt.id
        images = sorted(self.images.get(name, ()), key=lambda record: record.seed)
        for record in images:
            self._check(str(record.image))
        files: dict[str, Sequence[Path]] = {"images": [self.folder / str(record.image) for record in images]}
        paired = [row for row, record in enumerate(images) if record.id in self.unmitigated]
        if "references" in self.needed and images:
            files["references"] = task.prompt.references
        if "unmitigated" in self.needed:
            files["unmitigated"] = [self.unmitigated[images[row].id] for row in paired]
        pictures = {field: [open_image(path) for path in paths] for field, paths in files.items() if paths}
        values = {field: by_prompt[name] for field, by_prompt in self.values.items() if name in by_prompt}
        first = pictures["images"][0].size if images else (0, 0)  # without images nothing is compared
        size = self.sizes.most_common(1)[0][0] if self.sizes else first
        return PromptSample(task, images, pictures, values, paired, size)

    def _check(self, image: str) -> None:
        """Refuses an image that is not the one recorded: read before it is decoded, it costs next to nothing."""
        known, path = self.digests.get(image), self.folder / image
        try:
            is_other = known is not None and hashlib.sha256(path.read_bytes()).hexdigest() not in known
        except OSError as error:
            msg = f"{path} can't be read ({error.strerror}); the command that made it makes it again"
            raise StoreError(msg) from error
        if is_other:
            msg = f"{path} is not the image that was recorded"
            raise StoreError(f"{msg}; delete it, and the command that made it makes it again")


class References:
    """The reference images of all prompts, which each space prepares once a run.

    Args:
        files: Their files, each once.
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self.files = tuple(files)
        self.numbers = {path: number for number, path in enumerate(self.files)}
        self._pools: dict[tuple[ImageSpace, tuple[int, int]], Pool] = {}

    def pool(self, space: ImageSpace, size: tuple[int, int], device: torch.device) -> Pool:
        """All of them, prepared by a space for images of a size."""
        key = (space, size)
        if key not in self._pools:
            parts = batched(self.files, CHUNK)
            seen = [space.embed([open_image(path) for path in part], size, device) for part in parts]
            self._pools[key] = space.pool(torch.cat(seen))
        return self._pools[key]


class Scorer:
    """Scores the images of each prompt with every metric, and keeps the features that metrics of whole sets need.

    Args:
        metrics: Metrics by name.
        references: Reference images of all prompts.
        shuffled: By prompt id the text of another prompt, with which alignment is measured as well.
    """

    def __init__(
        self, metrics: Mapping[str, BenchMetric], references: References, shuffled: Mapping[str, str] | None = None
    ) -> None:
        self.metrics = {name: metric for name, metric in metrics.items() if metric.per != "set"}
        self.set_spaces = set_spaces(metrics.values())
        self.whole_sets = {n: digest(m.space.fingerprint()) for n, m in metrics.items() if isinstance(m, SetMetric)}
        self.references = references
        self.shuffled = shuffled or {}

    def __call__(self, stage: Stage, samples: Sequence[PromptSample] | StoreError) -> list[ScoreRecord]:
        """The records of what :class:`SampleReader` read."""
        if isinstance(samples, StoreError):
            raise samples
        wanted = {(field, metric.space) for metric in self.metrics.values() for field in metric.needs}
        wanted |= {("images", space) for space in self.set_spaces.values()}
        for field, space in wanted:
            if isinstance(space, Network) and field in ("images", "references", "unmitigated"):
                embed_together(samples, field, space, stage.device)
        values: dict[str, dict[str, dict[int, float]]] = {sample.task.id: {} for sample in samples}
        for name, metric in self.metrics.items():
            having = [sample for sample in samples if all(self._has(sample, field) for field in metric.needs)]
            for group in _groups(metric, having):
                for sample, of_sample in zip(group, self._values(metric, group, stage.device), strict=True):
                    values[sample.task.id][name] = of_sample
        return [line for sample in samples for line in self._records(stage, sample, values[sample.task.id])]

    def _records(
        self, stage: Stage, sample: PromptSample, values: Mapping[str, Mapping[int, float]]
    ) -> list[ScoreRecord]:
        """The records of a prompt, by its values of each metric."""
        prompt = sample.task.prompt
        of_prompt: dict[str, float] = {}
        of_images: list[dict[str, float]] = [{} for _ in sample.images]
        for name, by_row in values.items():
            if self.metrics[name].per == "image":
                for row, value in by_row.items():
                    of_images[row][name] = round(value, 6)
            elif by_row:
                of_prompt[name] = round(by_row[0], 6)
        whole: dict[str, Any] = {}
        if any("text" in metric.needs for metric in self.metrics.values()):
            whole["truncated"] = sample.truncated
        if self.set_spaces and sample.images:
            whole["file"] = f"features/{file_name(prompt)}.safetensors"
            features = {name: sample.field("images", space, stage.device) for name, space in self.set_spaces.items()}
            save_tensors(stage.store.folder / whole["file"], features)
            finite = {name: bool(vectors.isfinite().all()) for name, vectors in features.items()}
            of_prompt |= {name: math.nan for name, space in self.whole_sets.items() if not finite[space]}
        if shuffled := self._shuffled(sample, stage.device):
            whole["shuffled"] = shuffled
        records = [
            ScoreRecord(id=image.id, prompt=prompt.id, seed=image.seed, **_finite_scores(scores))
            for image, scores in zip(sample.images, of_images, strict=True)
        ]
        return [*records, ScoreRecord(id=sample.task.id, prompt=prompt.id, **whole, **_finite_scores(of_prompt))]

    def _shuffled(self, sample: PromptSample, device: torch.device) -> dict[str, float]:
        """By metric of alignment, the mean score of the images with the text of another prompt."""
        other = self.shuffled.get(sample.task.prompt.id)
        means: dict[str, float] = {}
        for name, metric in self.metrics.items() if other is not None and sample.images else ():
            if (
                metric.family == "alignment"
                and metric.needs == {"images", "text"}
                and isinstance(metric.space, OpenClip)
            ):
                text, _ = metric.space.embed_text(str(other), device)
                scores = metric.score(images=sample.field("images", metric.space, device), text=text)
                if bool(scores.isfinite().all()):
                    means[name] = round(float(scores.mean()), 6)
        return means

    def _has(self, sample: PromptSample, field: str) -> bool:
        return bool(self.references.files and sample.images) if field == "pool" else sample.has(field)

    def _values(
        self, metric: BenchMetric, samples: Sequence[PromptSample], device: torch.device
    ) -> list[dict[int, float]]:
        """A metric's values for each of some prompts scored at once.

        They are by number of the image, nan for images that can't be compared; one of a prompt is number 0.
        """
        if isinstance(metric, ReferenceMetric):
            each = (metric.judge(self._comparisons(sample, metric.space, device)) for sample in samples)
            return [dict(enumerate(values.tolist())) for values in each]
        rows = [s.paired if "unmitigated" in metric.needs else list(range(len(s.images))) for s in samples]
        by_row: dict[str, Tensor] = {}  # what there is one of for each image
        fields: dict[str, Any] = {}
        for field in metric.needs:
            if field == "images":
                parts = [s.field(field, metric.space, device)[part] for s, part in zip(samples, rows, strict=True)]
                by_row[field] = torch.cat(parts)
            elif field == "unmitigated":
                by_row[field] = torch.cat([sample.field(field, metric.space, device) for sample in samples])
            elif field == "pool":
                fields[field] = self.references.pool(metric.space, samples[0].size, device)
            else:
                fields[field] = samples[0].field(field, metric.space, device)
        finite = torch.ones(sum(map(len, rows)), dtype=torch.bool, device=device)
        for pictures in by_row.values():
            finite &= pictures.isfinite().flatten(1).all(1)
        if by_row and not finite.any():
            return [dict.fromkeys(part if metric.per == "image" else [0], math.nan) for part in rows]
        if isinstance(metric, NearestTrainingImage):
            by_row["known"] = self._known(metric.space, samples, device)
        scores = metric.score(**fields, **{field: values[finite] for field, values in by_row.items()})
        if metric.per != "image":
            return [dict(enumerate(scores.tolist()))]
        if not len(scores):
            return [{} for _ in samples]
        values = scores.new_full((len(finite),), math.nan)
        values[finite] = scores
        each = values.split([len(part) for part in rows])
        return [dict(zip(part, own.tolist(), strict=True)) for part, own in zip(rows, each, strict=True)]

    def _comparisons(self, sample: PromptSample, space: ImageSpace, device: torch.device) -> Tensor:
        """Comparisons of the images of a prompt with its own references, made once for all metrics."""
        key = ("comparisons", space)
        if key not in sample.seen:
            images, references = (sample.field(field, space, device) for field in ("images", "references"))
            sample.seen[key] = space.compare(images, references)
        return sample.seen[key]

    def _known(self, space: ImageSpace, samples: Sequence[PromptSample], device: torch.device) -> Tensor:
        """Comparisons of the images of some prompts with all references: those with their own, nan for others."""
        parts = []
        for sample in samples:
            known = torch.full((len(sample.images), len(self.references.files)), math.nan, device=device)
            if sample.has("references"):
                own = [self.references.numbers[path] for path in sample.task.prompt.references]
                known[:, own] = self._comparisons(sample, space, device)
            parts.append(known)
        return torch.cat(parts)


def shuffled_texts(prompts: Sequence[Prompt]) -> dict[str, str]:
    """By prompt id the text of another prompt, one half of the list further on; none of a list without another text."""
    texts = [prompt.text for prompt in prompts]
    half = len(texts) // 2
    found = {}
    for place, prompt in enumerate(prompts):
        others = (texts[(place + half + step) % len(texts)] for step in range(len(texts)))
        other = next((text for text in others if text != prompt.text), None)
        if other is not None:
            found[prompt.id] = other
    return found


def _groups(metric: BenchMetric, samples: Sequence[PromptSample]) -> list[list[PromptSample]]:
    """Prompts that a metric scores at once: those with images of one size, or each alone."""
    if not metric.by_image:
        return [[sample] for sample in samples]
    sizes = dict.fromkeys(sample.size for sample in samples)
    return [[sample for sample in samples if sample.size == size] for size in sizes]


def _finite_scores(scores: Mapping[str, float]) -> dict[str, Any]:
    """Scores by metric as they are recorded: those that are not finite under ``failed``, with the reason."""
    failed = {name: f"the score is {value}" for name, value in scores.items() if not math.isfinite(value)}
    finite = {name: value for name, value in scores.items() if name not in failed}
    return {"scores": finite, "failed": failed or None}


def embed_together(samples: Sequence[PromptSample], field: str, space: Network, device: torch.device) -> None:
    """Embeds the pictures of some prompts at once; networks are slow on few."""
    having = [sample for sample in samples if sample.has(field)]
    if having:
        pictures = [picture for sample in having for picture in sample.pictures[field]]
        vectors = space.embed(pictures, having[0].size, device)
        for sample, part in zip(having, vectors.split([len(sample.pictures[field]) for sample in having]), strict=True):
            sample.seen[field, space.view] = part


def embed_real(stage: Stage, tasks: Sequence[Chunk], space: Network) -> list[ChunkRecord]:
    """Takes the features of the real pictures of a folder."""
    records = []
    for chunk in tasks:
        pictures = [open_image(path) for path in chunk.items]
        features = space.embed(pictures, pictures[0].size, stage.device)
        file = f"features/{chunk.id}.safetensors"
        save_tensors(stage.store.folder / file, {"real": features})
        records.append(ChunkRecord(id=chunk.id, file=file, count=len(chunk.items)))
    return records


def set_spaces(metrics: Iterable[BenchMetric]) -> dict[str, Network]:
    """The networks whose features metrics of whole sets need, by the name they are kept under."""
    return {digest(m.space.fingerprint()): m.space for m in metrics if isinstance(m, SetMetric)}


def read_features(paths: Iterable[Path], name: str) -> Tensor:
    """Features of several files in their order, (N, D), without rows that are not finite.

    Raises:
        StoreError: A file can't be read.
    """
    parts = []
    for path in paths:
        try:
            parts.append(load_file(path)[name])
        except (OSError, SafetensorError, KeyError) as error:
            msg = f"{path} holds no features ({error}); delete it, and the same command makes it again"
            raise StoreError(msg) from error
    features = torch.cat(parts)
    return features[features.isfinite().all(1)]
