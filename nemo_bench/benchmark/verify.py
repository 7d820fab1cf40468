"""Recomputes a sample of what a run recorded, on this machine, and compares; nothing is written into its folder."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nemo_bench.benchmark.pending import image_tasks, prompt_tasks, scored_tasks, task_ids
from nemo_bench.benchmark.plan import SCORING_FILE, Cell, metrics_of, plan, with_sources
from nemo_bench.benchmark.rescore import cells_of
from nemo_bench.benchmark.runner import Runner
from nemo_bench.benchmark.stages.generate import generate
from nemo_bench.benchmark.stages.localize import localize
from nemo_bench.benchmark.stages.memorization import measure_memorization
from nemo_bench.config.groups import named_classes
from nemo_bench.config.schema import words_within
from nemo_bench.config.targets import check_stored
from nemo_bench.errors import ConfigError, StoreError
from nemo_bench.metrics import SetMetric
from nemo_bench.records import schema
from nemo_bench.records.images import open_image
from nemo_bench.records.io import as_json, batched, read_file, write_text
from nemo_bench.records.schema import ImageRecord, LocalizationRecord, MemorizationRecord, PromptRecord, ScoreRecord
from nemo_bench.records.store import Store, read_digests, read_localizations

RECORDS = 4
"""Records of each stage of a cell that are recomputed where no number is asked for."""
TOLERANCE = 1e-3
"""Largest difference of a number; relative to the number where that is larger than 1."""
PIXEL_TOLERANCE = 0.02
"""Largest root mean square difference of the pixels of an image, in [0, 1]."""
SETTINGS = ("trainer", "batch_size", "workers")
"""Settings that say how to recompute, and change no result but by rounding."""

_T = TypeVar("_T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """What was recomputed of a stage of a cell."""

    cell: str  #: Name of the folder.
    stage: str  #: Name of the stage.
    recomputed: int  #: Number of records.
    equal: int  #: Records that are equal to the last bit, pictures included.
    #: Largest difference: of numbers, or the root mean square over an image's pixels; None where texts, neurons or the
    #: sizes of pictures differ.
    difference: float | None
    tolerance: float  #: Largest difference that passes.
    differing: list[str]  #: Records that differ by more.


def verify(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    records: int = RECORDS,
    conf: Path | None = None,
    progress: bool = True,
) -> list[Comparison]:
    """Recomputes some records of every stage of a run, or of one cell, and compares them with those recorded.

    Each stage starts from what is recorded of the stages before it: images from the recorded neurons, scores from the
    recorded images. The choice is the same every time, and one process makes it all. Images are taken in whole batches,
    as a run makes them, so that they are rounded alike.

    Args:
        folder: A run, or a cell of it.
        overrides: Settings of :data:`SETTINGS`, such as ``trainer=cpu``.
        records: Records of each stage of a cell, at least; scores are those of as many prompts and their images.
        conf: Folder with more YAML files, as the run had it.
        progress: Whether progress is shown.

    Raises:
        NemoBenchError: The folder holds no finished cell, or what it was made from is gone or changed.
    """
    if records < 1:
        raise ConfigError(f"records={records}: expected at least 1")
    if others := [word for word in overrides if word not in words_within(overrides, SETTINGS)]:
        raise ConfigError(f"{others[0]} can't be changed for what is recorded; settings here: {', '.join(SETTINGS)}")
    folder = folder.resolve()
    run = folder if (folder / "run.json").is_file() else folder.parent
    if not (run / "run.json").is_file():
        raise StoreError(f"{folder} is neither a run nor a cell of one; name results/<name> or results/<name>/<cell>")
    made = {cell.id: cell for cell in cells_of(run, overrides, conf=conf)}
    if folder != run and folder.name not in made:
        raise StoreError(f"{folder} is not finished, so it can't be verified")
    with tempfile.TemporaryDirectory(prefix="nemo-bench-verify-") as place:
        again = _planned(list(made.values()), Path(place), conf)
        settings = replace(next(iter(made.values())).config.settings.trainer, devices=1, num_nodes=1)
        runner = Runner(settings, progress=progress)
        found = []
        for name, cell in made.items():
            if folder in (run, cell.store.folder):
                found += list(_verified(cell, again.get(name), runner, Path(place) / "apart", records))
        return found


def _planned(made: Sequence[Cell], root: Path, conf: Path | None) -> dict[str, Cell]:
    """The cells of a run, but for external images, planned anew under another root, with all that they start from."""
    own = [cell for cell in made if cell.spec.task != "external"]
    for cell in own:
        check_stored(cell.config.settings.method, "method", named_classes(conf))
    configs = [replace(c.config, settings=replace(c.config.settings, root=str(root))) for c in own]
    cells = {cell.id: cell for cell in (plan(configs) if configs else ())}
    for cell in own:
        if cell.id not in cells:
            msg = f"{cell.store.folder}: its settings, or weights, prompts and files that they name, were changed since"
            raise StoreError(f"{msg}; put the former ones back")
    run = made[0].store.folder.parent
    for cell in with_sources(list(cells.values())):
        cell.store.open(cell.spec)
        _copy_records(Store(run / cell.id), cell.store, LocalizationRecord)
        if cell.calibration and (measured := run.parent / "calibration" / cell.calibration.folder.name).is_dir():
            shutil.copytree(
                measured, cell.calibration.folder, ignore=shutil.ignore_patterns(".lease.*"), dirs_exist_ok=True
            )
        if cell.fitted and (fitted := run.parent / "fitted" / cell.fitted.folder.name).is_dir():
            shutil.copytree(fitted, cell.fitted.folder, ignore=shutil.ignore_patterns(".lease.*"), dirs_exist_ok=True)
    return cells


def _verified(made: Cell, cell: Cell | None, runner: Runner, apart: Path, count: int) -> Iterator[Comparison]:
    """Recomputes the stages of a cell, given as recorded and, but for external images, as planned anew."""
    if cell is not None:
        yield from _from_model(made, cell, runner, apart, count)
    if made.store.is_done(ScoreRecord):
        yield _scores(made, runner, apart, count)


def _from_model(made: Cell, cell: Cell, runner: Runner, apart: Path, count: int) -> Iterator[Comparison]:
    seeds = cell.config.settings.localize_seeds
    tasks = _sample(prompt_tasks(cell), count, cell.id)
    if LocalizationRecord in cell.stages:
        if cell.source and not read_localizations(cell.source.store.folder):
            log.warning("%s: neurons can't be localized again, since those that they start from are gone", cell.id)
        else:
            store = Store(apart / LocalizationRecord.stage / cell.id)
            store.open(cell.spec)
            runner.calibrate(cell)
            originals = _sample(prompt_tasks(cell, LocalizationRecord), count, cell.id)
            runner.run_stage(LocalizationRecord, partial(localize, seeds=seeds), cell, originals, store=store)
            yield _compare(made, store, LocalizationRecord)
        cell.store.finish(LocalizationRecord, task_ids(cell, LocalizationRecord))
    runner.fit(cell)
    measure = partial(measure_memorization, seeds=seeds, **cell.losses)
    runner.run_stage(MemorizationRecord, measure, cell, tasks)
    yield _compare(made, cell.store, MemorizationRecord)
    rows = runner.rows(cell)
    batches = _sample(list(batched(image_tasks(cell), rows)), math.ceil(count / rows), cell.id)
    runner.run_stage(ImageRecord, generate, cell, [task for batch in batches for task in batch], rows)
    yield _compare(made, cell.store, ImageRecord)


def _scores(made: Cell, runner: Runner, apart: Path, count: int) -> Comparison:
    """Scores some prompts again, and their recorded images, with all metrics but those of whole sets."""
    metrics = metrics_of(made)
    kept = {
        name: node for name, node in made.config.settings.metrics.items() if not isinstance(metrics[name], SetMetric)
    }
    run, store = made.store.folder.parent, Store(apart / ScoreRecord.stage / made.id)
    other = read_file(made.store.folder / SCORING_FILE, schema.Scoring).unmitigated
    store.open(made.spec)
    for kind in (LocalizationRecord, MemorizationRecord):
        _copy_records(made.store, store, kind)
    if made.spec.source:  # rankings are those of the cell that its neurons come from
        source = Store(run / made.spec.source)
        own = Store(store.folder.parent / made.spec.source)
        _copy_records(source, own, LocalizationRecord)
        if (folder := source.folder / "scores").is_dir():
            shutil.copytree(folder, own.folder / "scores", dirs_exist_ok=True)
    prompts = {task.prompt.id for task in _sample(scored_tasks(made), count, made.id)}
    store.writer(ImageRecord)(
        record.model_copy(update={"image": str((made.store.folder / record.image).resolve()), "sha256": None})
        for record in made.store.records(ImageRecord).values()
        if record.prompt in prompts and record.image
    )
    config = replace(made.config, settings=replace(made.config.settings, metrics=kept))
    runner.score(replace(made, store=store, config=config, unmitigated=Store(run / other) if other else None))
    return _compare(made, store, ScoreRecord, kept)


def _copy_records(source: Store, store: Store, kind: type[PromptRecord]) -> None:
    """Copies the records of a stage, in the form of this version whatever the one that they were written in."""
    lines = [as_json(record) + "\n" for record in source.records(kind).values()]
    records = store.folder / "records"
    records.mkdir(parents=True, exist_ok=True)
    write_text(records / f"{kind.stage}.0.jsonl", "".join(lines))


def _sample(items: Sequence[_T], count: int, seed: str) -> list[_T]:
    """Some items in their order, always the same."""
    chosen = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    return [items[i] for i in sorted(chosen)]


def _compare(
    made: Cell, again: Store, kind: type[PromptRecord], metrics: Mapping[str, Any] | None = None
) -> Comparison:
    """Compares all records of a store with those of a cell; of scores, those of some metrics."""
    recorded, digests = made.store.records(kind), read_digests(made.store.folder)
    differences, equal = {}, 0
    for record in again.records(kind).values():
        first = recorded[record.id]
        difference = _difference(_result(first, metrics), _result(record, metrics))
        if isinstance(first, ImageRecord) and first.image and record.image:
            is_same = difference <= TOLERANCE
            files = made.store.folder / first.image, again.folder / record.image
            difference = _pixel_difference(*files, digests.get(first.image, ())) if is_same else math.inf
        seed = getattr(record, "seed", None)
        differences[record.prompt if seed is None else f"{record.prompt}, image {seed}"] = difference
        equal += difference == 0 and first.sha256 == record.sha256
    tolerance = PIXEL_TOLERANCE if kind is ImageRecord else TOLERANCE
    largest = max(differences.values(), default=0.0)
    return Comparison(
        cell=made.id,
        stage=kind.stage,
        recomputed=len(differences),
        equal=equal,
        difference=largest if math.isfinite(largest) else None,
        tolerance=tolerance,
        differing=[name for name, difference in differences.items() if difference > tolerance],
    )


def _result(record: PromptRecord, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a record says, without costs and what compares files."""
    uncompared: dict[str, Any] = {"cost": True, "sha256": True, "bytes": True, "file": True}
    result = record.model_dump(exclude={**uncompared, "localization": {"row_passes"}})
    if metrics is None:
        return result
    of_metrics = {key: result[key] or {} for key in ("scores", "failed")}
    return {**result, **{key: {m: v for m, v in by.items() if m in metrics} for key, by in of_metrics.items()}}


def _difference(first: Any, second: Any) -> float:
    """Largest difference of two results, infinite where something else than a number with a point differs."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return max((_difference(first[key], second[key]) for key in first), default=0.0)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return max(map(_difference, first, second), default=0.0)
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) / max(1.0, abs(first), abs(second))
    return 0.0 if first == second else math.inf


def _pixel_difference(first: Path, second: Path, digests: Sequence[str] | set[str]) -> float:
    """Root mean square difference of two images; infinite where the first is not the one that was recorded."""
    if digests and hashlib.sha256(first.read_bytes()).hexdigest() not in digests:
        return math.inf
    a, b = (np.asarray(open_image(path), np.float64) / 255 for path in (first, second))
    return float(np.sqrt(np.mean((a - b) ** 2))) if a.shape == b.shape else math.inf
