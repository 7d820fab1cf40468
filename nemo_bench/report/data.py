"""A finished run as plain data: what lies in a results folder, read once and checked.

Tables, plots and the page are made from :class:`Results` alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from nemo_bench.aggregate import GROUPS
from nemo_bench.errors import StoreError
from nemo_bench.store import SCHEMA, read_json, read_records
from nemo_bench.types import Neurons, Prompt

FAMILIES = ("memorization", "change", "alignment", "diversity", "quality", "localization")
"""Families of metrics, in the order of display."""

_STAGES = ("localize", "generate", "score")
_EARLIER = {
    "ssim": "memorization", "ssim_nearest": "memorization", "memorization": "localization", "neurons": "localization",
    "alignment": "alignment", "diversity": "diversity",
}  # fmt: skip
"""Families of the metrics of runs that did not write them down."""
_EARLIER_RUN = "?"
"""In place of the name of the cell without mitigation, in runs that did not write it down."""
_COMMAND = re.compile(r"^\S*cli\.py(?= (run|score)\b)")
"""How the command line starts with ``python -m nemo_bench.cli``."""
_WORDS = {None: "unset", "True": "on", "False": "off"}
_DIGEST = re.compile("[0-9a-f]{16}")
_T = TypeVar("_T")
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
        citation: Where it comes from.
        description: One sentence.
        family: One of :data:`FAMILIES`.
        per: What has a value: ``"image"``, ``"prompt"`` or ``"set"`` (all images of a group at once).
    """

    key: str
    title: str
    higher_is_better: bool | None
    lower: float | None = None
    upper: float | None = None
    citation: str = ""
    description: str = ""
    family: str = ""
    per: str = "image"

    @property
    def arrow(self) -> str:
        """``↑`` where larger is better, ``↓`` where smaller is better, else nothing."""
        return "" if self.higher_is_better is None else "↑" if self.higher_is_better else "↓"


@dataclass(frozen=True)
class Paired:
    """Mean over prompts of the difference to no mitigation, its 95% interval, and p of a two-sided sign-flip test."""

    difference: float
    low: float
    high: float
    p: float
    prompts: int


@dataclass(frozen=True)
class Aggregate:
    """A metric over a group of prompts: mean with its 95% bootstrap interval, median and median absolute deviation.

    A metric of a whole set has its value as mean and nothing else. ``paired`` is there where the same prompts were
    also run without mitigation.
    """

    mean: float
    low: float | None
    high: float | None
    median: float | None
    mad: float | None
    prompts: int
    paired: Paired | None = None


@dataclass(frozen=True)
class Statistic:
    """A number of a preset, with its interval and its spread (median absolute deviation) where it has them."""

    value: float
    low: float | None
    high: float | None
    spread: float | None
    prompts: int


@dataclass(frozen=True)
class Preset:
    """Numbers aggregated as another paper does: by group, then by metric."""

    title: str
    definition: str
    citation: str
    rows: Mapping[str, Mapping[str, Statistic]]


@dataclass(frozen=True)
class Detection:
    """How well a detector tells memorized prompts from others; both definitions of the true positive rate in use.

    ``curve`` are corners of the ROC curve, false and true positive rate; runs of earlier versions have none.
    """

    title: str
    auc: float
    auc_low: float | None
    auc_high: float | None
    average_precision: float
    tpr_at_1_fpr_below: float
    tpr_at_1_fpr_nearest: float
    best_accuracy: float
    memorized: int
    other: int
    curve: Sequence[Sequence[float]] = ()


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
        short: The same without model and list of prompts.
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
        presets: By name, as other papers aggregate.
        detection: By detector, where prompts of both sorts were run.
        counts: Images, prompts, and what is missing.
        cost: Seconds, UNet passes and memory.
        calibration: Folder of the general prompts' scores that its threshold comes from, where it is still there.
        unmitigated: Name of the cell of the same images without mitigation, or None.
    """

    name: str
    label: str
    short: str
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
    presets: Mapping[str, Preset]
    detection: Mapping[str, Detection]
    counts: Mapping[str, int]
    cost: Mapping[str, float]
    calibration: Path | None
    unmitigated: str | None

    def count(self, group: str) -> int:
        """Number of prompts of a group."""
        return sum(group in (prompt.group, "all") for prompt in self.prompts)

    def prompt_means(self, metric: str, groups: Iterable[str]) -> dict[str, float]:
        """Mean over images of a metric, by prompt id, for the prompts of some groups that have the metric."""
        wanted = set(groups)
        found = {p.id: self.outcomes[p.id].values(metric) for p in self.prompts if wanted & {p.group, "all"}}
        return {name: fmean(values) for name, values in found.items() if values}


@dataclass(frozen=True)
class Calibration:
    """Where a threshold comes from.

    Attributes:
        threshold: Similarity above which a prompt counts as memorized.
        protocol: How noise differences were taken.
        similarity: How they were compared.
        pairs: Similarities of all pairs of seeds of general prompts.
    """

    threshold: float
    protocol: str
    similarity: str
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

    @cached_property
    def metrics(self) -> dict[str, MetricInfo]:
        """Metrics of all cells, in the order of display."""
        return {key: info for cell in self.cells for key, info in cell.metrics.items()}

    @cached_property
    def leading(self) -> dict[str, str]:
        """The first metric of every family, by family."""
        found = {family: [key for key, info in self.metrics.items() if info.family == family] for family in FAMILIES}
        return {family: keys[0] for family, keys in found.items() if keys}

    @property
    def models(self) -> list[str]:
        """Models in the order of display."""
        return list(dict.fromkeys(cell.model for cell in self.cells))

    @cached_property
    def groups(self) -> list[str]:
        """Groups that hold prompts, in the order of display."""
        return [group for group in GROUPS if any(cell.aggregates.get(group) for cell in self.cells)]

    @property
    def own_groups(self) -> list[str]:
        """Groups of prompts of one sort; all prompts together only where there is nothing else."""
        return [group for group in self.groups if group != "all"] or self.groups

    def heading(self, group: str) -> str:
        """A group and how many prompts of it the cells have, such as ``VM, 12 prompts``."""
        counts = sorted({count for cell in self.cells if (count := cell.count(group))})
        return f"{group}, {' to '.join(map(str, counts[:: len(counts) - 1 or 1]))} prompt{'s' * (counts != [1])}"

    def meaning(self, group: str) -> str:
        """What a group is; of all prompts together, what they mix."""
        own = self.own_groups
        return f"{', '.join(own[:-1])} and {own[-1]} mixed" if group == "all" and len(own) > 1 else GROUPS[group]

    @cached_property
    def places(self) -> dict[str, int]:
        """Decimal places that suit a metric in this run: three for values below two, else one."""
        largest = dict.fromkeys(self.metrics, 0.0)
        for row in (row for cell in self.cells for row in cell.aggregates.values()):
            for key, value in row.items():
                largest[key] = max(largest.get(key, 0.0), abs(value.mean))
        return {key: 3 if value < 2 else 1 for key, value in largest.items()}

    @cached_property
    def counted(self) -> frozenset[str]:
        """Metrics that count something: of single images and prompts they are whole numbers, and some are above one."""
        found: dict[str, set[float]] = {}
        for cell in self.cells:
            for outcome in cell.outcomes.values():
                for scores in (outcome.scores, *(image.scores for image in outcome.images)):
                    for key, value in scores.items():
                        found.setdefault(key, set()).add(value)
        return frozenset(k for k, v in found.items() if max(v) > 1 and all(float(x).is_integer() for x in v))


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
        if (folder / "detection.html").is_file() and not unfinished:
            raise StoreError(f"{folder} holds detectors and no run of methods; see {folder / 'detection.html'}")
        listed = "; ".join(f"{name}: {why}" for name, why in unfinished.items()) or "run.json lists no cells"
        msg = f"{folder}: no cell of the run is finished ({listed}). Give the command of the run again to go on."
        raise StoreError(msg)
    cells = [replace(cell, unmitigated=_unmitigated(cell, cells)) for cell in cells]
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
        lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [Prompt.of(json.loads(line)) for line in lines]
        outcomes = _outcomes(folder, prompts)
        return Cell(
            name=folder.name,
            label=spec["title"],
            short=spec["title"],
            model=spec["model"],
            method=spec["method"],
            title=spec["title"],
            prompt_list=spec["prompts"],
            settings=spec["settings"],
            digests=spec["digests"],
            citations=spec["citations"],
            layers=list(layers),
            starts=[{**start, "command": _COMMAND.sub("nemo-bench", start["command"])} for start in env["starts"]],
            prompts=prompts,
            outcomes=outcomes,
            metrics={key: _metric(key, info) for key, info in metrics["metrics"].items()},
            aggregates=_table(metrics["aggregates"], _aggregate),
            presets={
                preset: Preset(**{**about, "rows": _table(about["rows"], lambda values: Statistic(**values))})
                for preset, about in metrics.get("presets", {}).items()
            },
            detection={key: Detection(**values) for key, values in metrics.get("detection", {}).items()},
            counts=metrics.get("counts", {}),
            cost=metrics["cost"],
            calibration=_calibration(folder, spec.get("calibration")),
            unmitigated=metrics.get("unmitigated", _EARLIER_RUN),
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        msg = f"{folder} does not hold what a cell should ({type(error).__name__}: {error}); remove it and run again"
        raise StoreError(msg) from error


def _metric(key: str, info: Mapping[str, Any]) -> MetricInfo:
    known = {f.name: info[f.name] for f in fields(MetricInfo) if f.name in info}
    return MetricInfo(**{"key": key, "family": _EARLIER.get(key, ""), **known})


def _table(content: Mapping[str, Any], make: Callable[[Any], _T]) -> dict[str, dict[str, _T]]:
    return {group: {key: make(values) for key, values in row.items()} for group, row in content.items()}


def _aggregate(values: Mapping[str, Any]) -> Aggregate:
    paired = values.get("paired")
    return Aggregate(**{**values, "paired": Paired(**paired) if paired else None})


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
        return Calibration(float(about["threshold"]), about["protocol"], about["similarity"], pairs)
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{folder} does not hold a calibration ({type(error).__name__}: {error}); remove it and run again"
        raise StoreError(msg) from error


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


def _unmitigated(cell: Cell, cells: Sequence[Cell]) -> str | None:
    """What ``metrics.json`` names; in earlier runs the first cell without mitigation of the same model and prompts."""
    if cell.unmitigated != _EARLIER_RUN:
        return cell.unmitigated
    same = [c for c in cells if all(c.settings.get(k) == cell.settings.get(k) for k in ("model", "prompts"))]
    names = [c.name for c in same if c.model == cell.model and c.method == "none"]
    return names[0] if names and cell.method != "none" else None


def _labelled(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Gives each cell the title of its method, and then only what it takes to tell the cells apart."""
    parts = [part for part in ("model", "prompt_list") if len({getattr(cell, part) for cell in cells}) > 1]
    found = []
    for cell in cells:
        same = [c for c in cells if (c.title, c.model, c.prompt_list) == (cell.title, cell.model, cell.prompt_list)]
        words = [cell.title]
        if len({c.method for c in same}) > 1 and len({frozenset(_flat(c.settings)) for c in same}) > 1:
            # Methods made otherwise, though of one title: most of their settings can't be compared.
            words.append(cell.method)
            same = [c for c in same if c.method == cell.method]
        words += _differences(cell, same)
        label = " · ".join([*words, *(str(getattr(cell, part)) for part in parts)])
        found.append(replace(cell, label=label, short=" · ".join(words)))
    return tuple(found)


def _differences(cell: Cell, same: Sequence[Cell]) -> list[str]:
    """The fewest settings that tell a cell from others of its method, each only where it is not the usual one."""
    if len(same) == 1:
        return []
    settings = {c.name: _flat(c.settings) for c in same}
    keys = list(dict.fromkeys(key for flat in settings.values() for key in flat))

    def variants(chosen: Sequence[str]) -> int:
        return len({tuple(flat.get(key) for key in chosen) for flat in settings.values()})

    total = variants(keys)
    if total < len(same):
        return [cell.name[-8:]]
    for key in sorted(keys, key=lambda key: key.startswith("method.")):
        others = [other for other in keys if other != key]
        keys = others if variants(others) == total else keys
    words = []
    for key in keys:
        counts = Counter(flat.get(key) for flat in settings.values()).most_common()
        usual = counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else None
        value = settings[cell.name].get(key)
        if value != usual:
            last = key.rpartition(".")[2]
            name = last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key.removeprefix("method.")
            # In place of a file's path stands the digest of what it holds.
            is_file = value and _DIGEST.fullmatch(value) and {each for each, _ in counts} == {None, value}
            words.append(f"with {name}" if is_file else f"{name} {_WORDS.get(value, value)}")
    return words


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        else:
            found[name] = None if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return found
