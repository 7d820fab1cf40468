"""A finished run as plain data: what lies in a results folder, read once and checked.

Tables, plots and the page are made from :class:`Results` alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from nemo_bench.errors import StoreError, counted
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.io import damaged, read_object
from nemo_bench.records.statistics import GROUPS
from nemo_bench.records.store import (
    SCHEMA,
    Store,
    lack,
    read_cell_prompts,
    read_checked,
    read_records,
    read_run,
    read_spec,
    read_starts,
)

FAMILIES = ("memorization", "change", "alignment", "diversity", "quality", "localization")
"""Families of metrics, in the order of display."""

_STAGES = ("localize", "generate", "score")
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
    """How well a detector tells memorized prompts from others; all definitions of the true positive rate in use.

    ``tpr_at_1_fpr_nearest`` is at the highest of the points nearest to 1%, ``tpr_at_1_fpr_first`` at the first that
    scikit-learn keeps. ``curve`` are corners of the ROC curve, false and true positive rate. ``failed`` is the number
    of prompts without a finite score, which nothing here rests on.
    """

    title: str
    auc: float
    auc_low: float | None
    auc_high: float | None
    average_precision: float
    tpr_at_1_fpr_below: float
    tpr_at_1_fpr_nearest: float
    tpr_at_1_fpr_first: float
    best_accuracy: float
    memorized: int
    other: int
    curve: Sequence[Sequence[float]] = ()
    failed: int = 0


@dataclass(frozen=True)
class Failures:
    """What was not finite in a group of prompts, and so has no value.

    Attributes:
        images: Number of images.
        localizations: Number of prompts whose neurons or noise differences were not finite.
        scores: Number of scores of images and prompts that were there.
        metrics: By metric, how many images and prompts it lacks for any of these reasons.
    """

    images: int = 0
    localizations: int = 0
    scores: int = 0
    metrics: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Images, localizations and scores together."""
        return self.images + self.localizations + self.scores

    def __str__(self) -> str:
        """Such as ``3 images, 1 localization``; empty where nothing failed."""
        counts = {"image": self.images, "localization": self.localizations, "score": self.scores}
        return ", ".join(counted(count, name) for name, count in counts.items() if count)


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
        failed: Why images are not there, by seed.
    """

    images: tuple[GeneratedImage, ...]
    scores: Mapping[str, float]
    neurons: Neurons
    noise: Path | None
    failed: Mapping[int, str] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Seeds that were asked for, whether or not there is an image."""
        return sorted([*(image.seed for image in self.images), *self.failed])

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
        failures: By group that has any.
        detection: By detector, where prompts of both sorts were run.
        localization: By group, where neurons were searched: how many ``prompts`` there are, ``passed_gate``, and in how
            many the selection was ``exhausted``, ran out without meeting its criterion; None where that is not known.
        counts: Images, prompts, and what is missing.
        cost: Seconds, UNet passes and memory.
        calibration: Folder of the general prompts' scores that its threshold comes from, where it is still there.
        general_prompts: ``file`` of the general prompts that its calibration was measured on and ``digest`` of them,
            or None.
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
    failures: Mapping[str, Failures]
    detection: Mapping[str, Detection]
    localization: Mapping[str, Mapping[str, int | None]]
    counts: Mapping[str, int]
    cost: Mapping[str, float]
    calibration: Path | None
    general_prompts: Mapping[str, str] | None
    unmitigated: str | None

    def count(self, group: str) -> int:
        """Number of prompts of a group."""
        return sum(group in (prompt.group, "all") for prompt in self.prompts)

    def is_complete(self, group: str, metric: str) -> bool:
        """Whether a metric lacks no value of a group because something failed."""
        return not self.failures.get(group, Failures()).metrics.get(metric)

    def searches(self, group: str) -> str:
        """What became of the search in a group, such as ``11 of 16 passed the gate, 11 ran out``; empty without."""
        found = self.localization.get(group)
        if not found:
            return ""
        words = f"{found['passed_gate']} of {found['prompts']} passed the gate"
        return words if found["exhausted"] is None else f"{words}, {found['exhausted']} ran out"

    def prompt_means(self, metric: str, groups: Iterable[str]) -> dict[str, float]:
        """Mean over images of a metric, by prompt id, for the prompts of some groups that have the metric."""
        wanted = set(groups)
        found = {p.id: self.outcomes[p.id].values(metric) for p in self.prompts if wanted & {p.group, "all"}}
        return {name: fmean(values) for name, values in found.items() if values}


@dataclass(frozen=True)
class Calibration:
    """Where a threshold comes from.

    Attributes:
        threshold: Similarity above which a prompt counts as memorized; None where most general prompts failed.
        protocol: How noise differences were taken.
        similarity: How they were compared.
        pairs: Similarities of all pairs of seeds of general prompts.
        failed: Number of general prompts whose noise differences were not finite.
    """

    threshold: float | None
    protocol: str
    similarity: str
    pairs: Sequence[float]
    failed: int = 0


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
    def advice(self) -> str:
        """What can be done about cells that are not finished."""
        return (
            "The command of the run goes on with a cell. To drop one, delete its folder; a run that does not ask for "
            "it takes it off the list."
        )

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
        return [group for group in GROUPS if any(group in cell.aggregates for cell in self.cells)]

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
    _read(folder / "run.json")
    run = read_run(folder)
    cells, unfinished = [], {}
    for name in run["cells"]:
        if not (folder / name).is_dir():
            continue  # who deletes the folder of a cell wants to see it no more
        missing = _missing(folder / name)
        try:
            found = missing or _load_cell(folder / name)
        except StoreError as error:
            found = str(error)
        if isinstance(found, str):
            unfinished[name] = found
        else:
            cells.append(found)
    if not cells:
        if (folder / "detection.html").is_file() and not unfinished:
            raise StoreError(f"{folder} holds detectors and no run of methods; see {folder / 'detection.html'}")
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
    content = read_object(path)
    if content.get("schema", SCHEMA) != SCHEMA:
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


def _load_cell(folder: Path) -> Cell | str:
    """A finished cell; or what is missing of it, whatever its markers say."""
    for name in ("spec", "metrics"):
        _read(folder / f"{name}.json")
    spec, starts = read_spec(folder), read_starts(folder)
    prompts = read_cell_prompts(folder, spec)
    if missing := lack(folder, spec, prompts, _STAGES):
        return missing
    layers, metrics = (read_object(folder / f"{name}.json") for name in ("layers", "metrics"))
    with _holding(folder / "layers.json"):
        short_layers(layers)
        if not all(isinstance(width, int) for width in layers.values()):
            raise TypeError("a width is no whole number")
    with _holding(folder / "metrics.json"):
        found: dict[str, Any] = {
            "metrics": {key: _metric(key, info) for key, info in metrics["metrics"].items()},
            "aggregates": _table(metrics["aggregates"], _aggregate),
            "presets": {
                preset: Preset(**{**about, "rows": _table(about["rows"], lambda values: _made(Statistic, values))})
                for preset, about in metrics.get("presets", {}).items()
            },
            "failures": {group: Failures(**values) for group, values in metrics.get("failed", {}).items()},
            "detection": {key: _made(Detection, values) for key, values in metrics.get("detection", {}).items()},
            "localization": metrics.get("localization", {}),
            "counts": {**_numbers(metrics.get("counts", {})), **_lost(folder)},
            "cost": _numbers(metrics["cost"]),
            "unmitigated": metrics["unmitigated"],
        }
    with _holding(folder / "spec.json"):
        about: dict[str, Any] = {"digests": dict(spec["digests"]), "citations": dict(spec["citations"])}
        return Cell(
            name=folder.name,
            label=spec["title"],
            short=spec["title"],
            model=spec["model"],
            method=spec["method"],
            title=spec["title"],
            prompt_list=spec["prompts"],
            settings=spec["settings"],
            layers=list(layers),
            starts=starts,
            prompts=prompts,
            outcomes=_outcomes(folder, prompts),
            calibration=_calibration(folder, spec.get("calibration")),
            general_prompts=spec.get("general_prompts"),
            **about,
            **found,
        )


@contextmanager
def _holding(path: Path) -> Iterator[None]:
    """Says of what a file holds in place of what it should that it does."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def _numbers(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if wrong := [key for key, value in values.items() if not isinstance(value, int | float)]:
        raise TypeError(f"{wrong[0]} is no number")
    return values


def _made(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """A dataclass of numbers and texts from what a file holds."""
    for key, value in values.items():
        if not isinstance(value, int | float | None) and key not in ("title", "curve", "paired"):
            raise TypeError(f"{key} is no number")
    return kind(**values)


def _metric(key: str, info: Mapping[str, Any]) -> MetricInfo:
    known = {f.name: info[f.name] for f in fields(MetricInfo) if f.name in info}
    if not isinstance(info["title"], str):
        raise TypeError(f"the title of {key} is no text")
    return MetricInfo(**{"key": key, **known})


def _table(content: Mapping[str, Any], make: Callable[[Any], _T]) -> dict[str, dict[str, _T]]:
    return {group: {key: make(values) for key, values in row.items()} for group, row in content.items()}


def _aggregate(values: Mapping[str, Any]) -> Aggregate:
    paired = values.get("paired")
    return _made(Aggregate, {**values, "paired": _made(Paired, paired) if paired else None})


def _calibration(cell: Path, place: str | None) -> Path | None:
    folder = (cell / place).resolve() if place else None
    return folder if folder and (folder / "threshold.json").is_file() else None


def load_calibration(folder: Path) -> Calibration:
    """Reads what a threshold comes from.

    Raises:
        StoreError: A file does not hold what it should.
    """
    try:
        about = read_object(folder / "threshold.json", "threshold", "protocol")
        records = read_records(folder, "calibrate").values()
        pairs = [value for record in records for value in _finite(record.get("pairs", ()))]
        tau = None if about["threshold"] is None else float(about["threshold"])
        return Calibration(tau, about["protocol"], about["similarity"], pairs, about.get("failed", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / "threshold.json", f"{type(error).__name__}: {error}") from error


def _outcomes(folder: Path, prompts: Iterable[Prompt]) -> dict[str, Outcome]:
    localized = {record["prompt"]: record for record in read_checked(folder, "localize")}
    scored = read_checked(folder, "score")
    scores = {(r["prompt"], r["seed"]): {k: v for k, v in r["scores"].items() if _finite([v])} for r in scored}
    images: dict[str, list[GeneratedImage]] = {}
    failed: dict[str, dict[int, str]] = {}
    for record in read_records(folder, "generate").values():
        name, seed = record["prompt"], record["seed"]
        if "image" not in record:
            failed.setdefault(name, {})[seed] = record["failed"]
            continue
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
            failed=failed.get(prompt.id, {}),
        )
    return outcomes


def _lost(folder: Path) -> dict[str, int]:
    """How many images are gone or cut since they were scored, if any are; their scores are in the records still."""
    images = [record["id"] for record in read_records(folder, "generate").values() if "image" in record]
    lost = Store(folder).pending_ids("generate", images)
    return {"lost_images": len(lost)} if lost else {}


def _finite(values: Iterable[float]) -> list[float]:
    """Those of some numbers that are finite; records made here hold no others."""
    return [value for value in values if isfinite(value)]


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
