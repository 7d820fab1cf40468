"""What a run would need, do and cost: ``nemo-bench run --dry-run``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_bench.benchmark.pending import pending_work
from nemo_bench.benchmark.plan import THRESHOLD, Cell, Planner, is_measured, metrics_of
from nemo_bench.benchmark.runner import Runner
from nemo_bench.benchmark.stages.fit import COST, FITTED
from nemo_bench.config import CellConfig, ModelSettings
from nemo_bench.errors import NemoBenchError
from nemo_bench.methods import FittedMethod, LocalizedNeurons
from nemo_bench.records import schema
from nemo_bench.records.io import digest, read_file
from nemo_bench.records.store import read_records, read_starts

PASSES = ("calibrate", "localize", "fit", "memorization", "generate")
"""Stages that make UNet passes."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass
class CostModel:
    """What finished records of a model tell of its cost."""

    #: UNet passes of one sample that a prompt or an image took, by stage and class of the method, or of its localizer.
    passes: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  #: Seconds a pass took, by stage.
    scoring: list[float] = field(default_factory=list)  #: Seconds a prompt took to be scored.
    widths: dict[str, schema.Layers] = field(default_factory=dict)  #: Neurons by layer, by ``model.layers``.
    flops: int | None = None  #: Floating point operations of a pass.
    records: int = 0
    devices: set[str] = field(default_factory=set)

    @classmethod
    def from_records(cls, root: Path, network: Mapping[str, Any]) -> CostModel:
        """Reads the records of all cells under a root that used a network; damaged folders are passed over.

        ``network`` is what :func:`network_of` gives.
        """
        model = cls()
        for path in sorted(root.glob("*/*/spec.json")):
            try:
                spec = read_file(path, schema.Spec)
                if spec.task == "benchmark" and network_of(spec) == network:
                    layers = path.with_name("layers.json")
                    if layers.is_file():
                        model.widths[str(spec.settings["model"]["layers"])] = read_file(layers, schema.Layers)
                    size = path.with_name("network.json")
                    if size.is_file():
                        model.flops = read_file(size, schema.Network).flops_per_pass
                    fit = path.parent / str(spec.fitted) / COST
                    if fit.is_file():
                        model._add_passes("fit", None, read_file(fit, schema.Cost))
                    model._add(path.parent, _kind(spec.settings["method"]))
            except (NemoBenchError, KeyError, TypeError):
                continue
        return model

    def _add(self, cell: Path, method: str) -> None:
        count = 0
        for kind in (schema.LocalizationRecord, schema.MemorizationRecord, schema.ImageRecord):
            records: Mapping[str, schema.Record] = read_records(cell, kind)
            count += len(records)
            for cost in (record.cost for record in records.values() if record.cost and not record.failed):
                self._add_passes(kind.stage, method, cost)
        scores = read_records(cell, schema.ScoreRecord).values()
        self.scoring.extend(r.cost.seconds for r in scores if r.seed is None and r.cost and r.cost.seconds)
        if count or scores:
            self.records += count + len(scores)
            self.devices.add(read_starts(cell)[-1].device)

    def _add_passes(self, stage: str, method: str | None, cost: schema.Cost) -> None:
        if cost.row_passes:
            if method is not None:
                self.passes.setdefault((stage, method), []).append(cost.row_passes)
            self.seconds.setdefault(stage, []).append((cost.seconds or 0.0) / cost.row_passes)

    def per_pass(self, stage: str) -> float | None:
        """Mean seconds a pass in a stage, or else over all stages; None without records."""
        values = self.seconds.get(stage) or [value for each in self.seconds.values() for value in each]
        return fmean(values) if values else None

    def estimate(self, passes: Mapping[str, int], scored: int) -> float | None:
        """Seconds that passes by stage and the scoring of prompts take; None without records."""
        each = {stage: self.per_pass("localize" if stage == "calibrate" else stage) for stage in passes}
        if None in each.values():
            return None
        scoring = fmean(self.scoring) * scored if self.scoring else 0.0
        return sum(count * (each[stage] or 0.0) for stage, count in passes.items()) + scoring


def network_of(spec: schema.Spec) -> dict[str, Any]:
    """What a pass of a cell costs by: its weights, and the size of images and number of text tokens where given."""
    settings = spec.settings["model"]
    return {"weights": spec.digests["model"], **{name: settings.get(name) for name in ("size", "tokens")}}


def forecast(configs: Sequence[CellConfig]) -> dict[str, Any]:
    """What a run would need, do and cost.

    Returns:
        ``needs``: the fields of each :class:`Need`. ``models``: of each, whether or not its files are there,
        ``source``, ``licence``, whether it is ``gated``, ``weights`` of all networks in billions, ``download_gb``,
        ``memory_gb`` of the weights in ``model.dtype``, ``teraflops_per_pass`` and ``teraflops_per_image`` without any
        method; None for what is not known. ``families``: by model and method, which settings were chosen for the
        model's family, the fields of :class:`nemo_bench.config.families.FamilySettings` and the same as ``text``.
        ``cells``: those whose files can be read, and before them sources that were not asked for, each with ``pending``
        records by stage; whether it is ``calibrated`` (None where it need not be); ``prompts_without_reference``;
        ``passes``, UNet passes of one sample by :data:`PASSES` (those to calibrate and to fit weights with the first
        cell that waits for it); ``teraflops`` of these, of the network alone; ``at_least``, whether those are the
        fewest possible, since a method's passes depend on the prompt and no record of the model tells them;
        ``comparisons`` at most, by metric, of images with the training images of all prompts, which grow with the
        square of the number of prompts; and ``seconds``, None before the first records of the model.
        ``uncounted``: number of other cells. ``prompts``: see
        :meth:`nemo_bench.benchmark.plan.Planner.first_prompts`. ``total``: the same over all cells. ``speed``: by
        model, number of ``records`` that this is drawn from, their ``devices`` and ``seconds_per_pass``.

    Raises:
        NemoBenchError: Settings are wrong; what is merely missing is in ``needs``.
    """
    Runner(configs[0].settings.trainer, progress=False)  # an error where this machine has no such devices
    planner = Planner()
    cells = planner.plan(configs)
    models: dict[str, CostModel] = {}
    begun: set[Path] = set()
    rows = []
    flops = {}
    for cell, pending in pending_work(cells):
        network = network_of(cell.spec)
        costs = models.get(digest(network)) or CostModel.from_records(Path(cell.config.settings.root), network)
        models[digest(network)] = costs
        own = costs.flops
        each = cell.config.settings.model.published.teraflops if own is None else own / 1e12
        flops[repr(cell.config.settings.model)] = each
        row = _cost(cell, pending, costs, begun)
        rows.append({**row, "teraflops": None if each is None else each * sum(row["passes"].values())})
    seconds = [row["seconds"] for row in rows]
    teraflops = [row["teraflops"] for row in rows]
    comparisons: Counter[str] = Counter()
    for row in rows:
        comparisons.update(row["comparisons"])
    families = {}
    for config in configs:
        for found in config.families:
            about = {"model": config.names["model"], "method": config.names["method"], "text": str(found)}
            families[tuple(about.values())] = {**about, **asdict(found)}
    by_name = {}
    for cell in cells:
        network = network_of(cell.spec)
        given = [f"{name} {network[name]}" for name in ("size", "tokens") if network[name] is not None]
        by_name[", ".join([cell.spec.model, *given])] = models[digest(network)]
    return {
        "needs": [asdict(need) for need in planner.needs.values()],
        "models": _models(configs, flops),
        "families": list(families.values()),
        "cells": rows,
        "uncounted": len(configs) - len(planner.counted),
        "prompts": planner.first_prompts(configs),
        "total": {
            "passes": {stage: sum(row["passes"][stage] for row in rows) for stage in PASSES},
            "at_least": any(row["at_least"] for row in rows),
            "teraflops": None if None in teraflops else sum(teraflops),
            "comparisons": dict(comparisons),
            "seconds": None if None in seconds else sum(seconds),
        },
        "speed": {
            name: {
                "records": model.records,
                "devices": sorted(model.devices),
                "seconds_per_pass": model.per_pass("generate"),
            }
            for name, model in by_name.items()
            if model.records
        },
    }


def _models(configs: Sequence[CellConfig], flops: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """What is known of each model; ``flops`` are teraflops of a pass by settings, where finished records have them."""
    rows = {}
    for config in configs:
        model = config.settings.model
        published = model.published
        each = flops.get(repr(model), published.teraflops)
        passes = passes_of_image(model)
        rows[repr(model)] = {
            "model": config.names["model"],
            "source": model.source,
            "licence": published.licence or None,
            "gated": published.gated if published.licence else None,
            "weights": published.weights,
            "download_gb": published.download,
            "memory_gb": None if published.weights is None else published.weights * _BYTES[model.dtype],
            "passes_per_image": passes,
            "teraflops_per_pass": each,
            "teraflops_per_image": None if each is None else each * passes,
        }
    return list(rows.values())


def passes_of_image(model: ModelSettings) -> int:
    """UNet passes of an image without any mitigation."""
    return model.steps * (2 if model.guidance > 1 else 1)


def _cost(cell: Cell, pending: dict[str, int], model: CostModel, begun: set[Path]) -> dict[str, Any]:
    """The row of a cell; ``begun`` are folders of calibrations and fits that a cell before it makes."""
    settings = cell.config.settings
    method = cell.method
    assert method is not None
    is_search = method.needs_calibration
    localizing = settings.localize_seeds if is_search else 0
    if isinstance(method, LocalizedNeurons):
        is_search = method.localizer.makes_passes
        widths = model.widths.get(str(settings.model.layers), {})
        localizing = max(localizing * is_search, method.localizer.least_passes(widths))
        memorized = sum(bool(prompt.kind) for prompt in cell.prompts)  # the others are not searched
        pending = {**pending, "localize": min(pending.get("localize", 0), memorized or len(cell.prompts))}
    # Before the first records: the gate of a search, what the memorization score takes, plain sampling.
    least = {
        "localize": localizing,
        "memorization": settings.localize_seeds + settings.loss_draws * bool(cell.loss_pictures),
        "generate": passes_of_image(settings.model),
    }
    passes = {"calibrate": 0, "fit": 0}
    at_least = False
    for stage, fewest in least.items():
        varies = method.makes_passes or (stage == "localize" and is_search)
        known = model.passes.get((stage, _kind(settings.method))) if varies else None
        count = pending.get(stage, 0)
        passes[stage] = count * max(fewest, round(fmean(known)) if known else 0)
        at_least |= varies and not known and count > 0
    waits = method.needs_calibration and pending.get("localize")  # else its source does, in a row of its own
    if waits and cell.calibration and cell.calibration.folder not in begun:
        begun.add(cell.calibration.folder)
        passes["calibrate"] = _calibrating(cell)
    if isinstance(method, FittedMethod) and cell.fitted and pending.get("generate"):
        folder = cell.fitted.folder
        if folder not in begun and not (folder / FITTED).is_file():
            begun.add(folder)
            passes["fit"] = method.least_passes(cell.originals, passes_of_image(settings.model))
            at_least |= not passes["fit"]
    return {
        "cell": cell.id,
        "pending": pending,
        "calibrated": cell.is_calibrated if method.needs_calibration else None,
        "prompts_without_reference": sum(bool(p.kind) and not p.references for p in cell.prompts),
        "passes": passes,
        "at_least": at_least,
        "comparisons": _comparisons(cell, pending.get("score", 0)),
        "seconds": model.estimate(passes, pending.get("score", 0)),
    }


def _kind(method: Mapping[str, Any]) -> str:
    """The class that decides what localizing takes."""
    return str(method.get("localizer", method)["_target_"])


def _comparisons(cell: Cell, prompts: int) -> dict[str, int]:
    """Comparisons with the training images of all prompts, by the metric that makes them, to score some prompts."""
    pool = {path for prompt in cell.prompts for path in prompt.references}
    count = prompts * cell.config.settings.seeds * len(pool)
    return {name: count for name, metric in metrics_of(cell).items() if count and "pool" in metric.needs}


def _calibrating(cell: Cell) -> int:
    """UNet passes until the threshold is known; activation statistics take none."""
    if THRESHOLD not in cell.measured or is_measured(cell.calibration_file(THRESHOLD)):
        return 0
    assert cell.calibration is not None
    assert cell.method is not None
    done = len(cell.calibration.records(schema.CalibrationRecord))
    guided = 2 if cell.method.noise_protocol.calibration_guidance is not None else 1
    return (len(cell.calibration_prompts) - done) * cell.config.settings.localize_seeds * guided
