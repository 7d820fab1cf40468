"""Content of the log of a finished cell, as plain data; the same for every logger."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from PIL import Image

from nemo_bench.errors import StoreError
from nemo_bench.records.data import Kind, Prompt
from nemo_bench.records.io import digest, read_file, read_whole, write_json
from nemo_bench.records.results import CellResults, Results, load_cell, short_layers
from nemo_bench.records.schema import (
    ImageRecord,
    LastStep,
    LocalizationRecord,
    MemorizationRecord,
    Record,
    Run,
    ScoreRecord,
    Spec,
    Start,
    Summary,
)
from nemo_bench.records.store import read_records, read_run, read_spec, read_starts, thumbnail

PICTURES = ("training image", "unmitigated", "mitigated", "noise differences")
"""Pictures that show a prompt."""
ALIGNMENT_LOSS = 0.05
"""Alignment that a mitigation may cost, in the trials of a sweep."""
_BOX = (512, 256)
_STAGES: tuple[type[Record], ...] = (LocalizationRecord, MemorizationRecord, ImageRecord, ScoreRecord)


@dataclass(frozen=True)
class BegunCell:
    """A cell that was begun, as loggers show it before there are results."""

    folder: Path  #: Its folder.
    run: Run  #: The run it is part of.
    spec: Spec  #: What it is.
    start: Start  #: Its last start.

    @classmethod
    def read(cls, folder: Path) -> BegunCell:
        """Reads a cell from its folder; StoreError where a file does not hold what it should."""
        return cls(folder, read_run(folder.parent), read_spec(folder), read_starts(folder)[-1])

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The spec, the versions of all packages, and the last start with its command and all settings."""
        spec, start = (part.model_dump(mode="json", exclude_none=True) for part in (self.spec, self.start))
        return {**spec, "versions": start.pop("versions"), "start": start}


@dataclass(frozen=True)
class LoggedCell:
    """A finished cell as loggers show it; ``unmitigated`` is the cell of the same images without mitigation."""

    results: CellResults
    run: Run
    unmitigated: CellResults | None

    @classmethod
    def read(cls, folder: Path) -> LoggedCell:
        """Reads a cell from its folder, and the one without mitigation; StoreError where the former is not finished."""
        run, results = read_run(folder.parent), load_cell(folder)
        unmitigated = None
        if (name := results.summary.unmitigated) in run.cells:
            with suppress(StoreError):
                unmitigated = load_cell(folder.parent / str(name))
        return cls(results, run, unmitigated)

    @property
    def folder(self) -> Path:
        """Folder of the cell."""
        return self.results.folder

    @property
    def begun(self) -> BegunCell:
        """What was known of it when it began."""
        return BegunCell(self.folder, self.run, self.results.spec, self.results.starts[-1])

    @property
    def row(self) -> dict[str, float]:
        """The row of the leaderboard, such as ``VM/ssim/mean``, ``presets/nemo/VM/ssim/value`` or ``cost/...``."""
        summary = self.results.summary.model_dump()
        presets = {name: preset["rows"] for name, preset in summary["presets"].items()}
        others = {key: summary[key] for key in ("detection", "localization", "counts", "cost")}
        return dict(_numbers({**summary["aggregates"], "bounded": self.bounded, "presets": presets, **others}))

    @property
    def bounded(self) -> dict[str, dict[str, float]]:
        """Memorization under a bound on alignment, for sweeps to minimize: ``mean`` by metric.

        It is the mean over all memorized prompts of every kind. Where alignment over all prompts is more than
        :data:`ALIGNMENT_LOSS` below that without mitigation, 1 and the excess are added, so that no such trial is
        better than one within the bound. Without a cell without mitigation there is no bound.
        """
        cell, metrics = self.results, self.results.summary.metrics
        memorized = get_args(Kind)
        aligned = self._first("alignment")
        excess = 0.0
        if aligned and self.unmitigated:
            own, before = (fmean(c.prompt_means(aligned, ["all"]).values()) for c in (cell, self.unmitigated))
            excess = before - own - ALIGNMENT_LOSS
        penalty = 1 + excess if excess > 0 else 0.0
        first = self._first("memorization")
        keys = [key for key, info in metrics.items() if key == first or info.role == "memorization_score"]
        means = {key: cell.prompt_means(key, memorized) for key in keys}
        return {key: {"mean": fmean(values.values()) + penalty} for key, values in means.items() if values}

    def _first(self, family: str) -> str | None:
        """The first metric of a family."""
        return next((key for key, info in self.results.summary.metrics.items() if info.family == family), None)

    @property
    def means(self) -> dict[str, float]:
        """The charted part of the row: ``<group>/<metric>/mean``."""
        return {key: value for key, value in self.row.items() if key.endswith("/mean")}

    @cached_property
    def digest(self) -> str:
        """Hash of everything logged that is a result; time and machine are none."""
        records = {
            kind.stage: sorted(
                json.dumps(record.model_dump(mode="json", exclude={"cost"}, exclude_none=True), sort_keys=True)
                for record in read_records(self.folder, kind).values()
            )
            for kind in _STAGES
        }
        summary = self.results.summary.model_dump(mode="json", exclude={"cost"})
        return digest([records, summary, self.unmitigated.name if self.unmitigated else None], 12)

    @property
    def tradeoff(self) -> tuple[str, str] | None:
        """Metrics of memorization and alignment: the first of either family; None without one of them."""
        memorization, alignment = self._first("memorization"), self._first("alignment")
        return (memorization, alignment) if memorization and alignment else None

    def value(self, prompt: Prompt, metric: str) -> float | None:
        """Mean of a metric over the images of a prompt, None where it has no meaning."""
        values = self.results.outcomes[prompt.id].values(metric)
        return fmean(values) if values else None

    def pictures(self, prompt: Prompt) -> dict[str, Image.Image]:
        """Small pictures of a prompt by :data:`PICTURES`, of its first reference and first seed where there are any."""
        outcome = self.results.outcomes[prompt.id]
        before = self.unmitigated.outcomes.get(prompt.id) if self.unmitigated else None
        files = (
            prompt.references[0] if prompt.references else None,
            next(iter(before.images.values()), None) if before else None,
            next(iter(outcome.images.values()), None),
            outcome.noise,
        )
        made = {name: thumbnail(file, _BOX) for name, file in zip(PICTURES, files, strict=True) if file}
        return {name: picture[0] for name, picture in made.items() if picture}

    def neurons_by_layer(self) -> list[list[Any]]:
        """Short name, width and mean number of neurons a prompt of every value layer, in network order."""
        names, outcomes = short_layers(self.results.layers), self.results.outcomes.values()
        means = {layer: fmean(len(o.neurons.get(layer, ())) for o in outcomes) for layer in self.results.layers}
        return [[names[layer], width, means[layer]] for layer, width in self.results.layers.items()]


def detection_row(folder: Path) -> dict[str, float]:
    """The numbers of a detector that is finished, such as ``detection/magnitude/auc``, ``counts/...`` or ``cost/...``.

    Raises:
        StoreError: A file does not hold what it should.
    """
    summary = read_file(folder / "metrics.json", Summary).model_dump()
    return dict(_numbers({key: summary[key] for key in ("detection", "counts", "cost")}))


def logged_cells(results: Results) -> list[LoggedCell]:
    """The finished cells of a run."""
    by_name = {cell.name: cell for cell in results.cells}
    return [LoggedCell(cell, results.run, by_name.get(cell.summary.unmitigated or "")) for cell in results.cells]


def next_step(folder: Path, least: int = 0) -> int:
    """The step of what is logged of a cell next: never less than ``least``, and more than any step before.

    It is kept beside the records, so that the axis goes on wherever the cell does.
    """
    file = folder / "step.json"
    known = read_whole(file, LastStep)
    last = known.step if known else -1
    step = max(last + 1, least)
    write_json(file, LastStep(step=step))
    return step


def _numbers(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", value
