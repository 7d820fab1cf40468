"""A finished run as plain data: what lies in a results folder, read once and checked.

Tables, plots and the page are made from :class:`Results` alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_bench.aggregate import GROUPS
from nemo_bench.errors import StoreError
from nemo_bench.store import SCHEMA, read_json, read_records
from nemo_bench.types import Neurons, Prompt

_STAGES = ("localize", "generate", "score")
_ATTENTION = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class MetricInfo:
    """What a metric measures.

    Attributes:
        key: Its name in records.
        title: Its name for people.
        higher_is_better: True, False, or None where neither way is better.
        lower: Smallest possible value, or None.
        upper: Largest possible value, or None.
        unit: Unit, or an empty text.
        citation: Where it comes from.
        description: One sentence.
        family: What it tells something about.
        per: ``image``, ``prompt`` or ``set``.
    """

    key: str
    title: str
    higher_is_better: bool | None
    lower: float | None = None
    upper: float | None = None
    unit: str = ""
    citation: str = ""
    description: str = ""
    family: str = ""
    per: str = "image"

    @property
    def arrow(self) -> str:
        """``↑`` where larger is better, ``↓`` where smaller is better, else nothing."""
        return "" if self.higher_is_better is None else "↑" if self.higher_is_better else "↓"


@dataclass(frozen=True)
class Aggregate:
    """A metric over a group of prompts: mean with its 95% bootstrap interval, median and median absolute deviation."""

    mean: float
    low: float
    high: float
    median: float
    mad: float
    prompts: int
    paired: Mapping[str, float] | None = None


@dataclass(frozen=True)
class GeneratedImage:
    """One image and its scores."""

    seed: int
    path: Path
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one cell did for one prompt.

    Attributes:
        images: By seed.
        scores: Scores of the prompt as a whole.
        neurons: The neurons that were blocked.
        noise: Strip of noise differences, or None.
    """

    images: tuple[GeneratedImage, ...]
    scores: Mapping[str, float]
    neurons: Neurons
    noise: Path | None

    def values(self, metric: str) -> list[float]:
        """The scores of a metric: one an image, or the one of the prompt, or none where it has no meaning."""
        if metric in self.scores:
            return [self.scores[metric]]
        return [image.scores[metric] for image in self.images if metric in image.scores]


@dataclass(frozen=True)
class Cell:
    """One finished cell: a model, a method and a list of prompts.

    Attributes:
        name: Name of its folder.
        label: Shortest name that tells it from the other cells of the run.
        model: Name of the model.
        method: Name of the method.
        title: Name of the method for people.
        prompt_list: Name of the list of prompts.
        settings: Resolved settings, nested.
        digests: Hashes of model and prompts.
        citations: BibTeX by name.
        layers: Value layers in network order.
        starts: Every start of the run: time, command, versions.
        prompts: In the order of the list.
        outcomes: By prompt id.
        metrics: In the order of display.
        aggregates: By group, then by metric.
        cost: Seconds and UNet passes.
        calibration: Folder of the general prompts' scores that its threshold comes from, where it is still there.
    """

    name: str
    label: str
    model: str
    method: str
    title: str
    prompt_list: str
    settings: Mapping[str, Any]
    digests: Mapping[str, str]
    citations: Mapping[str, str]
    layers: Sequence[str]
    starts: Sequence[Mapping[str, Any]]
    prompts: Sequence[Prompt]
    outcomes: Mapping[str, Outcome]
    metrics: Mapping[str, MetricInfo]
    aggregates: Mapping[str, Mapping[str, Aggregate]]
    cost: Mapping[str, float]
    calibration: Path | None

    def prompt_means(self, metric: str, groups: Iterable[str]) -> dict[str, float]:
        """Mean over images of a metric, by prompt id, for the prompts of some groups that have the metric."""
        found = {p.id: self.outcomes[p.id].values(metric) for p in self.prompts if p.group in set(groups)}
        return {name: fmean(values) for name, values in found.items() if values}


@dataclass(frozen=True)
class Calibration:
    """Where a threshold comes from.

    Attributes:
        threshold: Similarity above which a prompt counts as memorized.
        protocol: How noise differences were taken.
        pairs: Similarities of all pairs of seeds of general prompts.
    """

    threshold: float
    protocol: str
    pairs: Sequence[float]


@dataclass(frozen=True)
class Results:
    """A run.

    Attributes:
        name: Name of the run.
        folder: Its folder.
        cells: Finished cells in the order of the table; at least one.
        unfinished: Name of every other cell, and what is missing there.
    """

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    unfinished: Mapping[str, str]

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        """Metrics of all cells, in the order of display."""
        return {key: info for cell in self.cells for key, info in cell.metrics.items()}

    @property
    def groups(self) -> list[str]:
        """Groups that hold prompts, in the order of display."""
        return [group for group in GROUPS if any(cell.aggregates.get(group) for cell in self.cells)]


def load_results(folder: Path | str) -> Results:
    """Reads a run from its folder.

    Args:
        folder: Such as ``results/default``.

    Raises:
        StoreError: The folder holds no run, no cell of it is finished, or a file does not hold what it should.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        runs = sorted(path.parent.name for path in folder.glob("*/run.json"))
        hint = f"Runs found inside: {', '.join(runs)}." if runs else "Start a run with `nemo-bench run`."
        raise StoreError(f"{folder} holds no run: it has no run.json. Give the folder of a run. {hint}")
    run = _read(folder / "run.json")
    cells, unfinished = [], {}
    for name in run.get("cells", []):
        missing = _missing(folder / name)
        if missing:
            unfinished[name] = missing
        else:
            cells.append(_load_cell(folder / name))
    if not cells:
        listed = "; ".join(f"{name}: {why}" for name, why in unfinished.items()) or "run.json lists no cells"
        msg = f"{folder}: no cell of the run is finished ({listed}). Give the command of the run again to go on."
        raise StoreError(msg)
    return Results(run.get("name", folder.name), folder, _labelled(cells), unfinished)


def network_order(layers: Iterable[str]) -> list[str]:
    """Layers in the order in which data passes them: down, mid, up; names of another form last."""

    def place(name: str) -> tuple[object, ...]:
        match = _ATTENTION.match(name)
        if not match:
            return (3, name)
        return (("down", "mid", "up").index(match[1]), *(int(part or 0) for part in match.groups()[1:]))

    return sorted(layers, key=place)


def short_layers(layers: Iterable[str]) -> dict[str, str]:
    """Short names of value layers, such as ``down.0.0`` and ``mid.0``.

    The index of the transformer block is added where the model has several in a row; a name of another form stays.
    """
    matches = {name: _ATTENTION.match(name) for name in layers}
    deep = any(match and match[4] != "0" for match in matches.values())
    return {
        name: ".".join(part for part in match.groups()[: 4 if deep else 3] if part is not None) if match else name
        for name, match in matches.items()
    }


def _read(path: Path) -> Any:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema", SCHEMA) != SCHEMA:
        msg = f"{path}: expected an object of schema {SCHEMA}; read it with the version of nemo_bench that wrote it"
        raise StoreError(msg)
    return content


def _missing(folder: Path) -> str:
    if not (folder / "spec.json").is_file():
        return "not started"
    stages = [stage for stage in _STAGES if not (folder / f"{stage}.done").exists()]
    if stages:
        return f"{', '.join(stages)} not finished"
    return "" if (folder / "metrics.json").is_file() else "not scored"


def _load_cell(folder: Path) -> Cell:
    try:
        names = ("spec", "env", "metrics", "layers")
        spec, env, metrics, layers = (_read(folder / f"{name}.json") for name in names)
        prompts = [_prompt(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
        outcomes = _outcomes(folder, prompts)
        return Cell(
            name=folder.name,
            label=spec["title"],
            model=spec["model"],
            method=spec["method"],
            title=spec["title"],
            prompt_list=spec["prompts"],
            settings=spec["settings"],
            digests=spec["digests"],
            citations=spec["citations"],
            layers=list(layers),
            starts=env["starts"],
            prompts=prompts,
            outcomes=outcomes,
            metrics={key: MetricInfo(key, **info) for key, info in metrics["metrics"].items()},
            aggregates={
                group: {key: Aggregate(**values) for key, values in scores.items()}
                for group, scores in metrics["aggregates"].items()
            },
            cost=metrics["cost"],
            calibration=_calibration(folder, spec.get("calibration")),
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        msg = f"{folder} does not hold what a cell should ({type(error).__name__}: {error}); remove it and run again"
        raise StoreError(msg) from error


def _calibration(cell: Path, place: str | None) -> Path | None:
    folder = (cell / place).resolve() if place else None
    return folder if folder and (folder / "threshold.json").is_file() else None


def load_calibration(folder: Path) -> Calibration:
    """Reads what a threshold comes from.

    Raises:
        StoreError: A file does not hold what it should.
    """
    try:
        about = read_json(folder / "threshold.json")
        pairs = [value for record in read_records(folder, "calibrate").values() for value in record["pairs"]]
        return Calibration(float(about["threshold"]), about["protocol"], pairs)
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{folder} does not hold a calibration ({type(error).__name__}: {error}); remove it and run again"
        raise StoreError(msg) from error


def _prompt(line: str) -> Prompt:
    content = json.loads(line)
    references = tuple(Path(path) for path in content["references"])
    return Prompt(content["id"], content["text"], content["kind"], references, tuple(content["tags"]))


def _outcomes(folder: Path, prompts: Iterable[Prompt]) -> dict[str, Outcome]:
    localized = {record["prompt"]: record for record in read_records(folder, "localize").values()}
    scored = read_records(folder, "score").values()
    scores = {(record["prompt"], record["seed"]): record["scores"] for record in scored}
    images: dict[str, list[GeneratedImage]] = {}
    for record in read_records(folder, "generate").values():
        name, seed = record["prompt"], record["seed"]
        image = GeneratedImage(seed, folder / record["image"], scores.get((name, seed), {}))
        images.setdefault(name, []).append(image)
    outcomes = {}
    for prompt in prompts:
        found = localized.get(prompt.id, {})
        outcomes[prompt.id] = Outcome(
            images=tuple(sorted(images.get(prompt.id, ()), key=lambda image: image.seed)),
            scores=scores.get((prompt.id, None), {}),
            neurons=Neurons(found.get("neurons")),
            noise=folder / found["noise"] if found.get("noise") else None,
        )
    return outcomes


def _labelled(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Gives each cell the title of its method, and then only what it takes to tell the cells apart."""
    labels = [[cell.title] for cell in cells]
    for part in ("model", "prompt_list"):
        if len({getattr(cell, part) for cell in cells}) > 1:
            labels = [[*label, getattr(cell, part)] for label, cell in zip(labels, cells, strict=True)]
    for label, cell in zip(labels, cells, strict=True):
        same = [c for c in cells if (c.title, c.model, c.prompt_list) == (cell.title, cell.model, cell.prompt_list)]
        if len({frozenset(_flat(c.settings)) for c in same}) > 1 and len({c.method for c in same}) > 1:
            # Methods made otherwise, though of one title: most of their settings can't be compared.
            label.append(cell.method)
            same = [c for c in same if c.method == cell.method]
        settings = [_flat(c.settings) for c in same]
        keys = [key for key in dict.fromkeys(k for s in settings for k in s) if len({s.get(key) for s in settings}) > 1]
        if len(same) > 1:
            own = _flat(cell.settings)
            label.extend([f"{key.rpartition('.')[2]} {own.get(key, 'unset')}" for key in keys] or [cell.name[-8:]])
    return tuple(replace(cell, label=" · ".join(label)) for cell, label in zip(cells, labels, strict=True))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return found
