"""The results of a run, read from its folder: the only source of tables, plots, pages and loggers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from nemo_bench.errors import StoreError
from nemo_bench.records import schema, store
from nemo_bench.records.data import GENERAL, Neurons, Prompt
from nemo_bench.records.io import digest, read_file
from nemo_bench.records.schema import DetectionRecord, Failures, ImageRecord, MemorizationRecord, ScoreRecord, Summary
from nemo_bench.records.statistics import GROUPS

FAMILIES = ("memorization", "change", "alignment", "diversity", "quality", "localization")
"""Families of metrics, in the order of display."""

_WORDS = {None: "unset", "True": "on", "False": "off"}
_DIGEST = re.compile("[0-9a-f]{16}")
_ATTENTION = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class Outcome:
    """Results of a cell for one prompt."""

    images: Mapping[int, Path]  #: Files by seed, in order.
    #: By seed and metric; at None, those of the prompt as a whole.
    scores: Mapping[int | None, Mapping[str, float]]
    neurons: Neurons  #: Blocked neurons.
    noise: Path | None  #: Strip of noise differences.
    failed: Mapping[int, str]  #: Reasons of failed images by seed.
    #: By metric of alignment, the mean score with the text of another prompt, without mitigation.
    shuffled: Mapping[str, float] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Seeds of the prompt, with and without an image."""
        return sorted([*self.images, *self.failed])

    def values(self, metric: str) -> list[float]:
        """Scores of a metric: the one of the prompt, or one an image; none where the metric has no meaning."""
        seeds: list[int | None] = [None] if metric in self.scores.get(None, {}) else [*self.images]
        return [self.scores[seed][metric] for seed in seeds if metric in self.scores.get(seed, {})]


@dataclass(frozen=True)
class CellResults:
    """A finished cell."""

    folder: Path  #: Its folder.
    spec: schema.Spec  #: ``spec.json``.
    summary: Summary  #: ``metrics.json``.
    starts: Sequence[schema.Start]  #: Every start, the latest last.
    layers: dict[str, int]  #: Widths of value layers in network order.
    prompts: Sequence[Prompt]  #: In the order of the list.
    outcomes: Mapping[str, Outcome]  #: By prompt id.
    lost_images: int  #: Number of images missing or cut since they were scored.
    label: str = ""  #: Shortest name that differs from those of the other cells of the run.
    short: str = ""  #: The same without model and prompt list.

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.spec.model

    @property
    def method(self) -> str:
        """Name of the mitigation."""
        return self.spec.method or ""

    @property
    def calibration(self) -> Path | None:
        """Folder of the calibration that its threshold comes from, or None where that is missing."""
        folder = (self.folder / self.spec.calibration).resolve() if self.spec.calibration else None
        return folder if folder and (folder / "threshold.json").is_file() else None

    @property
    def audits(self) -> list[schema.Audit]:
        """Its audits.

        Raises:
            StoreError: ``audit.json`` does not hold what it should.
        """
        file = self.folder / "audit.json"
        return read_file(file, list[schema.Audit]) if file.is_file() else []

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the summary, and of lost images where there are any."""
        lost = {"lost_images": self.lost_images} if self.lost_images else {}
        return {**self.summary.counts, **lost}

    def count(self, group: str) -> int:
        """Number of prompts of a group."""
        return sum(group in (prompt.group, "all") for prompt in self.prompts)

    def failures(self, group: str) -> Failures:
        """What was not finite in a group."""
        return self.summary.failed.get(group, Failures())

    def is_complete(self, group: str, metric: str) -> bool:
        """Whether no value of a metric is missing in a group because of a failure."""
        return not self.failures(group).metrics.get(metric)

    def prompt_means(self, metric: str, groups: Iterable[str]) -> dict[str, float]:
        """Mean of a metric over images, by id of those prompts of some groups that have the metric."""
        wanted = set(groups)
        values = {p.id: self.outcomes[p.id].values(metric) for p in self.prompts if wanted & {p.group, "all"}}
        return {prompt: fmean(of_prompt) for prompt, of_prompt in values.items() if of_prompt}


@dataclass(frozen=True, eq=False)
class Results:
    """A run; equal only to itself."""

    folder: Path  #: Its folder.
    run: schema.Run  #: ``run.json``.
    cells: tuple[CellResults, ...]  #: Finished cells in the order of the table; at least one.
    unfinished: Mapping[str, str]  #: By name of every other cell, what is missing there.
    advice: ClassVar = (
        "The command of the run goes on with a cell. To drop one, delete its folder; a run that does not ask for it "
        "takes it off the list."
    )
    """What can be done about cells that are not finished."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.name

    @cached_property
    def metrics(self) -> dict[str, schema.MetricInfo]:
        """Metrics of all cells, in the order of display."""
        return {key: info for cell in self.cells for key, info in cell.summary.metrics.items()}

    @cached_property
    def leading(self) -> dict[str, str]:
        """The first metric of every family, by family."""
        first: dict[str, str] = {}
        for key, info in self.metrics.items():
            first.setdefault(info.family, key)
        return {family: first[family] for family in FAMILIES if family in first}

    def keys_of(self, role: str) -> list[str]:
        """Metrics of a role."""
        return [key for key, info in self.metrics.items() if info.role == role]

    @property
    def models(self) -> list[str]:
        """Models in the order of display."""
        return list(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def prompt_lists(self) -> list[str]:
        """Names of the prompt lists in the order of display."""
        return list(dict.fromkeys(cell.spec.prompts for cell in self.cells))

    @cached_property
    def groups(self) -> list[str]:
        """Groups with prompts, in the order of display."""
        return [group for group in GROUPS if any(group in cell.summary.aggregates for cell in self.cells)]

    @property
    def own_groups(self) -> list[str]:
        """Groups of prompts of one kind; all prompts together only where there is nothing else."""
        return [group for group in self.groups if group != "all"] or self.groups

    def heading(self, group: str) -> str:
        """A group and its number of prompts, such as ``VM, 12 prompts``."""
        counts = sorted({count for cell in self.cells if (count := cell.count(group))})
        return f"{group}, {' to '.join(map(str, counts[:: len(counts) - 1 or 1]))} prompt{'s' * (counts != [1])}"

    def meaning(self, group: str) -> str:
        """What a group is; of all prompts together, the groups in it."""
        own = self.own_groups
        return f"{', '.join(own[:-1])} and {own[-1]} mixed" if group == "all" and len(own) > 1 else GROUPS[group]

    def collateral(self, cell: CellResults, group: str) -> schema.Collateral | None:
        """What the neurons that a cell found for memorized prompts cost prompts that are not memorized.

        It is read from the cells that switch these neurons off for other prompts: ``other_prompt`` and ``one_edit``.
        """
        key = self.leading.get("alignment")
        if key is None or group != GENERAL:
            return None
        own = cell.spec.settings.get("method")
        changes: dict[str, float] = {}
        for edit in self.cells:
            method = edit.spec.settings.get("method") or {}
            kind = str(method.get("_target_")).rpartition(".")[2]
            which = (
                "one" if kind == "OtherNeurons" else "all" if kind == "SharedNeurons" and not method.get("k") else ""
            )
            value = edit.summary.aggregates.get(group, {}).get(key)
            is_alike = edit.summary.unmitigated is not None and edit.summary.unmitigated == cell.summary.unmitigated
            if which and is_alike and method.get("source") == own and value and value.paired:
                changes[which] = value.paired.difference
        return schema.Collateral(**changes) if changes else None

    @cached_property
    def places(self) -> dict[str, int]:
        """Decimal places that suit a metric in this run: three for values below two, else one."""
        largest = dict.fromkeys(self.metrics, 0.0)
        for row in (row for cell in self.cells for row in cell.summary.aggregates.values()):
            for key, value in row.items():
                largest[key] = max(largest.get(key, 0.0), abs(value.mean))
        return {key: 3 if value < 2 else 1 for key, value in largest.items()}

    @cached_property
    def counted(self) -> frozenset[str]:
        """Metrics that count something: all scores of images and prompts are whole numbers, and some are above one."""
        values: dict[str, set[float]] = {}
        for outcome in (outcome for cell in self.cells for outcome in cell.outcomes.values()):
            for scores in outcome.scores.values():
                for key, value in scores.items():
                    values.setdefault(key, set()).add(value)
        return frozenset(k for k, v in values.items() if max(v) > 1 and all(float(x).is_integer() for x in v))


@dataclass(frozen=True)
class DetectorResults:
    """A finished detector."""

    folder: Path  #: Its folder.
    spec: schema.Spec  #: ``spec.json``.
    summary: Summary  #: ``metrics.json``.
    prompts: Sequence[Prompt]  #: In the order of the list.
    records: Mapping[str, DetectionRecord]  #: By prompt id.
    label: str = ""  #: Title, and the settings by which it differs from others of this title.

    @property
    def compared_with(self) -> tuple[str, ...]:
        """Names and digests of model and prompts, equal for detectors that can be compared."""
        spec = self.spec
        return spec.model, spec.prompts, spec.digests["prompts"], digest(spec.settings["model"])

    @property
    def roc(self) -> schema.Roc | None:
        """How well it tells memorized prompts from others; None where prompts are of one sort."""
        return next(iter(self.summary.detection.values()), None)

    @property
    def failed(self) -> int:
        """Number of prompts without a finite score."""
        return self.summary.counts["failed"]

    def scores(self, *, memorized: bool) -> list[float]:
        """Finite scores of prompts of one sort, in their order."""
        own = (self.records[p.id].score for p in self.prompts if bool(p.kind) == memorized)
        return [score for score in own if score is not None]


def load_run(folder: Path) -> schema.Run:
    """The cells of a run, from its folder.

    Raises:
        StoreError: The folder holds no run, or its list of cells does not hold what it should.
    """
    if not (folder / "run.json").is_file():
        runs = sorted(path.parent.name for path in folder.glob("*/run.json"))
        hint = f"Runs found inside: {', '.join(runs)}." if runs else "Start a run with `nemo-bench run`."
        raise StoreError(f"{folder} holds no run: it has no run.json. Give the folder of a run. {hint}")
    return store.read_run(folder)


def load_results(folder: Path | str) -> Results:
    """Reads a run from its folder, such as ``results/default``.

    Raises:
        StoreError: The folder holds no run, no cell of it is finished, or a file does not hold what it should.
    """
    folder = Path(folder)
    run = load_run(folder)
    cells = []
    unfinished = {}
    for name in run.cells:
        if not (folder / name).is_dir():
            continue  # who deletes the folder of a cell wants to see it no more
        try:
            cells.append(load_cell(folder / name))
        except StoreError as error:
            unfinished[name] = str(error)
    if not cells:
        if (folder / "detection.html").is_file() and not unfinished:
            raise StoreError(f"{folder} holds detectors and no run of methods; see {folder / 'detection.html'}")
        listed = "; ".join(f"{name}: {why}" for name, why in unfinished.items()) or "run.json lists no cells"
        msg = f"{folder}: no cell of the run is finished ({listed}). Give the command of the run again to go on."
        raise StoreError(msg)
    return Results(folder, run, _labelled(cells), unfinished)


def load_detections(folder: Path | str) -> list[DetectorResults]:
    """Reads every finished detector of a run: the best first within its model and prompts, those with failures last.

    Raises:
        StoreError: There is none, or a file does not hold what it should.
    """
    detectors = []
    for path in sorted(Path(folder).glob("*/spec.json")):
        cell = path.parent
        if read_file(path, schema.Spec).task != "detect" or not (cell / "metrics.json").is_file():
            continue
        spec = store.read_spec(cell)
        prompts = store.read_cell_prompts(cell, spec)
        records = {record.prompt: record for record in store.read_records(cell, DetectionRecord).values()}
        if missing := sum(prompt.id not in records for prompt in prompts):
            msg = f"{cell}: {missing} of {len(prompts)} records are missing"
            raise StoreError(f"{msg}; the same nemo-bench detect makes them again, and nothing else")
        detectors.append(DetectorResults(cell, spec, read_file(cell / "metrics.json", Summary), prompts, records))
    if not detectors:
        raise StoreError(f"{folder} holds no finished detector; run nemo-bench detect")
    named = [replace(detector, label=_detector_label(detector, detectors)) for detector in detectors]
    return sorted(named, key=lambda d: (d.compared_with, d.failed > 0, -d.roc.auc if d.roc else 0.0, d.label))


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


def load_cell(folder: Path) -> CellResults:
    """Reads a finished cell.

    Raises:
        StoreError: The cell is not finished, whatever its markers say, or a file does not hold what it should.
    """
    if not (folder / "spec.json").is_file():
        raise StoreError("not started")
    spec = store.read_spec(folder)
    if pending := [stage for stage in spec.stages if not (folder / f"{stage}.done").exists()]:
        raise StoreError(f"{', '.join(pending)} not finished")
    if not (folder / "metrics.json").is_file():
        raise StoreError("not scored")
    prompts = store.read_cell_prompts(folder, spec)
    kinds = (schema.LocalizationRecord, MemorizationRecord, ImageRecord, ScoreRecord)
    if missing := store.missing_records(folder, spec, prompts, kinds):
        raise StoreError(missing)
    images = [record.id for record in store.read_records(folder, ImageRecord).values() if record.image]
    return CellResults(
        folder=folder,
        spec=spec,
        summary=read_file(folder / "metrics.json", Summary),
        starts=store.read_starts(folder),
        layers=read_file(folder / "layers.json", schema.Layers),
        prompts=prompts,
        outcomes=_outcomes(folder, prompts),
        lost_images=len(store.Store(folder).pending_ids(ImageRecord, images)),
    )


def _outcomes(folder: Path, prompts: Sequence[Prompt]) -> dict[str, Outcome]:
    neurons = {prompt: found.neurons for prompt, found in store.read_localizations(folder, prompts).items()}
    strips = {r.prompt: folder / r.image for r in store.read_records(folder, MemorizationRecord).values() if r.image}
    scores: dict[str, dict[int | None, dict[str, float]]] = {}
    shuffled: dict[str, dict[str, float]] = {}
    for score in store.read_records(folder, ScoreRecord).values():
        if score.shuffled:
            shuffled[score.prompt] = score.shuffled
        finite = {key: value for key, value in score.scores.items() if isfinite(value)}
        scores.setdefault(score.prompt, {})[score.seed] = finite
    images: dict[str, dict[int, Path]] = {}
    failed: dict[str, dict[int, str]] = {}
    for image in sorted(store.read_records(folder, ImageRecord).values(), key=lambda record: record.seed):
        if image.image:
            images.setdefault(image.prompt, {})[image.seed] = folder / image.image
        else:
            failed.setdefault(image.prompt, {})[image.seed] = image.failed or ""
    return {
        prompt.id: Outcome(
            images=images.get(prompt.id, {}),
            scores=scores.get(prompt.id, {}),
            neurons=neurons.get(prompt.id, Neurons()),
            noise=strips.get(prompt.id),
            failed=failed.get(prompt.id, {}),
            shuffled=shuffled.get(prompt.id, {}),
        )
        for prompt in prompts
    }


def _labelled(cells: Sequence[CellResults]) -> tuple[CellResults, ...]:
    """Labels each cell by the title of its method, and by nothing more than tells the cells apart."""
    several_models = len({cell.model for cell in cells}) > 1
    several_lists = len({cell.spec.prompts for cell in cells}) > 1
    flat = {cell.name: _flat(cell.spec.settings) for cell in cells}
    words: dict[str, list[str]] = {}
    for of_title in _grouped(cells, lambda cell: (cell.spec.title, cell.model, cell.spec.prompts)):
        groups, has_own = [of_title], False
        if len({c.method for c in of_title}) > 1 and len({frozenset(flat[c.name]) for c in of_title}) > 1:
            # Different methods of one title: most of their settings can't be compared.
            groups, has_own = _grouped(of_title, lambda cell: cell.method), True
        for same in groups:
            differences = _differences({cell.name: flat[cell.name] for cell in same})
            for cell in same:
                words[cell.name] = [cell.spec.title, *[cell.method] * has_own, *differences[cell.name]]
    labelled = []
    for cell in cells:
        places = [cell.model] * several_models + [cell.spec.prompts] * several_lists
        label = " · ".join([*words[cell.name], *places])
        labelled.append(replace(cell, label=label, short=" · ".join(words[cell.name])))
    return tuple(labelled)


def _grouped(cells: Iterable[CellResults], key: Callable[[CellResults], object]) -> list[list[CellResults]]:
    """Cells of equal keys together, in their order."""
    groups: dict[object, list[CellResults]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return list(groups.values())


def _differences(settings: Mapping[str, Mapping[str, str | None]]) -> dict[str, list[str]]:
    """By cell, the fewest settings that tell it from these others, each only where it is not the usual one."""
    words: dict[str, list[str]] = {name: [] for name in settings}
    if len(settings) == 1:
        return words
    every = dict.fromkeys(key for flat in settings.values() for key in flat)
    keys = [key for key in every if len({flat.get(key) for flat in settings.values()}) > 1]

    def variants(chosen: Sequence[str]) -> int:
        return len({tuple(flat.get(key) for key in chosen) for flat in settings.values()})

    total = variants(keys)
    if total < len(settings):
        return {name: [name[-8:]] for name in settings}
    for key in sorted(keys, key=lambda key: key.startswith("method.")):
        others = [other for other in keys if other != key]
        keys = others if variants(others) == total else keys
    for key in keys:
        counts = Counter(flat.get(key) for flat in settings.values()).most_common()
        usual = counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else None
        last = key.rpartition(".")[2]
        shown = last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key.removeprefix("method.")
        for name, flat in settings.items():
            value = flat.get(key)
            if value != usual:
                # In place of a file's path stands the digest of its content.
                is_file = value and len(counts) == 2 and _DIGEST.fullmatch(value) and {*dict(counts)} == {None, value}
                words[name].append(f"with {shown}" if is_file else f"{shown} {_WORDS.get(value, value)}")
    return words


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | None]:
    flat: dict[str, str | None] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = None if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return flat


def _detector_label(detector: DetectorResults, others: Sequence[DetectorResults]) -> str:
    """Its title, and the settings in which others of its model, prompts and title differ."""
    spec = detector.spec
    alike = [d.spec for d in others if d.compared_with == detector.compared_with and d.spec.title == spec.title]
    own: Mapping[str, Any] = spec.settings["detector"]
    differing = [key for key in own if any(other.settings["detector"].get(key) != own[key] for other in alike)]
    words = [f"{key} {'all' if own[key] is None else own[key]}" for key in differing]
    if len(alike) > 1 and not words:
        words = [spec.detector or ""]  # two files of equal settings
    return ", ".join([spec.title, *words])
