"""From settings to results: cells, and the stages each one goes through."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import platform
import secrets
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from nemo_bench.aggregate import GROUPS, aggregate, presets
from nemo_bench.config import (
    Choice,
    ModelSettings,
    PromptSettings,
    RunSettings,
    SimilaritySettings,
    TrainerSettings,
    build,
    resolve,
)
from nemo_bench.diffusion import Diffusion, Similarity, Source
from nemo_bench.errors import ConfigError, NemoBenchError, StoreError, nearest
from nemo_bench.localization import (
    Calibration,
    merge_statistics,
    name_layers,
    read_statistics,
    threshold,
    write_statistics,
)
from nemo_bench.localization.published import PublishedRow, by_position, published_text
from nemo_bench.methods import Method
from nemo_bench.metrics import FIELDS, BenchMetric, SetMetric, detection
from nemo_bench.modules import (
    CalibrationStage,
    FeatureStage,
    FolderChunk,
    GenerationStage,
    LocalizationStage,
    PromptChunk,
    SceneReader,
    ScoringStage,
    Stage,
    StatisticsStage,
    localization_of,
    read_features,
)
from nemo_bench.prompts import (
    ImageTask,
    PromptDataModule,
    PromptTask,
    dead_references,
    prompts_digest,
    read_prompts,
    references_digest,
)
from nemo_bench.report import write_report
from nemo_bench.stopping import stop_at_sigterm
from nemo_bench.store import SCHEMA, Store, iterate_records, read_json, write_json, write_text
from nemo_bench.tracking import sweep_trial, track
from nemo_bench.types import Neurons, Prompt, Record, digest

STAGES = ("localize", "generate", "score")
STATISTICS = "statistics.pt"
"""Activation statistics in a calibration's folder, in the published form."""
THRESHOLD = "threshold.json"
"""The memorization threshold in a calibration's folder, with the numbers it comes from."""
SETS = "sets.json"
"""Scores of whole sets of images in a cell's folder, by group and metric."""


UNMITIGATED = {"_target_": "nemo_bench.methods.NoMitigation"}
"""Settings of a method that does nothing."""


class Work(Protocol):
    """What owns a results folder: settings, prompts, what decides the result, and the folder."""

    choice: Choice
    prompts: list[Prompt]
    spec: dict[str, Any]
    store: Store


@dataclass(eq=False, kw_only=True)
class ImageCell:
    """Images of some prompts, scored together; owner of one results folder.

    Attributes:
        choice: Names and settings.
        prompts: All prompts.
        spec: What decides the result, as written to ``spec.json``.
        store: Its folder.
        unmitigated: The cell of the same images without mitigation: one that was asked for, or finished before.
    """

    choice: Choice
    prompts: list[Prompt]
    spec: dict[str, Any]
    store: Store
    unmitigated: ImageCell | None = None

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.store.folder.name

    @property
    def is_mitigated(self) -> bool:
        """Whether there is any mitigation."""
        return bool(self.spec["settings"]["method"] != UNMITIGATED)

    @property
    def prompt_tasks(self) -> list[PromptTask]:
        """All prompts."""
        return [PromptTask.of(p) for p in self.prompts]


@dataclass(eq=False, kw_only=True)
class Cell(ImageCell):
    """A model, a method and prompts: the unit of work.

    Attributes:
        method: The mitigation.
        calibration_prompts: General prompts for what is measured, none where nothing is.
        calibration: Folder of the model's calibration.
        measured: Files in it that the method, or its source, can't do without.
        source: The cell whose localization this one starts from; it need not be one that was asked for.
    """

    method: Method
    calibration_prompts: list[Prompt]
    calibration: Store
    measured: list[str]
    source: Cell | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether nothing is left to be measured on general prompts."""
        return all((self.calibration.folder / name).exists() for name in self.measured)

    @property
    def image_tasks(self) -> list[ImageTask]:
        """All images, prompt by prompt."""
        return [ImageTask.of(p, seed) for p in self.prompts for seed in range(self.choice.settings.seeds)]

    def ids(self, stage: str) -> list[str]:
        """Record ids of a finished stage."""
        prompts, images = [t.id for t in self.prompt_tasks], [t.id for t in self.image_tasks]
        return {"localize": prompts, "generate": images, "score": prompts}[stage]


def plan(choices: Sequence[Choice], weights: Mapping[Source, str] | None = None) -> list[Cell]:
    """Makes the cells that were asked for.

    Args:
        choices: What was asked for.
        weights: Digests of weights that are not looked at, for cells that are counted and never run.

    Returns:
        Cells in the same order, each folder once; their prompt files are read and checked, no model is loaded and
        nothing written.

    Raises:
        NemoBenchError: Prompts, references or a model folder are not as they should be.
    """
    if any(choice.settings.detector is not None for choice in choices):
        raise ConfigError("detectors are run by nemo-bench detect; leave out detector=...")
    for key in ("name", "root", "trainer", "logger"):
        if any(getattr(c.settings, key) != getattr(choices[0].settings, key) for c in choices):
            raise ConfigError(f"{key} must be the same for all cells of a run; give one value, or run twice")
    weights = weights or {}
    prompts: dict[str, list[Prompt]] = {}
    asked: dict[str, Cell] = {}
    for choice in choices:
        cell = _cell(choice, prompts, weights)
        if asked.setdefault(cell.id, cell).choice.settings != choice.settings:
            msg = f"two cells of the grid share the folder {cell.id}: what differs does not change images; run twice"
            raise ConfigError(msg)
    by_settings = {digest(cell.spec["settings"]): cell for cell in asked.values()}
    for cell in asked.values():
        cell.unmitigated = _unmitigated(cell, by_settings, prompts, weights)
    unlinked = list(asked.values())
    for cell in unlinked:
        if cell.method.source:
            settings = replace(cell.choice.settings, method=cell.choice.settings.method["source"])
            name = type(cell.method.source).__name__.lower()
            source = _cell(Choice({**cell.choice.names, "method": name}, settings), prompts, weights)
            cell.source = by_settings.setdefault(digest(source.spec["settings"]), source)
            if cell.source is source:
                unlinked.append(source)
    return list(asked.values())


def _unmitigated(
    cell: Cell, asked: Mapping[str, Cell], cache: dict[str, list[Prompt]], weights: Mapping[Source, str]
) -> Cell | None:
    if not cell.is_mitigated:
        return None
    settings = replace(cell.choice.settings, method=UNMITIGATED)
    none = _cell(Choice({**cell.choice.names, "method": "none"}, settings), cache, weights)
    found = asked.get(digest(none.spec["settings"]))
    return found or (none if none.store.is_done("generate") else None)


def read_listed(settings: PromptSettings) -> list[Prompt]:
    """Reads the prompts that are benchmarked.

    Raises:
        NemoBenchError: A file can't be read, or two have a prompt of the same id.
    """
    return read_files(settings.files, settings.limit, settings.references, settings.memorized)


def read_files(
    files: Sequence[str], limit: int | None = None, references: str | None = None, memorized: Sequence[str] = ()
) -> list[Prompt]:
    """Reads the prompts of several files.

    Args:
        files: Prompt files; ``package:`` stands for the folder of this package.
        limit: Take so many prompts of each file.
        references: Folder that ``nemo-bench references`` filled.
        memorized: Those of the files whose prompts are memorized where no kind is annotated.

    Raises:
        NemoBenchError: A file can't be read, or two have a prompt of the same id.
    """
    folder = Path(resolve(references)) if references else None
    prompts = [
        p
        for file in files
        for p in read_prompts(resolve(file), references=folder, memorized=file in memorized, limit=limit)
    ]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ConfigError(f"prompts.files={list(files)}: two files have a prompt with id '{prompt.id}'")
        seen.add(prompt.id)
    return prompts


def _read(cache: dict[str, list[Prompt]], *arguments: Any) -> list[Prompt]:
    key = digest(arguments)
    if key not in cache:
        cache[key] = read_files(*arguments)
    return cache[key]


def _cell(choice: Choice, cache: dict[str, list[Prompt]], weights: Mapping[Source, str]) -> Cell:
    settings = choice.settings
    model = settings.model
    method = build(settings.method, "method")
    if not isinstance(method, Method):
        raise ConfigError(f"method._target_={settings.method['_target_']}: expected a nemo_bench.methods.Method")
    method.batch_size = settings.batch_size
    source = source_of(model)
    if source not in weights:
        method.check(source.family.pipeline.__name__, model.guidance, model.dtype, compiled=model.compiled)
    check_metrics(settings)
    listed = settings.prompts
    prompts = _read(cache, listed.files, listed.limit, listed.references, listed.memorized)
    published = read_statistics(Path(resolve(model.statistics))) if model.statistics else None
    measured = to_measure(method, model)
    general = [listed.calibration] if measured and listed.calibration else []
    calibration_prompts = _read(cache, general, listed.calibration_limit)
    if measured and len(calibration_prompts) < 2:
        msg = (
            f"method={choice.names['method']} needs general prompts, at least 2, given {len(calibration_prompts)}: set "
            "prompts.calibration to a prompt file, or give both model.statistics and the method's threshold"
        )
        raise ConfigError(msg)
    commit = {"commit": source.commit} if source not in weights and source.commit else {}
    network = {
        "weights": weights.get(source) or source.digest(),
        "dtype": model.dtype,
        "layers": model.layers,
        "similarity": asdict(model.similarity),
    }
    calibration = {
        **network,
        "statistics": digest([[v.tolist() for v in side] for side in published]) if published else None,
        "seeds": settings.localize_seeds,
        "prompts": prompts_digest(calibration_prompts),
        "protocol": next((m.protocol.name for m in _lineage(method) if m.needs_calibration), None),
    }
    uses_calibration = any(m.needs_calibration for m in _lineage(method))
    decisive = {
        "model": {**network, "steps": model.steps, "guidance": model.guidance},
        "method": decisive_settings(settings.method, method, prompts),
        "prompts": prompts_digest(prompts),
        "calibration": digest(calibration) if uses_calibration else None,
        "seeds": settings.seeds,
        "localize_seeds": settings.localize_seeds,
    }
    names = [choice.names.get(group, group) for group in ("model", "method", "prompts")]
    root = Path(settings.root)
    folder = "__".join([*names, digest(decisive, 8)])
    calibration_folder = f"{names[0]}__{digest(calibration, 8)}"
    spec = {
        "cell": folder,
        "model": names[0],
        "method": names[1],
        "prompts": names[2],
        "title": method.title,
        "settings": decisive,
        "digests": {"model": network["weights"], "prompts": decisive["prompts"], **commit},
        "citations": _citations(method),
        "calibration": f"../../calibration/{calibration_folder}" if THRESHOLD in measured else None,
    }
    return Cell(
        choice=choice,
        method=method,
        prompts=prompts,
        calibration_prompts=calibration_prompts,
        spec=spec,
        store=Store(root / settings.name / folder),
        calibration=Store(root / "calibration" / calibration_folder),
        measured=measured,
    )


def check_metrics(settings: RunSettings) -> None:
    """Makes sure that metrics can be computed, before anything loads.

    Raises:
        NemoBenchError: One is no metric, or weights or pictures that some need are missing; all of those are named.
    """
    lacking: dict[tuple[type[NemoBenchError], str], list[str]] = {}
    for name, node in settings.metrics.items():
        metric = build(node, f"metrics.{name}")
        if not isinstance(metric, BenchMetric) or not metric.needs <= FIELDS:
            msg = (
                f"metrics.{name}: expected a BenchMetric that needs some of {', '.join(sorted(FIELDS))}, given {metric}"
            )
            raise ConfigError(msg)
        try:
            metric.check()
        except NemoBenchError as error:
            lacking.setdefault((type(error), str(error)), []).append(f"metrics.{name}")
    if lacking:
        lines = [f"{', '.join(names)}: {message}" for (_, message), names in lacking.items()]
        without = " ".join(f"'~{name}'" for names in lacking.values() for name in names)
        raise next(kind for kind, _ in lacking)("\n".join([*lines, f"without: {without}"]))


def to_measure(method: Method, model: ModelSettings) -> list[str]:
    """What a method and its sources take from general prompts, since nobody gave it."""
    calibrated = [m for m in _lineage(method) if m.needs_calibration]
    given = {STATISTICS: model.statistics is not None, THRESHOLD: all(m.threshold is not None for m in calibrated)}
    return [name for name, present in given.items() if calibrated and not present]


def _lineage(method: Method) -> list[Method]:
    """A method, its source, the source of that, and so on."""
    return [method, *(_lineage(method.source) if method.source else [])]


def decisive_settings(settings: dict[str, Any], method: Method, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The settings of a method with what they refer to, in place of where it is."""
    source = {"source": decisive_settings(settings["source"], method.source, prompts)} if method.source else {}
    return {**settings, **method.content(prompts), **source}


def _citations(method: Method) -> dict[str, str]:
    return {m.title: m.citation for m in _lineage(method) if m.citation}


def is_main() -> bool:
    """Whether this process is rank 0; known before Lightning starts the others."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def run(cells: Sequence[Cell], command: str, say: Callable[[str], None] = print, *, progress: bool = True) -> Path:
    """Runs what is open of some cells, to the report.

    Args:
        cells: From :func:`plan`, of one name and root.
        command: What the user typed, for the records.
        say: Where single lines go.
        progress: Whether bars are shown.

    Returns:
        The folder of the run, with ``report.html`` and the leaderboard.

    Raises:
        NemoBenchError: See :func:`plan`; also where a results folder belongs to something else.
    """
    settings = cells[0].choice.settings
    folder = Path(settings.root) / settings.name
    if settings.logger.wandb:
        sweep_trial({cell.id: cell.spec["method"] for cell in cells})
    runner = Runner(settings.trainer, progress=progress)
    runner.start()
    if is_main():
        open_folder(folder, cells)
        for cell in with_sources(cells):
            cell.store.open(cell.spec)
            note_start(cell, command, runner)
            _reopen(cell)
        renew_scores(cells)
    runner.trainer.strategy.barrier()
    for cell in cells:
        runner.make(cell)
    if is_main():
        for cell in cells:
            _publish(cell)
    finish(cells, runner, say)
    return folder


def renew_scores(cells: Sequence[ImageCell]) -> None:
    """Downloads what open metrics are to download; forgets scores of other metrics or other reference images."""
    stale = [cell for cell in cells if _scores_are_stale(cell)]
    for cell in cells:
        for metric in metrics_of(cell).values() if cell in stale or not cell.store.is_done("score") else ():
            metric.space.fetch()
    for cell in stale:
        _forget_scores(cell.store)
        write_json(cell.store.folder / "scoring.json", _scoring(cell))


def finish(cells: Sequence[ImageCell], runner: Runner, say: Callable[[str], None] = print) -> None:
    """Scores what is open of cells whose images are there, to the report of their run.

    Args:
        cells: Cells of one run.
        runner: The trainer.
        say: Where single lines go.
    """
    for cell in cells:
        runner.score(cell)
    if is_main():
        folder, logger = cells[0].store.folder.parent, cells[0].choice.settings.logger
        for cell in cells:
            write_json(cell.store.folder / "metrics.json", _summary(cell))
        write_report(folder)
        try:
            track(folder, logger, cells=[cell.id for cell in cells], say=say)
        except NemoBenchError as error:
            say(str(error))


def calibrate(cells: Sequence[Cell], *, progress: bool = True) -> list[dict[str, Any]]:
    """Measures on general prompts what the methods of some cells, or their sources, need; once, then it is cached.

    Args:
        cells: From :func:`plan`, of one root.
        progress: Whether bars are shown.

    Returns:
        One entry a calibration: model; threshold; mean and standard deviation of the pairwise scores it comes from
        (None where it was given); number of general prompts; file of the statistics; folder of what was measured.

    Raises:
        NemoBenchError: See :func:`plan`; also where no method takes a calibration.
    """
    needed = [cell for cell in with_sources(cells) if cell.method.needs_calibration]
    if not needed:
        raise ConfigError("none of the methods asked for takes a calibration; name one that does, such as method=nemo")
    if not all(cell.is_calibrated for cell in needed):
        runner = Runner(needed[0].choice.settings.trainer, progress=progress)
        runner.start()
        for cell in needed:
            runner.calibrate(cell)
    rows = [_calibration_of(cell) for cell in needed]
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def _calibration_of(cell: Cell) -> dict[str, Any]:
    folder, given = cell.calibration.folder, cell.choice.settings.model.statistics
    scores = {"threshold": cell.method.threshold, "mean": None, "std": None, "prompts": len(cell.calibration_prompts)}
    return {
        "model": cell.spec["model"],
        **(read_json(folder / THRESHOLD) if cell.method.threshold is None else scores),
        "protocol": cell.method.protocol.name,
        "statistics": resolve(given) if given else str(folder / STATISTICS),
        "folder": str(folder) if cell.measured else None,
    }


def with_sources(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, and before them the sources that were not asked for, each before what starts from it."""
    sources: list[Cell] = []
    for cell in cells:
        while cell.source:
            cell = cell.source
            sources.insert(0, cell)
    return [*dict.fromkeys(source for source in sources if source not in cells), *cells]


def open_folder(folder: Path, cells: Sequence[ImageCell]) -> None:
    """Makes the folder of a run, or adds cells to it.

    Raises:
        StoreError: It holds something else.
    """
    path = folder / "run.json"
    if not path.exists() and folder.exists() and any(p.suffix != ".part" for p in folder.iterdir()):
        raise StoreError(f"{folder} is not empty and holds no run of nemo_bench; choose another name=... or root=...")
    folder.mkdir(parents=True, exist_ok=True)
    present = read_json(path) if path.exists() else {"cells": [], "token": secrets.token_hex(4)}
    listed = [*present["cells"], *(c.id for c in cells if c.id not in present["cells"])]
    write_json(path, {"schema": SCHEMA, "name": folder.name, "token": present["token"], "cells": listed})


def _reopen(cell: Cell) -> None:
    """Opens stages again that were done once and miss something now."""
    store = cell.store
    for stage in STAGES:
        if store.is_done(stage) and store.open_ids(stage, cell.ids(stage)):
            store.reopen(stage)
            _forget_scores(store)


def _forget_scores(store: Store) -> None:
    store.forget("score")
    (store.folder / SETS).unlink(missing_ok=True)


def _scoring(cell: ImageCell) -> dict[str, Any]:
    """What decides the scores of given images."""
    nodes, metrics = cell.choice.settings.metrics, metrics_of(cell)
    paired = cell.unmitigated and any("unmitigated" in metric.needs for metric in metrics.values())
    content = {
        "metrics": {name: {**nodes[name], **metric.content()} for name, metric in metrics.items()},
        "unmitigated": cell.unmitigated.id if cell.unmitigated and paired else None,
        "references": references_digest(cell.prompts),
    }
    return json.loads(json.dumps(content))  # as it will be read again


def _scores_are_stale(cell: ImageCell) -> bool:
    path = cell.store.folder / "scoring.json"
    return not path.exists() or read_json(path) != _scoring(cell)


def note_start(cell: Work, command: str, runner: Runner) -> None:
    """Writes down how a cell is gone on with, and its prompts."""
    path = cell.store.folder / "env.json"
    starts = read_json(path)["starts"] if path.exists() else []
    packages = ("nemo-bench", "torch", "diffusers", "transformers", "lightning", "torchmetrics", "open_clip_torch")
    start = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        **_git_state(),
        "world_size": runner.trainer.world_size,
        "device": _device_name(runner.trainer),
        "python": platform.python_version(),
        "settings": asdict(cell.choice.settings),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    write_json(path, {"starts": [*starts, start]})
    lines = [
        {**p._asdict(), "group": p.group, "references": [str(r.resolve()) for r in p.references]} for p in cell.prompts
    ]
    write_text(cell.store.folder / "prompts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _git_state() -> dict[str, Any]:
    def git(*words: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        ours = git("rev-parse", "--show-toplevel") == str(Path(__file__).resolve().parents[1])
        commit = git("rev-parse", "HEAD") if ours else None
        return {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}
    except OSError:
        return {"commit": None, "dirty": None}


def _device_name(trainer: L.Trainer) -> str:
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.get_device_name(trainer.strategy.root_device)
    return trainer.strategy.root_device.type


class StageBar(TQDMProgressBar):
    """Lightning's progress bar with the stage's name; shows rate and remaining time."""

    def __init__(self) -> None:
        super().__init__()
        self.description = ""

    @property
    def predict_description(self) -> str:
        """What stands before the bar."""
        return self.description

    def on_predict_batch_start(self, *args: Any, **options: Any) -> None:
        """Keeps the description free of the number of the only dataloader."""
        super().on_predict_batch_start(*args, **options)
        self.predict_progress_bar.set_description(self.description)


class Stoppable(L.Callback):
    """Takes SIGTERM back from Lightning, which would predict on after it."""

    def on_predict_start(self, *_: Any) -> None:
        """Lightning's own handler is there by now."""
        stop_at_sigterm()


class _Nothing(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_step(self, *_: Any) -> None:
        """There is no batch."""


class Runner:
    """One Lightning trainer and the models loaded so far.

    Args:
        settings: The trainer's settings.
        progress: Whether bars are shown.

    Raises:
        ConfigError: Lightning can't have such a trainer on this machine.
    """

    def __init__(self, settings: TrainerSettings, *, progress: bool = True) -> None:
        self.bar = StageBar()
        try:
            with _quiet():
                self.trainer = L.Trainer(
                    accelerator=settings.accelerator,
                    devices=settings.devices,
                    num_nodes=settings.num_nodes,
                    strategy=settings.strategy,
                    use_distributed_sampler=False,
                    logger=False,
                    enable_checkpointing=False,
                    enable_model_summary=False,
                    enable_progress_bar=progress,
                    callbacks=[Stoppable(), *([self.bar] if progress else [])],
                )
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise ConfigError(f"trainer settings do not fit this machine: {str(error).strip()}") from error
        self._models: dict[str, Diffusion] = {}

    def start(self) -> None:
        """Starts the other processes and connects them, so that they wait for what the first one writes from now on.

        Lightning does so where it first predicts; each process would have looked at the records by then.
        """
        if self.trainer.world_size > 1:
            with _quiet():
                nothing: DataLoader[Any] = DataLoader([])  # type: ignore[arg-type] # a list is a data set
                self.trainer.predict(_Nothing(), nothing, return_predictions=False)

    def make(self, cell: Cell) -> None:
        """Takes a cell to its images, through the stages that are not done."""
        self._localize(cell)
        self._generate(cell)

    def calibrate(self, cell: Cell) -> None:
        """Gives the method its calibration: what was given, and the rest from the cache or measured now."""
        method, given = cell.method, cell.choice.settings.model.statistics
        if not method.needs_calibration:
            return
        store = cell.calibration
        if is_main() and cell.measured:
            store.open({"settings": {"model": cell.spec["model"], "prompts": len(cell.calibration_prompts)}})
        if STATISTICS in cell.measured:
            self._measure_statistics(cell)
        path = Path(resolve(given)) if given else store.folder / STATISTICS
        mean, std = name_layers(read_statistics(path), self.model(cell).masks.widths)
        if THRESHOLD in cell.measured:
            self._measure_threshold(cell)
        own = method.threshold
        tau = read_json(store.folder / THRESHOLD)["threshold"] if own is None else own
        method.calibration = Calibration(mean, std, tau, len(cell.calibration_prompts))

    def _measure_statistics(self, cell: Cell) -> None:
        store, path = cell.calibration, cell.calibration.folder / STATISTICS
        if path.exists():
            return
        chunks = PromptChunk.split(cell.calibration_prompts)
        if is_main() and store.is_done("statistics") and store.open_ids("statistics", [c.id for c in chunks]):
            store.reopen("statistics")
        self.trainer.strategy.barrier()
        label = cell.choice.names["model"]
        self.go_through("statistics", label, chunks, store, lambda: StatisticsStage(self.model(cell), store), 1)
        if is_main():
            write_statistics(path, merge_statistics(store.folder / chunk.file for chunk in chunks))
        self.trainer.strategy.barrier()

    def _measure_threshold(self, cell: Cell) -> None:
        store, path = cell.calibration, cell.calibration.folder / THRESHOLD
        if path.exists():
            return
        tasks, seeds = [PromptTask.of(p) for p in cell.calibration_prompts], cell.choice.settings.localize_seeds
        rows = cell.choice.settings.batch_size

        def make() -> Stage:
            return CalibrationStage(self.model(cell), seeds, store, cell.method.protocol, rows)

        self.go_through("calibrate", cell.choice.names["model"], tasks, store, make, max(1, rows // seeds))
        if is_main():
            records = store.records("calibrate")
            pairs = [value for task in tasks for value in records[task.id]["pairs"]]
            scores = torch.tensor(pairs, dtype=torch.float64)
            about = {"mean": float(scores.mean()), "std": float(scores.std()), "prompts": len(tasks)}
            write_json(path, {"threshold": threshold(pairs), **about, "protocol": cell.method.protocol.name})
        self.trainer.strategy.barrier()

    def _localize(self, cell: Cell) -> None:
        if cell.store.is_done("localize"):
            return
        if cell.source:
            self._localize(cell.source)
        self.calibrate(cell)

        def make() -> Stage:
            widths = self.model(cell).masks.widths
            if is_main():
                write_json(cell.store.folder / "layers.json", widths)
            found = by_prompt(cell.source.store) if cell.source else {}
            cell.method.fit({name: localization_of(record) for name, record in found.items()}, widths)
            seeds = cell.choice.settings.localize_seeds
            return LocalizationStage(self.model(cell), cell.method, seeds, cell.store, cell.prompts)

        self.go_through("localize", cell.spec["method"], cell.prompt_tasks, cell.store, make, 1)

    def _generate(self, cell: Cell) -> None:
        def make() -> Stage:
            neurons = {name: Neurons(r["neurons"]) for name, r in by_prompt(cell.store).items()}
            return GenerationStage(self.model(cell), cell.method, neurons, cell.store, cell.prompts)

        size = cell.choice.settings.batch_size
        self.go_through("generate", cell.spec["method"], cell.image_tasks, cell.store, make, size)

    def score(self, cell: ImageCell) -> None:
        """Scores the images of a cell, where that is not done; those without mitigation must be there."""
        metrics, store = metrics_of(cell), cell.store
        for metric in metrics.values():
            if isinstance(metric, SetMetric):
                self._embed_real(metric, cell)

        def make() -> Stage:
            return ScoringStage(
                metrics, store, list(dict.fromkeys(path for p in cell.prompts for path in p.references))
            )

        settings, images = cell.choice.settings, iterate_records(store.folder, "generate")
        reader = SceneReader(metrics.values(), store.folder, images, by_prompt(store), unmitigated_images(cell))
        size = max(1, settings.batch_size // settings.seeds)
        self.go_through("score", cell.spec["method"], cell.prompt_tasks, store, make, size, reader, settings.workers)
        if is_main() and not (store.folder / SETS).exists():
            write_json(store.folder / SETS, score_sets(cell, metrics))

    def _embed_real(self, metric: SetMetric, cell: ImageCell) -> None:
        """Takes the features of the real pictures that sets are compared with; once, then they are cached."""
        chunks, store = FolderChunk.split(metric.files), real_store(metric, cell)
        if is_main():
            store.open({"settings": dict(metric.space.content())})
            if store.is_done("features") and store.open_ids("features", [chunk.id for chunk in chunks]):
                store.reopen("features")
        self.trainer.strategy.barrier()
        self.go_through("features", metric.title, chunks, store, lambda: FeatureStage(metric.space, store), 1)

    def go_through(
        self,
        stage: str,
        label: str,
        tasks: Sequence[Any],
        store: Store,
        make: Callable[[], Stage],
        batch_size: int,
        read: Callable[[list[Any]], Any] = list,
        workers: int = 0,
    ) -> None:
        """Runs a stage over those of its tasks that have no record, unless it is done.

        Args:
            stage: Its name.
            label: What stands beside the bar.
            tasks: All tasks.
            store: Where the records go.
            make: Makes the stage.
            batch_size: Tasks in a batch.
            read: Makes a batch of tasks into what the stage takes.
            workers: Processes that read ahead.
        """
        if store.is_done(stage):
            return
        self.describe(stage, label)
        data: PromptDataModule[Any] = PromptDataModule(tasks, store, stage, batch_size, read, workers)
        self.predict(make(), data)
        if is_main():
            store.finish(stage, [task.id for task in tasks])
        self.trainer.strategy.barrier()

    def describe(self, stage: str, label: str) -> None:
        """Says beside the bar what comes next."""
        self.bar.description = f"{stage:>10} {label:<8}"

    def predict(self, stage: L.LightningModule, data: L.LightningDataModule) -> None:
        """Runs a stage over all that is open; every process goes on when all are through."""
        with _quiet():
            self.trainer.predict(stage, datamodule=data, return_predictions=False)
        self.trainer.strategy.barrier()

    def model(self, cell: Work) -> Diffusion:
        """The cell's model, loaded at the first need."""
        settings = cell.choice.settings.model
        key = digest(cell.spec["settings"]["model"])
        if key not in self._models:
            self._models.clear()
            self._models[key] = load_model(settings)
        return self._models[key].to(self.trainer.strategy.root_device)


def source_of(settings: ModelSettings) -> Source:
    """Where the weights are; nothing is read."""
    config = resolve(settings.config) if settings.config else None
    return Source(resolve(settings.source), settings.revision, config, settings.local_files_only)


def load_model(settings: ModelSettings) -> Diffusion:
    """Loads the model that settings describe, on the CPU."""
    kind = settings.similarity
    return Diffusion(
        source_of(settings).load(settings.dtype),
        layers=settings.layers,  # type: ignore[arg-type] # checked with the settings
        steps=settings.steps,
        guidance=settings.guidance,
        similarity=Similarity(kind.sigma, tuple(kind.betas)),
        compiled=settings.compiled,
    )


def metrics_of(cell: ImageCell) -> dict[str, BenchMetric]:
    """The cell's metrics by name, in the order of the settings."""
    return {name: build(node, f"metrics.{name}") for name, node in cell.choice.settings.metrics.items()}


def by_prompt(store: Store) -> dict[str, Record]:
    """Localization records by prompt id."""
    return {record["prompt"]: record for record in store.records("localize").values()}


def _publish(cell: Cell) -> None:
    """Writes what a method found in the published form, beside the records."""
    if type(cell.method).localize is Method.localize:
        return
    widths, found = read_json(cell.store.folder / "layers.json"), by_prompt(cell.store)
    rows = []
    for prompt in cell.prompts:
        result = localization_of(found[prompt.id])
        initial, refined = by_position(result.initial, widths), by_position(result.neurons, widths)
        rows.append(PublishedRow(prompt.text, "", initial, result.initial_score, refined, result.refined_score))
    write_text(cell.store.folder / "neurons.csv", published_text(rows))


def unmitigated_images(cell: ImageCell) -> dict[str, Path]:
    """Files of the images without mitigation by record id, none where no cell has them."""
    if cell.unmitigated is None:
        return {}
    folder = cell.unmitigated.store.folder
    return {record["id"]: (folder / record["image"]).resolve() for record in iterate_records(folder, "generate")}


def real_store(metric: SetMetric, cell: ImageCell) -> Store:
    """Where the features of a metric's real pictures are, for all runs under one root."""
    return Store(Path(cell.choice.settings.root) / "real_images" / digest(metric.content(), 8))


def score_sets(cell: ImageCell, metrics: Mapping[str, BenchMetric]) -> dict[str, dict[str, float]]:
    """Scores of whole sets of images, by group and metric; groups of the same prompts are scored once."""
    wholes = {name: metric for name, metric in metrics.items() if isinstance(metric, SetMetric)}
    if not wholes:
        return {}
    files = {
        record["prompt"]: cell.store.folder / record["file"]
        for record in cell.store.records("score").values()
        if "file" in record
    }
    known: dict[tuple[str, ...], dict[str, float]] = {}
    table = {}
    for group in GROUPS:
        members = tuple(p.id for p in cell.prompts if group in ("all", p.group))
        if members and members not in known:
            known[members] = {}
            for name, metric in wholes.items():
                images = read_features([files[i] for i in members], digest(metric.space.content()))
                store = real_store(metric, cell)
                real = read_features([store.folder / c.file for c in FolderChunk.split(metric.files)], "real")
                known[members].update((name, value) for value in metric.score(images=images, real=real).tolist())
        if members:
            table[group] = known[members]
    return table


def _summary(cell: ImageCell) -> dict[str, Any]:
    store = cell.store
    localized, generated = store.records("localize").values(), store.records("generate").values()
    scored = store.records("score").values()
    peak = max((r.get("cost", {}) for r in [*localized, *generated]), key=lambda cost: cost.get("peak_memory_mb", 0))
    about = {name: metric.describe() for name, metric in metrics_of(cell).items()}
    aggregates = aggregate(scored, cell.prompts, _scores_without_mitigation(cell))
    for group, row in read_json(store.folder / SETS).items():
        count = sum(group in ("all", p.group) for p in cell.prompts)
        nothing = dict.fromkeys(("low", "high", "median", "mad"))
        aggregates.setdefault(group, {}).update(
            {name: {"mean": value, **nothing, "prompts": count} for name, value in row.items()}
        )

    def costs(records: Iterable[Record], field: str) -> list[float]:
        return [record["cost"][field] for record in records if field in record.get("cost", {})]

    measured = {
        "localize_seconds_per_prompt": costs(localized, "seconds"),
        "localize_row_passes_per_prompt": costs(localized, "row_passes"),
        "generate_seconds_per_image": costs(generated, "seconds"),
        "row_passes_per_image": costs(generated, "row_passes"),
    }
    memory = costs([*localized, *generated], "peak_memory_mb")
    return {
        "schema": SCHEMA,
        "unmitigated": cell.unmitigated.id if cell.unmitigated else None,
        "metrics": about,
        "aggregates": aggregates,
        "presets": presets(scored, cell.prompts, about),
        "detection": _detection(cell, localized),
        "counts": {
            "images": len(generated),
            "prompts": len(cell.prompts),
            "truncated": sum(bool(record.get("truncated")) for record in scored),
            "without_reference": sum(bool(p.kind) and not p.references for p in cell.prompts),
            "dead_references": len(dead_references(cell.prompts)),
        },
        # Nothing is known of the cost of images that were made elsewhere.
        "cost": {
            **{name: round(sum(values) / len(values), 4) for name, values in measured.items() if values},
            **({"peak_memory_mb": max(memory)} if memory else {}),
        },
        "peak_memory_of": "process" if peak.get("device", "cpu") == "cpu" else "GPU",
    }


def _scores_without_mitigation(cell: ImageCell) -> Iterable[Record]:
    """Scores to pair with those of a cell; none where other metrics or reference images made them."""
    none = cell.unmitigated
    if none is None or not none.store.is_done("score"):
        return ()
    own, other = (read_json(store.folder / "scoring.json") for store in (cell.store, none.store))
    same = all(own[key] == other[key] for key in ("metrics", "references"))
    return none.store.records("score").values() if same else ()


def _detection(cell: ImageCell, localized: Iterable[Record]) -> dict[str, Any]:
    """How well the memorization score tells memorized prompts from others: without mitigation, where both are there."""
    kinds = {p.id: bool(p.kind) for p in cell.prompts}
    scores = {kind: [r["memorization"] for r in localized if kinds[r["prompt"]] == kind] for kind in (True, False)}
    if cell.is_mitigated or not all(scores.values()):
        return {}
    return {"memorization": {"title": "Memorization score", **detection(scores[True], scores[False])}}


def outlook(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What a run would do, without loading or writing anything.

    Returns:
        One entry a cell, and before them one for each source that was not asked for: open records by stage, whether it
        is calibrated (None where it need not be), missing references.
    """
    rows = []
    for cell in with_sources(cells):
        stages = STAGES if cell in cells else STAGES[:1]
        open_ids = {stage: len(cell.store.open_ids(stage, cell.ids(stage))) for stage in stages}
        if "score" in open_ids and _scores_are_stale(cell):
            open_ids["score"] = len(cell.prompts)
        rows.append(
            {
                "cell": cell.id,
                "open": open_ids,
                "calibrated": cell.is_calibrated if cell.method.needs_calibration else None,
                "prompts_without_reference": sum(bool(p.kind) and not p.references for p in cell.prompts),
            }
        )
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides Lightning's advice on workers and its device listing; errors and other warnings pass."""
    loggers = [
        logging.getLogger(n) for n in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*Total length of .* across ranks is zero.*")
            warnings.filterwarnings("ignore", message="predict returned None.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")
            warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export(cell: Path, folder: Path, prompt: str | None = None) -> Neurons:
    """Saves a cell's pipeline with the neurons of its localization switched off for good.

    Args:
        cell: A cell's folder.
        folder: Where the plain diffusers folder goes; must not hold anything yet.
        prompt: Id of the prompt whose neurons are taken; None takes those of all memorized prompts together, or of
            all prompts where none is known to be memorized.

    Returns:
        What was switched off.

    Raises:
        NemoBenchError: The cell has no localization, the prompt is unknown, or the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} is not empty; name a new folder to export to")
    found = {name: Neurons(record["neurons"]) for name, record in by_prompt(Store(cell)).items()}
    if not found:
        raise StoreError(f"{cell} holds no localization; give results/<name>/<cell> of a finished run")
    if prompt is not None and prompt not in found:
        raise ConfigError(f"no prompt '{prompt}' in {cell}. {nearest(prompt, found)}")
    lines = (cell / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    memorized = [found[p["id"]] for p in map(json.loads, lines) if p["kind"] and p["id"] in found]
    neurons = found[prompt] if prompt is not None else reduce(or_, memorized or found.values())
    if not neurons:
        raise StoreError(f"{cell} switches nothing off; name the cell of a method that localizes, such as nemo")
    settings = read_json(cell / "env.json")["starts"][-1]["settings"]
    model = settings["model"]
    loaded = load_model(ModelSettings(**{**model, "similarity": SimilaritySettings(**model["similarity"])}))
    loaded.export(folder, neurons, settings["method"].get("factor", 0.0))
    return neurons


def command_line() -> str:
    """What the user typed."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
