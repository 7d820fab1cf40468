"""Which metric of similarity tells copies from other images, and at which threshold: ``nemo-bench similarity``."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nemo_bench.benchmark.runner import open_folder
from nemo_bench.benchmark.stages.base import to_image
from nemo_bench.config import RunSettings, build
from nemo_bench.errors import ConfigError, NemoBenchError, PromptError, did_you_mean
from nemo_bench.metrics import ImageSpace, MemorizationRate, TrainingImage, detection
from nemo_bench.metrics.roc import best_threshold, rates
from nemo_bench.metrics.spaces import to_tensor
from nemo_bench.metrics.transformations import TRANSFORMATIONS, UNCHANGED
from nemo_bench.prompts import read_rows
from nemo_bench.records.data import PAIRS_FILE
from nemo_bench.records.images import open_image
from nemo_bench.records.io import batched, check_writable, write_text
from nemo_bench.records.schema import MetricInfo, Operating, PairKind, Roc, SimilarityRow, SimilarityTable
from nemo_bench.report.copies import FILES, SHEET, write_similarity

LABELS = {"copy": True, "1": True, "true": True, "other": False, "0": False, "false": False}
_BATCH = 64  # Pairs whose pictures are in memory at a time.
_SHOWN = 160  # Longest side of a picture in the sheet, in pixels.

log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """An image and the picture that it may be a copy of."""

    image: Path
    reference: Path
    is_copy: bool
    kind: str  #: Where it comes from; pairs of a kind are counted together.


class Measure(NamedTuple):
    """A way to compare, and the threshold that was published for it."""

    space: ImageSpace
    threshold: float | None

    @property
    def sign(self) -> int:
        """-1 for distances, of which small ones mean copies."""
        return -1 if self.space.is_distance else 1


def read_pairs(folder: Path) -> list[Pair]:
    """Reads ``copies.csv`` of a folder: ``image`` and ``reference``, files in it, ``label``, and optional ``kind``.

    Raises:
        PromptError: It is missing or no such list, names a file that is missing, or has pairs of one label only.
    """
    path = folder / PAIRS_FILE
    pairs = []
    for row in read_rows(path, "images"):
        word = str(row.cells.get("label") or "").strip().lower()
        if word not in LABELS:
            hint = did_you_mean(word, LABELS)
            raise PromptError(f"{row.where}: the label is {row.cells.get('label')!r}, expected copy or other. {hint}")
        image, reference = (folder / str(row.first(side) or "").strip() for side in ("images", "references"))
        for file in (image, reference):
            if not file.is_file():
                raise PromptError(f"{row.where}: {file} is no file; expected image and reference of each pair")
        kind = str(row.cells.get("kind") or "").strip() or ("copies" if LABELS[word] else "others")
        pairs.append(Pair(image, reference, LABELS[word], kind))
    found = Counter(pair.is_copy for pair in pairs)
    if not (found[True] and found[False]):
        msg = f"{path}: {found[True]} pairs are labelled copy and {found[False]} other"
        raise PromptError(f"{msg}; give some of both, or nothing is told apart")
    sides: dict[str, set[bool]] = {}
    for pair in pairs:
        sides.setdefault(pair.kind, set()).add(pair.is_copy)
    if mixed := [kind for kind, labels in sides.items() if len(labels) > 1]:
        raise PromptError(f"{path}: pairs of kind '{mixed[0]}' have both labels; give them two kinds, or none")
    return pairs


def measures_of(settings: RunSettings) -> tuple[dict[str, Measure], dict[str, str]]:
    """The metrics of the settings that compare with a training image, and by name why others are left out."""
    found: dict[str, Measure] = {}
    left_out = {}
    for name, node in settings.metrics.items():
        metric = build(node, f"metrics.{name}")
        if not isinstance(metric, TrainingImage | MemorizationRate):
            raise ConfigError(
                f"metrics.{name} compares no image with a training image; give metrics of the classes TrainingImage "
                f"and MemorizationRate, such as metrics=similarity, or leave it out: '~metrics.{name}'"
            )
        try:
            metric.check()
            metric.space.fetch()
        except NemoBenchError as error:
            left_out[name] = str(error)
            continue
        found[name] = Measure(metric.space, getattr(metric, "threshold", None))
    if not found:
        raise ConfigError(f"metrics: none can be measured ({next(iter(left_out.values()), 'none is given')})")
    return found, left_out


class Comparison(NamedTuple):
    """A run that is ready to measure pairs."""

    folder: Path  #: Of the run.
    measures: Mapping[str, Measure]  #: By the name of the metric.
    left_out: Mapping[str, str]  #: By the name of other metrics, why they can't be measured.


def open_comparison(settings: RunSettings) -> Comparison:
    """Makes the folder of the run, once some metric can be measured.

    Raises:
        NemoBenchError: None can, or the folder belongs to something else.
    """
    folder = Path(settings.root) / settings.name
    check_writable(folder)
    measures, left_out = measures_of(settings)
    open_folder(folder, [])
    for name, why in left_out.items():
        log.warning("%s is left out: %s", name, why)
    return Comparison(folder, measures, left_out)


def compare(comparison: Comparison, pairs: Sequence[Pair], source: str, *, progress: bool = True) -> Path:
    """Measures pairs with all metrics and transformations, to ``similarity.{html,md,csv,json}`` in the run's folder.

    Raises:
        NemoBenchError: A metric can't be measured on these images.
    """
    folder, measures, left_out = comparison
    scores = score_pairs(pairs, [measure.space for measure in measures.values()], progress=progress)
    by_metric = dict(zip(measures, scores, strict=True))
    rows = [row for name, measure in measures.items() for row in _rows(name, measure, pairs, by_metric[name])]
    count = Counter(pair.kind for pair in pairs)
    table = SimilarityTable(
        name=folder.name,
        source=source,
        kinds={pair.kind: PairKind(is_copy=pair.is_copy, pairs=count[pair.kind]) for pair in pairs},
        metrics={name: _info(measure) for name, measure in measures.items()},
        rows=rows,
        left_out=dict(left_out),
    )
    _save_sheet(folder / SHEET, next(pair for pair in pairs if pair.is_copy))
    write_text(folder / FILES[1], _csv(pairs, by_metric))
    return write_similarity(folder, table)


def score_pairs(
    pairs: Sequence[Pair], spaces: Sequence[ImageSpace], *, progress: bool = False
) -> list[dict[str, list[float]]]:
    """Similarities or distances of all pairs, in their order, by transformation of the image; for each space."""
    scores: list[dict[str, list[float]]] = [{name: [] for name in TRANSFORMATIONS} for _ in spaces]
    sizes = Counter(open_image(pair.image).size for pair in pairs)
    size = sizes.most_common(1)[0][0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for start, batch in zip(range(0, len(pairs), _BATCH), batched(pairs, _BATCH), strict=True):
        if progress:
            log.info("similarity: %d of %d pairs", start, len(pairs))
        images, references = ([open_image(getattr(p, side)) for p in batch] for side in ("image", "reference"))
        targets = _embedded(spaces, references, size, device)
        for name, change in TRANSFORMATIONS.items():
            changed = [change(image, start + number) for number, image in enumerate(images)]
            sources = _embedded(spaces, changed, size, device)
            for own, space in zip(scores, spaces, strict=True):
                own[name] += space.pair(sources[space.view], targets[space.view]).double().tolist()
    return scores


def _embedded(
    spaces: Sequence[ImageSpace], pictures: Sequence[Image.Image], size: tuple[int, int], device: torch.device
) -> dict[object, Tensor]:
    """Pictures by what embeds them; spaces of pixels share it."""
    by_view = {space.view: space for space in spaces}
    return {view: space.embed(pictures, size, device) for view, space in by_view.items()}


def _rows(name: str, measure: Measure, pairs: Sequence[Pair], scores: dict[str, list[float]]) -> list[SimilarityRow]:
    """The rows of a metric, one for each transformation."""
    sides = {
        change: [
            [measure.sign * value for value, pair in zip(values, pairs, strict=True) if pair.is_copy == is_copy]
            for is_copy in (True, False)
        ]
        for change, values in scores.items()
    }
    usual = best_threshold(*sides[UNCHANGED])
    rows = []
    for change, (copies, others) in sides.items():

        def at(threshold: float) -> Operating:
            tpr, fpr = rates(copies, others, threshold)  # noqa: B023 - called here alone
            return Operating(threshold=measure.sign * threshold, tpr=tpr, fpr=fpr)

        by_kind: dict[str, list[float]] = {}
        for value, pair in zip(scores[change], pairs, strict=True):
            by_kind.setdefault(pair.kind, []).append(float(measure.sign * value > usual))
        rows.append(
            SimilarityRow(
                metric=name,
                transformation=change,
                roc=Roc(title=measure.space.title, **detection(copies, others)),
                best=at(best_threshold(copies, others)),
                unchanged=at(usual),
                published=None if measure.threshold is None else at(measure.sign * measure.threshold),
                flagged={kind: sum(flags) / len(flags) for kind, flags in by_kind.items()},
            )
        )
    return rows


def _info(measure: Measure) -> MetricInfo:
    space = measure.space
    lower, upper = space.bounds
    return MetricInfo(
        title=space.title,
        description=space.description,
        citation=space.citation,
        lower=lower,
        upper=upper,
        higher_is_better=not space.is_distance,
    )


def _csv(pairs: Sequence[Pair], scores: dict[str, dict[str, list[float]]]) -> str:
    """A line for each pair and transformation, with all metrics."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["image", "reference", "label", "kind", "transformation", *scores])
    for number, pair in enumerate(pairs):
        about = [pair.image.name, pair.reference.name, "copy" if pair.is_copy else "other", pair.kind]
        for change in TRANSFORMATIONS:
            writer.writerow([*about, change, *(round(own[change][number], 6) for own in scores.values())])
    return buffer.getvalue()


def _save_sheet(path: Path, pair: Pair) -> None:
    """Pictures a copy under each transformation, in their order, after what it is a copy of."""
    from torchvision.utils import make_grid

    image = open_image(pair.image)
    pictures = [open_image(pair.reference), *(change(image, 0) for change in TRANSFORMATIONS.values())]
    side = min(_SHOWN, max(image.size))
    small = to_tensor([picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures])
    to_image(make_grid(small, nrow=(len(pictures) + 1) // 2, padding=4, pad_value=1.0)).save(path)
