"""One Lightning trainer, and the stages that it takes cells through."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import math
import platform
import secrets
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from nemo_bench.benchmark.plan import (
    STATISTICS,
    THRESHOLD,
    Cell,
    ImageCell,
    Work,
    check_similarity,
    is_measured,
    metrics_of,
    similarity_of,
    source_of,
)
from nemo_bench.benchmark.processes import together
from nemo_bench.benchmark.stages.base import Stage
from nemo_bench.benchmark.stages.calibrate import CalibrationStage, PromptChunk, StatisticsStage
from nemo_bench.benchmark.stages.features import FeatureStage, FolderChunk, read_features
from nemo_bench.benchmark.stages.generate import GenerationStage
from nemo_bench.benchmark.stages.localize import LocalizationStage, localization_of
from nemo_bench.benchmark.stages.score import SampleReader, ScoringStage
from nemo_bench.benchmark.stopping import stop_at_sigterm
from nemo_bench.config import ModelSettings, TrainerSettings, resolve, rows_at_once
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, StoreError
from nemo_bench.localization import (
    Calibration,
    is_readable,
    merge_statistics,
    name_layers,
    read_statistics,
    thresholds,
    write_statistics,
)
from nemo_bench.metrics import BenchMetric, SetMetric
from nemo_bench.prompts import PromptDataModule, PromptTask
from nemo_bench.records.data import Neurons, Record
from nemo_bench.records.io import digest, is_whole, read_object, write_json, write_text
from nemo_bench.records.pictures import visible
from nemo_bench.records.statistics import GROUPS
from nemo_bench.records.store import SCHEMA, Store, image_digests, iterate_records, read_run

SETS = "sets.json"
"""Scores of whole sets of images in a cell's folder, by group and metric."""


def is_main() -> bool:
    """Whether this process is rank 0; known before Lightning starts the others."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def open_folder(folder: Path, cells: Sequence[ImageCell], *, instead: bool = False) -> None:
    """Makes the folder of a run, or adds cells to it; a list of cells that was lost is made again from what is there.

    Args:
        folder: The folder.
        cells: The cells that are asked for.
        instead: Take those off the list that are neither asked for nor finished; their folders stay.

    Raises:
        StoreError: It holds something else.
    """
    path = folder / "run.json"
    is_begun = path.exists() or any(is_whole(place, "cell") for place in folder.glob("*/spec.json"))
    if not is_begun and folder.exists() and any(p.suffix != ".part" for p in visible(folder.iterdir(), folder)):
        raise StoreError(f"{folder} is not empty and holds no run of nemo_bench; choose another name=... or root=...")
    folder.mkdir(parents=True, exist_ok=True)
    present = read_run(folder) if is_whole(path, "cells") else {"cells": _cells_in(folder)}
    token = present.get("token") or secrets.token_hex(4)
    names = [cell.id for cell in cells]
    listed = [name for name in present["cells"] if name in names or not instead or is_finished(folder / name)]
    listed += [name for name in names if name not in listed]
    write_json(path, {"schema": SCHEMA, "name": folder.name, "token": token, "cells": listed})


def _cells_in(folder: Path) -> list[str]:
    """Cells with images, or begun ones, that lie in the folder of a run, in the order of their names."""
    found = {path.parent.name: path for path in sorted(folder.glob("*/spec.json"))}
    return [name for name, path in found.items() if is_whole(path, "cell", "method")]


def is_finished(folder: Path) -> bool:
    """Whether a cell was taken to its scores."""
    return Store(folder).is_done("score") and (folder / "metrics.json").is_file()


def note_start(cell: Work, command: str, runner: Runner) -> None:
    """Writes down how a cell is gone on with, and its prompts."""
    path = cell.store.folder / "env.json"
    starts = read_object(path, "starts")["starts"] if is_whole(path, "starts") else []
    packages = ("nemo-bench", "torch", "diffusers", "transformers", "lightning", "torchmetrics", "open_clip_torch")
    start = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        **_git_state(),
        "world_size": runner.trainer.world_size,
        "device": _device_name(runner.trainer),
        "python": platform.python_version(),
        "settings": asdict(cell.config.settings),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    write_json(path, {"starts": [*starts, start]})
    files = ("references", "damaged_references")
    lines = [
        {
            **p._asdict(),
            "group": p.group,
            **{name: [str(file.resolve()) for file in getattr(p, name)] for name in files},
        }
        for p in cell.prompts
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
        ConfigError: Lightning can't have such a trainer on this machine, or a launcher's ranks do not fit it.
    """

    def __init__(self, settings: TrainerSettings, *, progress: bool = True) -> None:
        self.bar = StageBar()
        devices, nodes = together(settings.devices, settings.num_nodes)
        try:
            with _quiet():
                self.trainer = L.Trainer(
                    accelerator=settings.accelerator,
                    devices=devices,
                    num_nodes=nodes,
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
        self._rows: dict[str, int] = {}

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
        method, given = cell.method, cell.config.settings.model.statistics
        if not method.needs_calibration:
            return
        store = cell.calibration
        if is_main() and cell.measured:
            settings = {"model": cell.spec["model"], "prompts": len(cell.calibration_prompts)}
            store.open({"settings": settings, "general_prompts": cell.spec["general_prompts"]}, is_named=True)
        if STATISTICS in cell.measured:
            self._measure_statistics(cell)
        path = Path(resolve(given)) if given else store.folder / STATISTICS
        if not given and not path.exists():
            # No activations are finite: localizing fails prompt by prompt, and what else was asked for goes on.
            method.calibration = Calibration({}, {}, math.nan)
            return
        mean, std = name_layers(read_statistics(path), self.model(cell).masks.widths)
        if THRESHOLD in cell.measured:
            self._measure_threshold(cell)
        about = read_object(store.folder / THRESHOLD) if THRESHOLD in cell.measured else {}
        own = method.threshold
        tau = measured_threshold(store.folder) if own is None else own
        maxima = about["maxima"]["threshold"] if about else None
        method.calibration = Calibration(mean, std, tau, len(cell.calibration_prompts), maxima)

    def _measure_statistics(self, cell: Cell) -> None:
        store, path = cell.calibration, cell.calibration.folder / STATISTICS
        if is_readable(path):
            return
        chunks = PromptChunk.split(cell.calibration_prompts)
        label = cell.config.names["model"]
        self.run_stage("statistics", label, chunks, store, lambda: StatisticsStage(self.model(cell), store), 1)
        if is_main() and (merged := merge_statistics(store.folder / chunk.file for chunk in chunks)):
            write_statistics(path, merged)
        self.trainer.strategy.barrier()

    def _measure_threshold(self, cell: Cell) -> None:
        store, path = cell.calibration, cell.calibration.folder / THRESHOLD
        if is_measured(path):
            return
        rows = self.rows(cell)
        tasks, seeds = (
            [PromptTask.from_prompt(p) for p in cell.calibration_prompts],
            cell.config.settings.localize_seeds,
        )

        def make() -> Stage:
            return CalibrationStage(self.model(cell), seeds, store, cell.method.protocol, rows)

        self.run_stage("calibrate", cell.config.names["model"], tasks, store, make, max(1, rows // seeds))
        if is_main():
            records = store.records("calibrate")
            usable = [records[task.id]["pairs"] for task in tasks if "pairs" in records[task.id]]
            failed = len(tasks) - len(usable)
            unknown = {"threshold": None, "mean": None, "std": None, "passed_gate": None}
            found = thresholds(usable) if failed <= len(usable) else {**unknown, "prompts": 0, "maxima": unknown}
            write_json(path, {**found, "failed": failed, **cell.method.protocol.of_threshold})
        self.trainer.strategy.barrier()

    def _localize(self, cell: Cell) -> None:
        if cell.store.is_done("localize"):
            self._write_layers(cell)
            return
        if cell.source:
            self._localize(cell.source)
        self.calibrate(cell)

        def make() -> Stage:
            self._write_layers(cell)
            widths = self.model(cell).masks.widths
            records = by_prompt(cell.source.store) if cell.source else {}
            cell.method.batch_size = self.rows(cell)
            found = {p.id: localization_of(records[p.id]) for p in cell.source_prompts if "neurons" in records[p.id]}
            cell.method.fit(found, widths, cell.source_prompts)
            seeds = cell.config.settings.localize_seeds
            return LocalizationStage(self.model(cell), cell.method, seeds, cell.store, cell.prompts)

        self.run_stage("localize", cell.spec["method"], cell.prompt_tasks, cell.store, make, 1)

    def _write_layers(self, cell: Cell) -> None:
        path = cell.store.folder / "layers.json"
        if is_main() and not is_whole(path):
            write_json(path, self.model(cell).masks.widths)

    def _generate(self, cell: Cell) -> None:
        def make() -> Stage:
            neurons = neurons_by_prompt(cell.store)
            return GenerationStage(self.model(cell), cell.method, neurons, cell.store, cell.prompts)

        if cell.store.is_done("generate"):
            return
        size = cell.method.batch_size = self.rows(cell)
        self.run_stage("generate", cell.spec["method"], cell.image_tasks, cell.store, make, size)

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

        settings, images = cell.config.settings, iterate_records(store.folder, "generate")
        digests = image_digests(store.folder)
        reader = SampleReader(
            metrics.values(), store.folder, images, by_prompt(store), unmitigated_images(cell), digests=digests
        )
        size = max(1, rows_at_once(settings) // settings.seeds)
        tasks = scored_tasks(cell)
        self.run_stage("score", cell.spec["method"], tasks, store, make, size, reader, settings.workers)
        if is_main() and not is_whole(store.folder / SETS):
            write_json(store.folder / SETS, score_sets(cell, metrics))

    def _embed_real(self, metric: SetMetric, cell: ImageCell) -> None:
        """Takes the features of the real pictures that sets are compared with; once, then they are cached."""
        chunks, store = FolderChunk.split(metric.files), real_store(metric, cell)
        if is_main():
            store.open({"settings": dict(metric.space.fingerprint())}, is_named=True)
        self.trainer.strategy.barrier()
        self.run_stage("features", metric.title, chunks, store, lambda: FeatureStage(metric.space, store), 1)

    def run_stage(
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
        """Runs a stage over those of its tasks that have no record; what was done before is counted again.

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
        if is_main():
            store.recount(stage, [task.id for task in tasks])
        self.trainer.strategy.barrier()
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
        """The cell's model, loaded at the first need.

        Raises:
            NemoBenchError: It can't be loaded, or its noise differences can't be compared.
        """
        settings = cell.config.settings.model
        key = digest(cell.spec["settings"]["model"])
        if key not in self._models:
            self._models.clear()
            self._models[key] = load_model(settings)
        if isinstance(cell, Cell):
            check_similarity(self._models[key].latent_shape[1:], settings, cell.method)
        return self._models[key].to(self.trainer.strategy.root_device)

    def rows(self, cell: Work) -> int:
        """Images in a batch of the cell's model: as many as were asked for or, by ``auto``, as fit on the GPU."""
        settings, device = cell.config.settings, self.trainer.strategy.root_device
        if settings.batch_size != "auto" or device.type != "cuda":
            return rows_at_once(settings)
        key = digest(cell.spec["settings"]["model"])
        if key not in self._rows:
            model = self.model(cell)
            self._rows[key] = largest_batch(lambda rows: try_batch(model, rows))
            torch.cuda.empty_cache()
        return self._rows[key]


def largest_batch(attempt: Callable[[int], None], most: int = 256) -> int:
    """The largest power of two that an attempt has memory for.

    Args:
        attempt: Does what needs memory for so many rows; raises ``torch.OutOfMemoryError`` where there is too little.
        most: Tried first.

    Returns:
        1 to ``most``; 1 also where even that does not fit, so that the error is told where it happens.
    """
    while most > 1:
        try:
            attempt(most)
        except torch.OutOfMemoryError:
            most //= 2
        else:
            break
    return most


@torch.no_grad()
def try_batch(model: Diffusion, rows: int) -> None:
    """Does once what images of a batch need the most memory for: a guided UNet pass, and decoding."""
    latents = torch.zeros(rows, *model.latent_shape, device=model.device, dtype=model.dtype)
    passes = model.row_passes
    model.text_noise(latents, model.timestep(), model.unconditional(rows))
    model.decode(latents)
    model.row_passes = passes


def load_model(settings: ModelSettings) -> Diffusion:
    """Loads the model that settings describe, on the CPU."""
    return Diffusion(
        source_of(settings).load(settings.dtype),
        layers=settings.layers,
        steps=settings.steps,
        guidance=settings.guidance,
        similarity=similarity_of(settings),
        compiled=settings.compiled,
    )


def mostly_failed(stores: Iterable[Store], stage: str, what: str) -> list[str]:
    """A line for each cell of which more than half of a stage's records failed.

    Args:
        stores: Folders of cells.
        stage: The stage.
        what: What its records are of, such as ``images``.

    Returns:
        Cell, numbers, and the most frequent reason.
    """
    lines = []
    for store in stores:
        records = store.records(stage).values()
        reasons = Counter(record["failed"] for record in records if "failed" in record)
        if 2 * reasons.total() > len(records):
            reason, count = reasons.most_common(1)[0]
            of_them = "" if len(reasons) == 1 else f" ({count} of them)"
            lines.append(f"{store.folder.name}: {reasons.total()} of {len(records)} {what} failed: {reason}{of_them}")
    return lines


def by_prompt(store: Store) -> dict[str, Record]:
    """Localization records by prompt id."""
    return {record["prompt"]: record for record in store.records("localize").values()}


def neurons_by_prompt(store: Store) -> dict[str, Neurons]:
    """Neurons by prompt id, of the prompts that were localized without failing."""
    return {name: Neurons(record["neurons"]) for name, record in by_prompt(store).items() if "neurons" in record}


def measured_threshold(calibration: Path) -> float:
    """The memorization threshold in a calibration's folder; nan where most prompts of the calibration failed."""
    found = read_object(calibration / THRESHOLD, "threshold")["threshold"]
    return math.nan if found is None else float(found)


def scored_tasks(cell: ImageCell) -> list[PromptTask]:
    """The prompts of a cell that have images."""
    having = {record["prompt"] for record in iterate_records(cell.store.folder, "generate")}
    return [task for task in cell.prompt_tasks if task.prompt.id in having]


def unmitigated_images(cell: ImageCell) -> dict[str, Path]:
    """Files of the images without mitigation by record id, none where no cell has them."""
    if cell.unmitigated is None:
        return {}
    folder = cell.unmitigated.store.folder
    made = (record for record in iterate_records(folder, "generate") if "image" in record)
    return {record["id"]: (folder / record["image"]).resolve() for record in made}


def real_store(metric: SetMetric, cell: ImageCell) -> Store:
    """Where the features of a metric's real pictures are, for all runs under one root."""
    return Store(Path(cell.config.settings.root) / "real_images" / digest(metric.fingerprint(), 8))


def score_sets(cell: ImageCell, metrics: Mapping[str, BenchMetric]) -> dict[str, dict[str, float | None]]:
    """Scores of whole sets of images, by group and metric; groups of the same prompts are scored once.

    A score is None where it is not finite. Prompts all of whose images failed are left out.
    """
    wholes = {name: metric for name, metric in metrics.items() if isinstance(metric, SetMetric)}
    if not wholes:
        return {}
    files = {
        record["prompt"]: cell.store.folder / record["file"]
        for record in cell.store.records("score").values()
        if "file" in record
    }
    known: dict[tuple[str, ...], dict[str, float | None]] = {}
    table = {}
    for group in GROUPS:
        members = tuple(p.id for p in cell.prompts if group in ("all", p.group) and p.id in files)
        if members and members not in known:
            known[members] = {}
            for name, metric in wholes.items():
                images = read_features([files[i] for i in members], digest(metric.space.fingerprint()))
                store = real_store(metric, cell)
                real = read_features([store.folder / c.file for c in FolderChunk.split(metric.files)], "real")
                for value in metric.score(images=images, real=real).tolist():
                    known[members][name] = value if math.isfinite(value) else None
        if members:
            table[group] = known[members]
    return table


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
