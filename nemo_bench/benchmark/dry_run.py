"""What a run needs and what it will cost, found out without loading or writing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from nemo_bench.benchmark.plan import (
    THRESHOLD,
    Cell,
    check_general,
    check_one_run,
    is_measured,
    is_pooled,
    plan,
    read_files,
    source_of,
    to_measure,
    with_sources,
)
from nemo_bench.benchmark.run import outlook
from nemo_bench.benchmark.runner import Runner
from nemo_bench.config import CellConfig, PromptSettings, build, resolve
from nemo_bench.diffusion import Source
from nemo_bench.errors import NemoBenchError, counted
from nemo_bench.localization import read_statistics
from nemo_bench.metrics import BenchMetric
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import read_object
from nemo_bench.records.store import read_records, read_starts

State = Literal["there", "fetched", "partly", "missing"]
FIRST = 3
"""Prompts of a file that are shown, so that one sees whether it is the right one, read as it was meant."""


@dataclass(frozen=True)
class Need:
    """Something that a run takes from outside.

    Attributes:
        kind: ``"weights"``, ``"metric"``, ``"statistics"``, ``"prompts"``, ``"prompts of edits"``, ``"general
            prompts"``, ``"method's file"``, ``"method"`` or ``"training images"``.
        what: File, folder, hub id, or name of a metric.
        state: ``"there"``; ``"fetched"``, by its library at the first use; ``"partly"``, the run goes on without the
            rest; ``"missing"``, the run would stop.
        note: What it holds, or what is wrong and what to do.
    """

    kind: str
    what: str
    state: State
    note: str = ""


@dataclass
class CostModel:
    """What finished records of a model tell of its cost.

    Attributes:
        passes: UNet passes of one sample that a prompt took to localize and an image to generate, by stage and class of
            the method.
        seconds: Seconds a pass took, by stage.
        scoring: Seconds a prompt took to be scored.
        records: How many records there are.
        devices: What they were computed on.
    """

    passes: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    scoring: list[float] = field(default_factory=list)
    records: int = 0
    devices: set[str] = field(default_factory=set)

    @classmethod
    def from_records(cls, root: Path, weights: str) -> CostModel:
        """Reads the records of all cells under a root that used these weights; damaged folders are passed over."""
        pace = cls()
        for path in sorted(root.glob("*/*/spec.json")):
            try:
                spec = read_object(path, "digests", "settings")
                if spec["digests"].get("model") == weights:
                    pace._take(path.parent, spec["settings"]["method"]["_target_"])
            except (NemoBenchError, KeyError, TypeError, AttributeError, ZeroDivisionError):
                continue
        return pace

    def _take(self, cell: Path, method: str) -> None:
        found = {stage: read_records(cell, stage).values() for stage in ("localize", "generate", "score")}
        for stage in ("localize", "generate"):
            costs = [record["cost"] for record in found[stage] if "failed" not in record]
            self.seconds.setdefault(stage, []).extend(cost["seconds"] / cost["row_passes"] for cost in costs)
            own = [cost["row_passes"] for cost in costs]
            self.passes.setdefault((stage, method), []).extend(own)
        self.scoring.extend(r["cost"]["seconds"] for r in found["score"] if r["seed"] is None)
        if any(found.values()):
            self.records += sum(map(len, found.values()))
            self.devices.add(read_starts(cell)[-1]["device"])

    def per_pass(self, stage: str) -> float | None:
        """Mean seconds a pass in a stage, or else over all stages; None without records."""
        values = self.seconds.get(stage) or [value for each in self.seconds.values() for value in each]
        return fmean(values) if values else None

    def estimate(self, passes: Mapping[str, int], scored: int) -> float | None:
        """Seconds that passes by stage and the scoring of prompts take; None without records."""
        each = {stage: self.per_pass("localize" if stage == "calibrate" else stage) for stage in passes}
        if any(value is None for value in each.values()):
            return None
        scoring = fmean(self.scoring) * scored if self.scoring else 0.0
        return sum(count * (each[stage] or 0.0) for stage, count in passes.items()) + scoring

    def describe(self) -> dict[str, Any]:
        """What an estimate is drawn from."""
        return {"records": self.records, "devices": sorted(self.devices), "seconds_per_pass": self.per_pass("generate")}


def forecast(configs: Sequence[CellConfig]) -> dict[str, Any]:
    """What a run would need, do and cost.

    Args:
        configs: What was asked for.

    Returns:
        ``needs``: the fields of each :class:`Need`. ``families``: by model and method, which settings were chosen for
        the model's family, the fields of :class:`nemo_bench.config.FamilySettings` and the same as ``text``.
        ``cells``: those whose files can be read, each as in
        :func:`nemo_bench.benchmark.run.outlook`, with ``passes``, UNet passes of one sample to ``calibrate`` (with the
        first cell that waits for it), ``localize`` and ``generate``; ``at_least``, whether those are the fewest
        possible, since what a method takes depends on the prompt and no record of the model tells what it is; and
        ``seconds``, None before the first records of the model. ``uncounted``: how many other cells there are.
        ``prompts``: by file how many prompts are ``taken``, ``of`` how many, and the ``first`` :data:`FIRST` of them.
        ``total``: the same over all cells. ``pace``: by model, number of ``records`` that this is drawn from, their
        ``devices`` and ``seconds_per_pass``.

    Raises:
        NemoBenchError: Settings are wrong; what is merely missing is in ``needs``.
    """
    Runner(configs[0].settings.trainer, progress=False)  # an error where this machine has no such devices
    survey = _Survey()
    countable, cells = survey.plan(configs)
    rows, paces = _costs(cells)
    seconds = [row["seconds"] for row in rows]
    stages = ("calibrate", "localize", "generate")
    families = {}
    for config in configs:
        for found in config.families:
            about = {"model": config.names["model"], "method": config.names["method"], "text": str(found)}
            families[tuple(about.values())] = {**about, **asdict(found)}
    return {
        "needs": [asdict(need) for need in survey.needs.values()],
        "families": list(families.values()),
        "cells": rows,
        "uncounted": len(configs) - len(countable),
        "prompts": survey.first_prompts(configs),
        "total": {
            "passes": {stage: sum(row["passes"][stage] for row in rows) for stage in stages},
            "at_least": any(row["at_least"] for row in rows),
            "seconds": None if None in seconds else sum(seconds),
        },
        "pace": {name: pace.describe() for name, pace in paces.items() if pace.records},
    }


def check_needs(configs: Sequence[CellConfig]) -> None:
    """Makes sure that everything is there that a run needs, before anything loads.

    Raises:
        NemoBenchError: Something is missing, all of it named; or settings are wrong.
    """
    survey = _Survey()
    survey.plan(configs)
    lacking: dict[tuple[str, str], list[str]] = {}
    for need in survey.needs.values():
        if need.state == "missing":
            lacking.setdefault((need.kind, need.note), []).append(need.what)
    lines = [f"{kind} {', '.join(whats)}: {note}" for (kind, note), whats in lacking.items()]
    if metrics := [what.split()[0] for (kind, _), whats in lacking.items() if kind == "metric" for what in whats]:
        lines.append(" ".join(["without these metrics:", *(f"'~metrics.{name}'" for name in metrics)]))
    if lines:
        raise NemoBenchError("\n  ".join(["what the run needs is missing, nothing was started", *lines]))


class _Survey:
    """What some cells need, each thing looked at once."""

    def __init__(self) -> None:
        self.needs: dict[tuple[str, str], Need] = {}
        self.unweighed: dict[Source, str] = {}
        self._prompts: dict[str, list[Prompt]] = {}

    def plan(self, configs: Sequence[CellConfig]) -> tuple[list[CellConfig], list[Cell]]:
        """Notes what some cells need, and makes those that can be made.

        Returns:
            The configs whose files can be read, without metrics that lack something, and the cells of these.

        Raises:
            NemoBenchError: Settings are wrong.
        """
        check_one_run(configs)
        countable = [kept for config in configs if (kept := self.take(config))]
        try:
            return countable, plan(countable, self.unweighed) if countable else []
        except NemoBenchError:
            # One by one, so that all that do not fit are named; what remains is wrong with all of them together.
            countable = [config for config in countable if self._fits(config)]
            return countable, plan(countable, self.unweighed) if countable else []

    def _fits(self, config: CellConfig) -> bool:
        try:
            plan([config], self.unweighed)
        except NemoBenchError as error:
            what = f"{config.names['method']} on {config.names['model']}, {config.names['prompts']}"
            self.needs["method", what] = Need("method", what, "missing", str(error))
            return False
        return True

    def take(self, config: CellConfig) -> CellConfig | None:
        """Notes what a cell needs.

        Returns:
            The cell without metrics that lack something, so that it can be counted; None where it can't be.
        """
        settings = config.settings
        model, prompts = settings.model, settings.prompts
        source, method = source_of(model), build(settings.method, "method")
        what = f"{source.path} with {source.lora.path}" if source.lora else source.path
        if not self._there("weights", what, lambda: _weights(source, what)):
            self.unweighed[source] = "missing"
        metrics = {}
        for name, node in settings.metrics.items():
            metric = build(node, f"metrics.{name}")
            if self._there("metric", what := f"{name} ({metric.title})", partial(_metric, metric, what)):
                metrics[name] = node
        found = [self._there("prompts", file, partial(self._listed, file, prompts)) for file in prompts.files]
        if all(found):
            own = [prompt for file in prompts.files for prompt in self._prompts[file][: prompts.limit]]
            self._note_training_images(own, ", ".join(prompts.files))
            if file := settings.method.get("file"):
                found.append(self._there("method's file", file, lambda: method.fingerprint(own)))
        if model.statistics:
            path = Path(resolve(model.statistics))
            found.append(self._there("statistics", str(path), lambda: read_statistics(path)))
        unlinked = replace(prompts, references=None)
        for file in prompts.shared_from if is_pooled(method) else ():
            found.append(self._there("prompts of edits", file, partial(self._listed, file, prompts)))
        if to_measure(method, model):
            general = prompts.calibration
            what = general or f"for method={config.names['method']}"
            found.append(self._there("general prompts", what, partial(self._general, config, unlinked)))
        return replace(config, settings=replace(settings, metrics=metrics)) if all(found) else None

    def first_prompts(self, configs: Sequence[CellConfig]) -> dict[str, dict[str, Any]]:
        """The beginning of every file of prompts that can be read, and how many of its prompts are taken."""
        found = {}
        for settings in (config.settings.prompts for config in configs):
            for file in (file for file in settings.files if file in self._prompts):
                own = self._prompts[file][: settings.limit]
                first = [{"id": prompt.id, "text": prompt.text} for prompt in own[:FIRST]]
                found[file] = {"taken": len(own), "of": len(self._prompts[file]), "first": first}
        return found

    def _there(self, kind: str, what: str, look: Callable[[], object]) -> bool:
        key = (kind, what)
        if key not in self.needs:
            try:
                answer = look()
                self.needs[key] = answer if isinstance(answer, Need) else Need(kind, what, "there", _told(answer))
            except NemoBenchError as error:
                self.needs[key] = Need(kind, what, "missing", str(error))
        return self.needs[key].state != "missing"

    def _general(self, config: CellConfig, settings: PromptSettings) -> str:
        if not settings.calibration:
            check_general(config.names["method"], [])
        told = counted(len(_read(str(settings.calibration), settings)), "prompt")
        if settings.calibration in settings.files:
            told += ", which are benchmarked too: give prompts.calibration a list of its own for results"
        return told

    def _listed(self, file: str, settings: PromptSettings) -> str:
        self._prompts[file] = _read(file, settings)
        return counted(len(self._prompts[file]), "prompt")

    def _note_training_images(self, prompts: Sequence[Prompt], files: str) -> None:
        if damaged := list(dict.fromkeys(file for prompt in prompts for file in prompt.damaged_references)):
            note = f"{len(damaged)} can't be decoded, such as {damaged[0]}, and are left out; replace them"
            self.needs["damaged training images", files] = Need("training images", files, "partly", note)
        memorized = [prompt for prompt in prompts if prompt.kind]
        if without := sum(not prompt.references for prompt in memorized):
            note = (
                f"{without} of {len(memorized)} memorized prompts have none; measures against training images leave "
                "them out, or have no value at all. `nemo-bench references` fetches those that the list has links to"
            )
            self.needs["training images", files] = Need("training images", files, "partly", note)


def _read(file: str, settings: PromptSettings) -> list[Prompt]:
    """The prompts of a file, or an error that says where to get it."""
    try:
        return read_files([file], None, settings.references, settings.memorized)
    except NemoBenchError as error:
        hint = f" {settings.obtain}" if settings.obtain else ""
        raise type(error)(f"{error}{hint}") from error


def _told(answer: object) -> str:
    return answer if isinstance(answer, str) else ""


def _weights(source: Source, what: str) -> Need:
    source.check()
    if source.is_downloaded:
        return Need("weights", what, "there")
    return Need("weights", what, "fetched", "some gigabytes, from the hub at the first use")


def _metric(metric: BenchMetric, what: str) -> Need:
    metric.check()
    if metric.space.is_fetched:
        return Need("metric", what, "there")
    return Need("metric", what, "fetched", "its weights, from the hub before the first image")


def _costs(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], dict[str, CostModel]]:
    paces: dict[str, CostModel] = {}
    calibrated: set[Path] = set()
    rows = []
    for row, cell in zip(outlook(cells), with_sources(cells), strict=True):
        settings, weights = cell.config.settings, cell.spec["digests"]["model"]
        if weights not in paces:
            paces[weights] = CostModel.from_records(Path(settings.root), weights)
        pace, open_, seeds = paces[weights], row["pending"], settings.localize_seeds
        searches, kind = cell.method.needs_calibration, settings.method["_target_"]
        # What localizing measures in the end, and the gate of a search.
        each = seeds * (2 if searches else 1)
        if localized := pace.passes.get(("localize", kind)):
            each = max(each, round(fmean(localized)))
        passes = {"calibrate": 0, "localize": open_["localize"] * each, "generate": 0}
        if open_["localize"] and searches and cell.calibration.folder not in calibrated:
            calibrated.add(cell.calibration.folder)
            passes["calibrate"] = _calibrating(cell)
        per_image = settings.model.steps * (2 if settings.model.guidance > 1 else 1)
        generated = pace.passes.get(("generate", kind)) if cell.method.makes_passes else None
        passes["generate"] = open_.get("generate", 0) * max(per_image, round(fmean(generated or [0])))
        unknown = {
            "localize": (searches or cell.method.makes_passes) and not localized,
            "generate": cell.method.makes_passes and not generated,
        }
        at_least = any(unknown[stage] and open_.get(stage, 0) > 0 for stage in unknown)
        seconds = pace.estimate(passes, open_.get("score", 0))
        rows.append({**row, "passes": passes, "at_least": at_least, "seconds": seconds})
    return rows, {cell.spec["model"]: paces[cell.spec["digests"]["model"]] for cell in cells}


def _calibrating(cell: Cell) -> int:
    """UNet passes until the threshold is known; activation statistics take none."""
    if THRESHOLD not in cell.measured or is_measured(cell.calibration.folder / THRESHOLD):
        return 0
    done = len(cell.calibration.records("calibrate"))
    guided = 2 if cell.method.protocol.calibration_guidance is not None else 1
    return (len(cell.calibration_prompts) - done) * cell.config.settings.localize_seeds * guided
