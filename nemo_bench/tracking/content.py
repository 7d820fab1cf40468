"""What is told of a finished cell, as plain data; the same for every logger."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest, read_json
from nemo_bench.records.store import read_records, read_run, thumbnail
from nemo_bench.report import load_results
from nemo_bench.report.data import Cell, short_layers

PICTURES = ("training image", "unmitigated", "mitigated", "noise differences")
"""Pictures that show a prompt."""
MEMORIZED = ("VM", "TM", "memorized")
"""Groups of memorized prompts."""
ALIGNMENT_LOSS = 0.05
"""So much alignment may a mitigation cost, in the trials of a sweep."""
_BOX = (512, 256)


@dataclass(frozen=True)
class Entry:
    """A finished cell with what it takes to tell of it.

    Attributes:
        cell: The cell as the report reads it.
        folder: Its folder.
        group: Name of the run.
        token: What tells the run from others of that name.
        metrics: Content of ``metrics.json``.
        unmitigated: The cell of the same images without mitigation, or None.
    """

    cell: Cell
    folder: Path
    group: str
    token: str
    metrics: Mapping[str, Any]
    unmitigated: Cell | None

    @property
    def config(self) -> dict[str, Any]:
        """The spec, the versions of all packages, and the last start with its command and all settings."""
        start = dict(self.cell.starts[-1])
        return {**read_json(self.folder / "spec.json"), "versions": start.pop("versions"), "start": start}

    @property
    def row(self) -> dict[str, float]:
        """The row of the leaderboard, such as ``VM/ssim/mean``, ``presets/nemo/VM/ssim/value`` or ``cost/...``."""
        metrics = self.metrics
        presets = {name: preset["rows"] for name, preset in metrics.get("presets", {}).items()}
        others = {key: metrics.get(key, {}) for key in ("detection", "localization", "counts", "cost")}
        return dict(_numbers({**metrics["aggregates"], "bounded": self.bounded, "presets": presets, **others}))

    @property
    def bounded(self) -> dict[str, dict[str, float]]:
        """Memorization under a bound on alignment, for sweeps to minimize: ``mean`` by metric.

        It is the mean over all memorized prompts, in whatever way they are memorized. Where alignment over all prompts
        is more than :data:`ALIGNMENT_LOSS` below that without mitigation, 1 and what is too much are added, so that no
        such trial is better than one within the bound. Without a cell without mitigation there is no bound.
        """
        cell, infos = self.cell, self.cell.metrics
        aligned = next((key for key, info in infos.items() if info.family == "alignment"), None)
        excess = 0.0
        if aligned and self.unmitigated:
            own, before = (fmean(c.prompt_means(aligned, ["all"]).values()) for c in (cell, self.unmitigated))
            excess = before - own - ALIGNMENT_LOSS
        penalty = 1 + excess if excess > 0 else 0.0
        first = [key for key, info in infos.items() if info.family == "memorization"][:1]
        found = {key: cell.prompt_means(key, MEMORIZED) for key in (*first, "memorization") if key in infos}
        return {key: {"mean": fmean(values.values()) + penalty} for key, values in found.items() if values}

    @property
    def means(self) -> dict[str, float]:
        """The part of the row that charts are drawn of: ``<group>/<metric>/mean``."""
        return {key: value for key, value in self.row.items() if key.endswith("/mean")}

    @property
    def digest(self) -> str:
        """Hash of everything told that is a result; time and machine are none."""
        records = {
            stage: sorted(
                json.dumps({k: v for k, v in record.items() if k != "cost"}, sort_keys=True)
                for record in read_records(self.folder, stage).values()
            )
            for stage in ("localize", "generate", "score")
        }
        metrics = {key: value for key, value in self.metrics.items() if key != "cost"}
        return digest([records, metrics, self.unmitigated.name if self.unmitigated else None], 12)

    @property
    def tradeoff(self) -> tuple[str, str] | None:
        """Metrics that stand for memorization and alignment: the first of each family; None without either."""
        first: dict[str | None, str] = {}
        for key, info in self.metrics["metrics"].items():
            first.setdefault(info.get("family"), key)
        found = first.get("memorization", "ssim"), first.get("alignment", "alignment")
        return found if set(found) <= set(self.metrics["metrics"]) else None

    def value(self, prompt: Prompt, metric: str) -> float | None:
        """Mean of a metric over the images of a prompt, None where it has no meaning."""
        values = self.cell.outcomes[prompt.id].values(metric)
        return fmean(values) if values else None

    def pictures(self, prompt: Prompt) -> dict[str, Image.Image]:
        """Small pictures of a prompt by :data:`PICTURES`: the first reference and the first seed, where there are any.

        Noise differences are a strip over seeds.
        """
        outcome = self.cell.outcomes[prompt.id]
        before = self.unmitigated.outcomes.get(prompt.id) if self.unmitigated else None
        files = (
            prompt.references[0] if prompt.references else None,
            before.images[0].path if before and before.images else None,
            outcome.images[0].path if outcome.images else None,
            outcome.noise,
        )
        found = {name: thumbnail(file, _BOX) for name, file in zip(PICTURES, files, strict=True) if file}
        return {name: picture[0] for name, picture in found.items() if picture}

    def neurons_by_layer(self) -> list[tuple[str, int, float]]:
        """Short name, width and mean number of neurons a prompt of every value layer, in network order."""
        widths, outcomes = read_json(self.folder / "layers.json"), self.cell.outcomes.values()
        names = short_layers(self.cell.layers)
        return [
            (names[layer], widths[layer], fmean(len(outcome.neurons.get(layer, ())) for outcome in outcomes))
            for layer in self.cell.layers
        ]

    @property
    def detector_curves(self) -> dict[str, Sequence[Sequence[float]]]:
        """Points of the ROC curve of every detector that has them written down."""
        return {name: found.curve for name, found in self.cell.detection.items() if found.curve}


def load_entries(folder: Path) -> tuple[list[Entry], Mapping[str, str]]:
    """Reads a run.

    Args:
        folder: ``results/<name>``.

    Returns:
        Its finished cells; by name of every other cell, what is missing there.

    Raises:
        StoreError: The folder holds no run, or no cell of it is finished.
    """
    results = load_results(folder)
    token = read_run(folder).get("token", "")

    by_name = {cell.name: cell for cell in results.cells}
    entries = [
        Entry(
            cell, folder / cell.name, results.name, token, read_json(folder / cell.name / "metrics.json"),
            by_name.get(cell.unmitigated or ""),
        )
        for cell in results.cells
    ]  # fmt: skip
    return entries, results.unfinished


def _numbers(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", value
