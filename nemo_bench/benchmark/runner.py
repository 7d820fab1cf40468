"""Runs the stages of cells with one Lightning trainer."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import math
import platform
import random
import secrets
import subprocess
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.launchers import subprocess_script
from torch import Tensor

from nemo_bench import localization
from nemo_bench.benchmark import pending, plan
from nemo_bench.benchmark.plan import STATISTICS, THRESHOLD, Cell
from nemo_bench.benchmark.processes import explained, is_main, together, watch_ranks
from nemo_bench.benchmark.progress import ProgressReport
from nemo_bench.benchmark.stages.base import Chunk, Stage
from nemo_bench.benchmark.stages.calibrate import measure_pairs, measure_statistics
from nemo_bench.benchmark.stages.fit import FITTED, FitProgress, fit_weights
from nemo_bench.benchmark.stages.generate import generate
from nemo_bench.benchmark.stages.localize import localize
from nemo_bench.benchmark.stages.memorization import measure_memorization
from nemo_bench.benchmark.stages.score import (
    References,
    SampleReader,
    Scorer,
    embed_real,
    read_features,
    shuffled_texts,
)
from nemo_bench.config import ModelSettings, TrainerSettings, build, resolve
from nemo_bench.config.schema import rows_at_once
from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.masks import check_neurons
from nemo_bench.errors import ConfigError, ModelError, StoreError, first_line
from nemo_bench.methods import FittedMethod, Method, Setup
from nemo_bench.metrics import BenchMetric, SetMetric
from nemo_bench.prompts.data import Counters, PromptDataModule, SharedBatches
from nemo_bench.prompts.tasks import Task
from nemo_bench.records import schema
from nemo_bench.records.images import visible
from nemo_bench.records.io import batched, digest, is_whole, read_file, remove_parts, write_json
from nemo_bench.records.lease import POLL, Leases, holder, read_lease
from nemo_bench.records.schema import Record
from nemo_bench.records.statistics import GROUPS
from nemo_bench.records.store import Store, read_digests, read_localizations, read_run, write_prompts

MADE = (schema.LocalizationRecord, schema.MemorizationRecord, schema.ImageRecord)
"""Records of the stages in which runs may assist each other."""
LOOK = 5.0
"""Seconds between two looks at what others have recorded, at least."""
T = TypeVar("T")
_stages = count()  # of all runners, since counters of a process group are never taken back

log = logging.getLogger(__name__)


def open_folder(folder: Path, cells: Sequence[Cell], *, instead: bool = False) -> None:
    """Makes the folder of a run, or adds cells to it; a list of cells that was lost is made again from the folders.

    Args:
        folder: The folder.
        cells: The cells that are asked for.
        instead: Take those off the list that are neither asked for nor finished nor worked on; their folders stay.

    Raises:
        StoreError: It holds something else.
    """
    path = folder / "run.json"
    begun = [place.parent.name for place in sorted(folder.glob("*/spec.json")) if is_whole(place, schema.Spec)]
    is_begun = path.exists() or begun
    if not is_begun and folder.exists() and any(p.suffix != ".part" for p in visible(folder.iterdir(), folder)):
        raise StoreError(f"{folder} is not empty and holds no run of nemo_bench; choose another name=... or root=...")
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder.glob("*.part"))
    if is_whole(path, schema.Run):
        present = read_run(folder)
    else:
        methods = [name for name in begun if read_file(folder / name / "spec.json", schema.Spec).method is not None]
        present = schema.Run(name=folder.name, token=secrets.token_hex(4), cells=methods)
    names = [cell.id for cell in cells]
    listed = [
        name
        for name in present.cells
        if name in names or not instead or pending.is_finished(folder / name) or read_lease(folder / name)
    ]
    listed += [name for name in names if name not in listed]
    found = {**present.strengths, **{cell.id: cell.config.strength for cell in cells if cell.config.strength}}
    strengths = {name: strength for name, strength in found.items() if name in listed}
    write_json(path, present.model_copy(update={"name": folder.name, "cells": listed, "strengths": strengths}))


def note_start(cell: Cell, command: str, runner: Runner) -> None:
    """Writes down a start of a cell, and its prompts."""
    path = cell.store.folder / "env.json"
    starts = read_file(path, list[schema.Start]) if is_whole(path, list[schema.Start]) else []
    packages = ("nemo-bench", "torch", "diffusers", "transformers", "lightning", "torchmetrics", "open_clip_torch")
    start = schema.Start(
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        **_git_state(),
        world_size=runner.trainer.world_size,
        device=_device_name(runner.trainer),
        python=platform.python_version(),
        settings=asdict(cell.config.settings),
        versions={name: _version(name) for name in packages},
    )
    write_json(path, [*starts, start])
    write_prompts(cell.store.folder, cell.prompts)


_version = cache(importlib.metadata.version)


@cache  # the code that runs is that of the start, and git takes as long as the rest of a cell
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
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Runner:
    """One Lightning trainer, the model loaded last, and the method set up last.

    Args:
        settings: Of the trainer.
        progress: Whether progress is shown.

    Raises:
        ConfigError: Lightning can't have such a trainer on this machine, or a launcher's ranks do not fit it.
    """

    def __init__(self, settings: TrainerSettings, *, progress: bool = True) -> None:
        self.counters = Counters()
        self.progress = ProgressReport(self.counters, show=progress)
        self.leases = Leases()
        self.progress.listeners.append(self.leases.note)
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
                    enable_progress_bar=False,
                    callbacks=[self.progress],
                )
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise ConfigError(f"trainer settings do not fit this machine: {str(error).strip()}") from error
        self._models: dict[str, Diffusion] = {}
        self._methods: dict[str, Method] = {}
        self._rows: dict[str, int] = {}
        self._costs: dict[str, float] = {}
        """UNet passes that localizing took for a prompt, in cells before."""
        self._references = References()
        self._real: dict[str, tuple[SetMetric, Tensor]] = {}
        """Metrics of whole sets by what decides them, each with the features of its real pictures."""

    def start(self) -> None:
        """Starts the other processes and connects them, so that they wait for what the first one writes from now on.

        Lightning does so where it first predicts; each process would have looked at the records by then.
        """
        if self.trainer.world_size > 1:
            # Lightning's own observer kills this process, without a word, once a rank has died.
            subprocess_script._launch_process_observer = watch_ranks  # type: ignore[attr-defined, assignment]
            self._predict(Stage(lambda *_: [], Record, None), SharedBatches([], int))

    def wait(self) -> None:
        """Waits for all processes.

        Raises:
            NemoBenchError: One of them has died.
        """
        with self._explained():
            self.trainer.strategy.barrier()

    def _explained(self) -> AbstractContextManager[None]:
        return explained(getattr(self.trainer.strategy.launcher, "procs", []))

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in all processes."""
        with self._explained():
            return self.trainer.strategy.broadcast(decide() if is_main() else None)  # type: ignore[return-value]

    @contextmanager
    def holding(self, *folders: Path) -> Iterator[None]:
        """Owns some folders, once no other run does; damaged lines of their records are set aside."""
        folders = tuple(sorted(set(folders)))  # in one order, so that two runs never wait for each other
        try:
            for folder in folders:
                waited = False
                while not self.agree(partial(self.leases.claim, folder)):
                    if is_main() and not waited:
                        log.info("%s; waiting", holder(folder))
                    waited = True
                    time.sleep(POLL)
                if is_main():
                    Store(folder).upgrade()
                    Store(folder).set_damaged_aside()
            yield
        finally:
            for folder in folders:
                self.leases.release(folder)

    def generate(self, cell: Cell) -> None:
        """Takes a cell to its images, through the stages that are not done."""
        self.localize(cell)
        if not self.agree(partial(cell.store.is_done, schema.ImageRecord)):
            self.fit(cell)
        for kind in (schema.MemorizationRecord, schema.ImageRecord):
            self.make(kind, cell)

    def localize(self, cell: Cell) -> None:
        """Localizes the neurons of a cell's prompts, and before them those that its method starts from."""
        store = cell.store
        if is_main() and not is_whole(store.folder / "layers.json", schema.Layers):
            model = self.model(cell)
            weights = sum(parameter.numel() for parameter in model.network.parameters())
            try:
                size = schema.Network(weights=weights, flops_per_pass=model.flops_per_pass)
                write_json(store.folder / "network.json", size)
            except (RuntimeError, TypeError) as error:
                # Counting runs the network without weights, which not every layer can do; images need no count.
                msg = "floating point operations are left out: a pass of this network can't be counted: %s"
                log.warning(msg, first_line(error))
            write_json(store.folder / "layers.json", model.masks.widths)
        if schema.LocalizationRecord not in cell.stages or self.agree(
            partial(store.is_done, schema.LocalizationRecord)
        ):
            return
        if cell.source:
            self.localize(cell.source)
        self.calibrate(cell)
        self.make(schema.LocalizationRecord, cell)
        records = store.records(schema.LocalizationRecord).values()
        self._costs |= {r.prompt: r.cost.once_row_passes for r in records if r.cost and r.cost.once_row_passes}

    def fit(self, cell: Cell) -> None:
        """Fits the weights that the cell's method needs, unless they are there; the first process alone does."""
        store = cell.fitted
        if store is None or self.agree(lambda: (store.folder / FITTED).is_file()):
            return
        if is_main():
            identity = {key: cell.spec.settings[key] for key in ("model", "method")}
            store.open(schema.Spec(task="fit", settings=identity), is_named=True)
        name = f"stage {next(_stages)}"
        with self.holding(store.folder):
            self.wait()
            if is_main() and not (store.folder / FITTED).is_file():
                method: FittedMethod = build(cell.config.settings.method, "method")
                log.info("%s: fitting its weights, in %s", method.title, store.folder)
                model = self.model(cell)
                setup = Setup(prompts=cell.originals, batch_size=self.rows(cell))
                before = model.row_passes
                with _quiet():
                    fit = method.fit(model, setup)
                    shown = FitProgress(self.progress, name, str(cell.spec.method), fit.updates)
                    device = self.trainer.strategy.root_device
                    fit_weights(fit, store.folder, device, [shown], lambda: model.row_passes - before)
            # A barrier would give up after the half hour that a process group waits.
            self.counters.add(f"{name} over", int(is_main()))
            with self._explained():
                while not self.counters.add(f"{name} over", 0):
                    time.sleep(POLL)
            self.wait()

    def make(self, kind: type[Record], cell: Cell, *, assisting: bool = False) -> None:
        """Makes the records of one of the stages :data:`MADE` that are pending.

        ``assisting`` the run that owns the cell, it takes them in another order than that one.
        """
        seeds = cell.config.settings.localize_seeds
        handles: dict[type[Record], Callable[..., Sequence[Record]]] = {
            schema.LocalizationRecord: partial(localize, seeds=seeds),
            schema.MemorizationRecord: partial(measure_memorization, seeds=seeds, **cell.losses),
            schema.ImageRecord: generate,
        }
        is_image = kind is schema.ImageRecord
        tasks = pending.image_tasks(cell) if is_image else pending.prompt_tasks(cell, kind)
        size = self.rows(cell) if is_image else 1
        self.run_stage(kind, handles[kind], cell, tasks, size, assisting=assisting)

    def method(self, cell: Cell, rows: int | None = None) -> Method:
        """The cell's mitigation, set up: the only place where a method is given anything.

        What localizing starts from is given as long as neurons are pending: later it may be gone. Its passes take
        ``rows`` rows at most, by default those of :meth:`rows`.

        Raises:
            NotFiniteError: What all prompts share is not finite.
        """
        if cell.id not in self._methods:
            method: Method = build(cell.config.settings.method, "method")
            fitted = cell.fitted.folder / FITTED if cell.fitted else None
            setup = Setup(prompts=cell.originals, batch_size=rows or self.rows(cell), fitted=fitted)
            if not cell.store.is_done(schema.LocalizationRecord):
                found = read_localizations(cell.source.store.folder) if cell.source else {}
                setup = replace(
                    setup,
                    calibration=self._calibration(cell, method),
                    source_localizations={p.id: found[p.id] for p in cell.source_prompts if p.id in found},
                    source_prompts=cell.source_prompts,
                )
            method.setup(self.model(cell), setup)
            self._methods.clear()
            self._methods[cell.id] = method
        return self._methods[cell.id]

    def calibrate(self, cell: Cell) -> None:
        """Measures on general prompts what the method needs and what is not in the cache."""
        store = cell.calibration
        if store is None or cell.method is None or not cell.method.needs_calibration or not cell.measured:
            return  # a source calibrates itself
        if is_main():
            settings = {"model": cell.spec.model, "prompts": len(cell.calibration_prompts)}
            spec = schema.Spec(task="calibrate", settings=settings, general_prompts=cell.spec.general_prompts)
            store.open(spec, is_named=True)
        if self.agree(lambda: cell.is_calibrated):
            return
        with self.holding(store.folder):
            files = {name: store.folder / name for name in cell.measured}
            if STATISTICS in files and not self.agree(partial(localization.is_readable, files[STATISTICS])):
                self._measure_statistics(cell, store)
            is_measured = THRESHOLD not in files or self.agree(partial(plan.is_measured, files[THRESHOLD]))
            # Without finite activations localizing fails prompt by prompt, and the rest of the run goes on.
            if not is_measured and self.agree(lambda: self._statistics(cell) is not None):
                self._measure_threshold(cell, store)

    def _calibration(self, cell: Cell, method: Method) -> localization.Calibration | None:
        """What localizing compares with."""
        if not method.needs_calibration:
            return None
        statistics = self._statistics(cell)
        if statistics is None:
            return localization.Calibration({}, {}, math.nan)
        threshold, highest = method.memorization_threshold, None
        if THRESHOLD in cell.measured:
            measured = read_file(cell.calibration_file(THRESHOLD), schema.Threshold)
            highest = measured.maxima.threshold
            threshold = measured.threshold if threshold is None else threshold
        tau = math.nan if threshold is None else threshold
        return localization.Calibration(*statistics, tau, len(cell.calibration_prompts), highest)

    def _statistics(self, cell: Cell) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Mean and standard deviation of activations by layer, given or measured; None where none were finite."""
        given = cell.config.settings.model.statistics
        path = Path(resolve(given)) if given else cell.calibration_file(STATISTICS)
        if not given and not path.exists():
            return None
        return localization.name_layers(localization.read_statistics(path), self.model(cell).masks.widths)

    def _measure_statistics(self, cell: Cell, store: Store) -> None:
        chunks = Chunk.from_prompts(cell.calibration_prompts)
        label = cell.spec.model
        self.run_stage(schema.ChunkRecord, measure_statistics, cell, chunks, store=store, label=label)
        records = store.records(schema.ChunkRecord)
        files = (store.folder / str(records[chunk.id].file) for chunk in chunks)
        if is_main() and (merged := localization.merge_statistics(files)):
            localization.write_statistics(store.folder / STATISTICS, merged)
        self.wait()

    def _measure_threshold(self, cell: Cell, store: Store) -> None:
        assert cell.method is not None
        protocol = next(m for m in plan.lineage(cell.method) if m.needs_calibration).noise_protocol
        tasks = [Task.of_prompt(prompt) for prompt in cell.calibration_prompts]
        seeds = cell.config.settings.localize_seeds
        handle = partial(measure_pairs, seeds=seeds, protocol=protocol)
        size = max(1, self.rows(cell) // seeds)
        self.run_stage(schema.CalibrationRecord, handle, cell, tasks, size, store=store, label=cell.spec.model)
        if is_main():
            records = store.records(schema.CalibrationRecord)
            usable = [pairs for task in tasks if (pairs := records[task.id].pairs) is not None]
            failed = len(tasks) - len(usable)
            found = localization.thresholds(usable) if failed <= len(usable) else {}
            result = schema.Threshold.model_validate({**found, "failed": failed, **protocol.of_threshold})
            write_json(store.folder / THRESHOLD, result)
        self.wait()

    def score(self, cell: Cell) -> None:
        """Scores the images of a cell, where that is not done; those without mitigation must be there."""
        metrics = plan.metrics_of(cell)
        store, settings = cell.store, cell.config.settings
        for metric in metrics.values():
            if isinstance(metric, SetMetric):
                self._embed_real(metric, cell)
        pool = list(dict.fromkeys(path for p in cell.prompts for path in p.references))
        measured = store.records(schema.MemorizationRecord).values()
        needed = {field for metric in metrics.values() for field in metric.needs}
        # Without a localization there is nothing to compare.
        compares = "truth" in needed and cell.localizes
        layers = store.folder / "layers.json"
        if compares and layers.is_file():  # no model may be loaded, by which it is checked otherwise
            check_truth(read_file(layers, schema.Layers), settings.model)
        reader = SampleReader(
            metrics.values(),
            store.folder,
            store.records(schema.ImageRecord).values(),
            neurons=pending.localized_neurons(store, cell.spec, cell.prompts),
            memorization={record.prompt: record.score for record in measured if record.score is not None},
            losses={record.prompt: record.loss for record in measured if record.loss is not None},
            rankings=pending.rankings(store, cell.spec) if "ranking" in needed else {},
            truth=plan.truth_of(settings.model) if compares else {},
            unmitigated=pending.unmitigated_images(cell),
            digests=read_digests(store.folder),
        )
        size = max(1, rows_at_once(settings) // settings.seeds)
        tasks = pending.scored_tasks(cell)
        workers = settings.workers
        if self._references.files != tuple(pool):
            self._references = References(pool)
        shuffled = {} if cell.is_mitigated else shuffled_texts(cell.originals)
        handle = Scorer(metrics, self._references, shuffled)
        self.run_stage(schema.ScoreRecord, handle, cell, tasks, size, needs_model=False, read=reader, workers=workers)
        if is_main() and not is_whole(store.folder / pending.SETS_FILE, schema.Sets):
            write_json(store.folder / pending.SETS_FILE, score_sets(cell, metrics, self._real))

    def _embed_real(self, metric: SetMetric, cell: Cell) -> None:
        """Takes the features of the real pictures that sets are compared with; once, then they are cached."""
        chunks = Chunk.from_files(metric.files)
        store = real_store(metric, cell)
        handle = partial(embed_real, space=metric.space)
        if is_main():
            store.open(schema.Spec(task="features", settings=dict(metric.space.fingerprint())), is_named=True)
        with self.holding(store.folder):
            self.wait()
            self.run_stage(schema.ChunkRecord, handle, cell, chunks, store=store, label=metric.title, needs_model=False)

    def run_stage(
        self,
        kind: type[Record],
        handle: Callable[..., Sequence[Record]],
        cell: Cell,
        tasks: Sequence[Any],
        batch_size: int = 1,
        *,
        store: Store | None = None,
        label: str = "",
        needs_model: bool = True,
        read: Callable[[list[Any]], Any] = list,
        workers: int = 0,
        assisting: bool = False,
    ) -> None:
        """Runs a stage over its tasks without a record; what was done before is counted again.

        Args:
            kind: Class of its records.
            handle: Computes the records of a batch, given the :class:`Stage` and the batch.
            cell: The cell.
            tasks: All tasks.
            batch_size: Tasks in a batch.
            store: Where the records go; None for the cell's folder.
            label: What stands beside the stage's name where progress is shown; empty for the method.
            needs_model: Whether it needs the cell's model and mitigation.
            read: Makes a batch of tasks into what ``handle`` takes.
            workers: Processes that read ahead.
            assisting: Whether another run owns the stage: its tasks are taken in any order, and left for it to count.
        """
        store = store or cell.store
        ids = [task.id for task in tasks]
        if is_main() and not assisting:
            store.recount(kind, ids)
        if self.agree(partial(store.is_done, kind)):
            return

        def share_out() -> tuple[list[Sequence[Any]], list[str], set[str]]:
            pending_ids = set(store.pending_ids(kind, ids))
            # Batches of images are the same whatever is done already, so that images are the same to the bit.
            every = tasks if kind is schema.ImageRecord else [task for task in tasks if task.id in pending_ids]
            batches = [batch for batch in batched(every, batch_size) if any(task.id in pending_ids for task in batch)]
            if kind is schema.LocalizationRecord:
                # What takes longest first, so that no process is left with it at the end.
                batches.sort(key=lambda batch: -sum(self._costs.get(task.prompt.id, math.inf) for task in batch))
            if assisting:
                random.shuffle(batches)
            done = [task.id for batch in batches for task in batch if task.id not in pending_ids]
            # Of an image that was lost there is a record, which says nothing of whether it is there again.
            return batches, done, pending_ids & store.records(kind).keys()

        batches, done, lost = self.agree(share_out)
        parts: dict[str, Any] = {"done": set(done), "assisting": assisting}
        if needs_model:
            neurons = pending.localized_neurons(cell.store, cell.spec, cell.prompts)
            method = partial(self.method, cell)
            parts |= {"model": self.model(cell), "method": method, "neurons": neurons, "batch_size": self.rows(cell)}
        stage = Stage(handle, kind, store, **parts)
        others = len(ids) - sum(map(len, batches))
        options: dict[str, Any] = {"read": read, "workers": workers, "is_pending": Unrecorded(store, kind, lost)}
        self.predict(stage, batches, label or str(cell.spec.method), others, **options)
        if is_main() and not assisting:
            store.finish(kind, ids)
        self.wait()

    def predict(
        self, stage: Stage, batches: Sequence[Sequence[Any]], label: str, done: int = 0, **options: Any
    ) -> None:
        """Runs a stage over batches of tasks, each taken by a process that is free; returns when all are through.

        Args:
            stage: The stage.
            batches: Tasks in batches, the same in all processes.
            label: What stands beside the stage's name where progress is shown.
            done: Tasks that are in none of the batches.
            options: Of :class:`nemo_bench.prompts.data.SharedBatches`.
        """
        name = f"stage {next(_stages)}"
        if not batches:
            return
        self.progress.begin(name, stage.name, label, done, done + sum(map(len, batches)))
        try:
            take = partial(self.counters.add, name, 1)
            self._predict(stage, SharedBatches(batches, take, skip=self.progress.skip, **options))
        finally:
            self.progress.end()

    def _predict(self, stage: Stage, batches: SharedBatches) -> None:
        with _quiet(), self._explained():
            self.trainer.predict(stage, datamodule=PromptDataModule(batches), return_predictions=False)
        self.wait()

    def model(self, cell: Cell) -> Diffusion:
        """The cell's model, loaded at the first need.

        Raises:
            NemoBenchError: It can't be loaded, its noise differences can't be compared, or it has not all neurons
                of ``model.truth``.
        """
        settings = cell.config.settings.model
        key = digest(cell.spec.settings["model"])
        if key not in self._models:
            self._models.clear()
            self._methods.clear()
            self._models[key] = load_model(settings)
        check_truth(self._models[key].masks.widths, settings)
        if cell.method is not None:
            plan.check_similarity(self._models[key].latent_shape[1:], settings, cell.method)
        try:
            return self._models[key].to(self.trainer.strategy.root_device)
        except torch.OutOfMemoryError as error:
            msg = f"the model does not fit the memory of the GPU ({first_line(error)}); take model.dtype=float16 or"
            raise ModelError(f"{msg} bfloat16, or end what else is on it (nvidia-smi shows it)") from error

    def rows(self, cell: Cell) -> int:
        """Images in a batch of the cell's model: as many as were asked for or, by ``auto``, as fit on the GPU."""
        settings, device = cell.config.settings, self.trainer.strategy.root_device
        if settings.batch_size != "auto" or device.type != "cuda":
            return rows_at_once(settings)
        key = digest(cell.spec.settings["model"])
        if key not in self._rows:
            model = self.model(cell)
            self._rows[key] = largest_batch(lambda rows: try_batch(model, rows))
            torch.cuda.empty_cache()
        return self._rows[key]


class Unrecorded:
    """Whether any task of a batch has no record yet, judged by records that were read a few seconds ago.

    Other runs that assist this one record tasks too. What is looked at too late is recorded twice, and counts once.

    Args:
        store: Where the records are.
        kind: Class of the records.
        lost: Ids of records whose file was lost, which count as tasks without.
    """

    def __init__(self, store: Store, kind: type[Record], lost: Collection[str]) -> None:
        self.store = store
        self.kind = kind
        self.lost = lost
        self._recorded: Collection[str] = ()
        self._next = 0.0

    def __call__(self, batch: Sequence[Any]) -> bool:
        """Whether a batch is left to do."""
        start = time.monotonic()
        if start >= self._next:
            self._recorded = self.store.records(self.kind).keys()
            end = time.monotonic()
            # Reading all records takes no more than a fiftieth of the time.
            self._next = end + max(LOOK, 50 * (end - start))
        return any(task.id in self.lost or task.id not in self._recorded for task in batch)


def largest_batch(attempt: Callable[[int], None], most: int = 256) -> int:
    """The largest power of two, up to ``most``, for which an attempt raises no ``torch.OutOfMemoryError``.

    It is 1 also where even that does not fit, so that the error is raised where it happens.
    """
    while most > 1:
        try:
            attempt(most)
            break
        except torch.OutOfMemoryError:
            most //= 2
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
        plan.source_of(settings).load(settings.dtype),
        layers=settings.layers,
        steps=settings.steps,
        guidance=settings.guidance,
        similarity=plan.similarity_of(settings),
        compiled=settings.compiled,
        **plan.family_settings(settings),
    )


def check_truth(widths: Mapping[str, int], settings: ModelSettings) -> None:
    """Raises ModelError where neurons of ``model.truth`` are none of a model with value layers of these widths."""
    for prompt, neurons in plan.truth_of(settings).items():
        try:
            check_neurons(neurons, widths)
        except ModelError as error:
            msg = f"model.truth={settings.truth}: of '{prompt}' there are other neurons than the model has"
            raise ModelError(f"{msg} ({error}); give the file that came with its weights") from error


def real_store(metric: SetMetric, cell: Cell) -> Store:
    """Where the features of a metric's real pictures are, for all runs under one root."""
    return Store(Path(cell.config.settings.root) / "real_images" / digest(metric.fingerprint(), 8))


def _real_features(metric: SetMetric, cell: Cell) -> Tensor:
    store = real_store(metric, cell)
    records = store.records(schema.ChunkRecord)
    chunks = Chunk.from_files(metric.files)
    return read_features([store.folder / str(records[chunk.id].file) for chunk in chunks], "real")


def score_sets(
    cell: Cell, metrics: Mapping[str, BenchMetric], known: dict[str, tuple[SetMetric, Tensor]]
) -> dict[str, dict[str, float | None]]:
    """Scores of whole sets of images, by group and metric; groups of the same prompts are scored once.

    A score is None where it is not finite. Prompts all of whose images failed are left out.

    Args:
        cell: The cell, all of whose images are scored.
        metrics: Its metrics by name.
        known: Metrics of whole sets from cells before, with the features of their real pictures; it is added to.
    """
    wholes: dict[str, tuple[SetMetric, Tensor]] = {}
    for name, metric in metrics.items():
        if isinstance(metric, SetMetric):
            key = digest([cell.config.settings.metrics[name], metric.fingerprint()])
            if key not in known:
                known[key] = metric, _real_features(metric, cell)
            wholes[name] = known[key]
    if not wholes:
        return {}
    records = cell.store.records(schema.ScoreRecord).values()
    files = {record.prompt: cell.store.folder / record.file for record in records if record.file}

    @cache
    def scores(members: tuple[str, ...]) -> dict[str, float | None]:
        found = {}
        for name, (metric, real) in wholes.items():
            images = read_features([files[i] for i in members], digest(metric.space.fingerprint()))
            for value in metric.score(images=images, real=real).tolist():
                found[name] = value if math.isfinite(value) else None
        return found

    def having(group: str) -> tuple[str, ...]:
        return tuple(p.id for p in cell.prompts if group in ("all", p.group) and p.id in files)

    return {group: scores(members) for group in GROUPS if (members := having(group))}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides Lightning's advice on workers and its device listing; errors and other warnings pass."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in (
                "does not have many workers", "Total length of .* across ranks is zero", "predict returned None",
                "LeafSpec.* is deprecated", "torch.jit.script.* is deprecated", "`srun` command is available",
                "in eval mode at the start of training", "Checkpoint directory .* exists",
            ):  # fmt: skip
                warnings.filterwarnings("ignore", message=f".*{message}")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
