"""From settings to cells, the units of work, and to everything that they need from outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nemo_bench.config import CellConfig, ModelSettings, PromptSettings, RunSettings, build, resolve
from nemo_bench.config.composition import name_of_files
from nemo_bench.diffusion import Lora, Similarity, Source, check_schedule
from nemo_bench.errors import ConfigError, NemoBenchError, StoreError, counted
from nemo_bench.localization import is_readable, read_statistics
from nemo_bench.methods import Method
from nemo_bench.metrics import FIELDS, BenchMetric
from nemo_bench.prompts import read_prompts, references_digest
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import as_json, check_writable, digest, is_whole, prompts_digest, read_file
from nemo_bench.records.schema import (
    ImageRecord,
    LocalizationRecord,
    MemorizationRecord,
    PromptRecord,
    ScoreRecord,
    Scoring,
    Spec,
    Threshold,
)
from nemo_bench.records.store import Store, read_spec

if TYPE_CHECKING:
    from nemo_bench.benchmark.stages.audit import AuditSettings, Search
    from nemo_bench.detectors import Detector

T = TypeVar("T")

SCORING_FILE = "scoring.json"
STATISTICS = "statistics.pt"
"""Activation statistics in a calibration's folder, in the published form."""
THRESHOLD = "threshold.json"
"""The memorization threshold in a calibration's folder, with the numbers it comes from."""
GENERAL_PROMPTS = (
    "a file of prompts that are not memorized, hundreds or more: for Stable Diffusion additional_laion_prompts.csv in "
    "the folder prompts/ of https://github.com/ml-research/localizing_memorization_in_diffusion_models, for the "
    "embedded model package:planted/prompts/calibration.txt"
)
"""What a calibration takes, and where it is."""
UNMITIGATED = {"_target_": "nemo_bench.methods.NoMitigation"}
"""Settings of a method that does nothing."""
FIRST = 3
"""Prompts of a file that a dry run shows, to see whether it is the right one, read as it was meant."""


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
    state: Literal["there", "fetched", "partly", "missing"]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Files of a cell, read.

    Attributes:
        prompts: The prompts.
        calibration_prompts: General prompts for the calibration, none where nothing is measured.
        shared_prompts: Prompts whose neurons a method switches off for all prompts, where they are of other files.
        statistics: Given activation statistics, mean and standard deviation by layer.
        measured: Files of the calibration that are measured.
    """

    prompts: list[Prompt]
    calibration_prompts: list[Prompt]
    shared_prompts: list[Prompt] | None
    statistics: Any
    measured: list[str]


@dataclass(eq=False, kw_only=True)
class Cell:
    """The unit of work: a model, a method or detector, and prompts; owner of one results folder.

    Attributes:
        config: Names and settings.
        prompts: All prompts.
        spec: What the cell is, as written to ``spec.json``; ``spec.task`` is the task that it serves.
        store: Its folder.
        method: The mitigation as configured, where there is one.
        detector: The detector, for ``detect``.
        unmitigated: Folder of the same images without mitigation, asked for as well or finished before.
        calibration: Folder of the model's calibration.
        calibration_prompts: General prompts for the calibration, none where nothing is measured.
        measured: Files of the calibration that the method, or its source, can't do without.
        source: The cell whose localization this one starts from; it need not have been asked for.
        source_prompts: Those of its prompts that count.
        audit: How it is audited, if it is.
        searches: All searches of the audit: each memorized prompt's, followed by its control.
    """

    config: CellConfig
    prompts: list[Prompt]
    spec: Spec
    store: Store
    method: Method | None = None
    detector: Detector | None = None
    unmitigated: Store | None = None
    calibration: Store | None = None
    calibration_prompts: list[Prompt] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    source: Cell | None = None
    source_prompts: list[Prompt] = field(default_factory=list)
    audit: AuditSettings | None = None
    searches: Sequence[Search] = ()

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.store.folder.name

    @property
    def is_mitigated(self) -> bool:
        """Whether there is any mitigation."""
        return bool(self.spec.settings["method"] != UNMITIGATED)

    @property
    def stages(self) -> list[type[PromptRecord]]:
        """Records of the stages that it goes through, in their order."""
        kinds = (LocalizationRecord, MemorizationRecord, ImageRecord, ScoreRecord)
        return [kind for kind in kinds if kind.stage in self.spec.stages]

    @property
    def localization(self) -> str:
        """Hash of what decides a prompt's neurons, whatever the other prompts and its images."""
        settings = self.spec.settings
        model = {key: value for key, value in settings["model"].items() if key not in ("steps", "guidance")}
        return digest([model, *(settings[key] for key in ("method", "calibration", "localize_seeds"))])

    @property
    def is_calibrated(self) -> bool:
        """Whether nothing is left to be measured on general prompts."""
        is_there: dict[str, Callable[[Path], bool]] = {STATISTICS: is_readable, THRESHOLD: is_measured}
        return all(is_there[name](self.calibration_file(name)) for name in self.measured)

    def calibration_file(self, name: str) -> Path:
        """Path of a file of its calibration."""
        assert self.calibration is not None
        return self.calibration.folder / name


def check_one_run(configs: Sequence[CellConfig]) -> None:
    """Makes sure that cells can belong to one run, whose folder can be written to.

    Raises:
        NemoBenchError: They can't.
    """
    if any(config.settings.detector is not None for config in configs):
        raise ConfigError("detectors are run by nemo-bench detect; leave out detector=...")
    check_same(configs, "name", "root", "trainer", "logger")
    check_writable(Path(configs[0].settings.root) / configs[0].settings.name)


def check_same(configs: Sequence[CellConfig], *keys: str) -> None:
    """Raises ConfigError where settings differ that a run has once."""
    for key in keys:
        if any(getattr(c.settings, key) != getattr(configs[0].settings, key) for c in configs):
            raise ConfigError(f"{key} must be the same for all cells of a run; give one value, or run twice")


def plan(configs: Sequence[CellConfig]) -> list[Cell]:
    """Makes the cells that were asked for.

    Args:
        configs: What was asked for.

    Returns:
        Cells in the same order, each folder once; their prompt files are read and checked, no model is loaded and
        nothing written.

    Raises:
        NemoBenchError: Prompts, references or a model folder are not as they should be; the first that is met.
    """
    return Planner(strict=True).plan(configs)


class Planner:
    """Makes cells, and notes everything that they need; each thing is looked at once.

    Args:
        strict: Raise the first error. Else errors are noted in :attr:`needs`, and cells are made as far as they can be
            counted.

    Attributes:
        needs: By kind and name.
        counted: Configs of which there are cells, without metrics that lack something.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.needs: dict[tuple[str, str], Need] = {}
        self.counted: list[CellConfig] = []
        self._prompts: dict[str, list[Prompt]] = {}

    def plan(self, configs: Sequence[CellConfig]) -> list[Cell]:
        """Makes cells, each folder once.

        Raises:
            NemoBenchError: Settings are wrong or, if strict, anything else is.
        """
        check_one_run(configs)
        asked: dict[str, Cell] = {}
        for config in configs:
            cell = self._asked(config)
            if cell is None:
                self._metrics(config.settings)  # so that all that is missing is named at once
                continue
            self.counted.append(config)
            if asked.setdefault(cell.id, cell).config.settings != cell.config.settings:
                msg = f"two cells of the grid share the folder {cell.id}: what differs does not change images"
                raise ConfigError(f"{msg}; run twice")
        known = list(asked.values())
        for cell in asked.values():
            if cell.is_mitigated:
                cell.unmitigated = find_unmitigated(cell.spec, cell.store.folder.parent, asked.values())
        for cell in known:  # sources are added to it, which may have sources of their own
            if cell.source:
                serving = next((other for other in known if _serves(other, cell.source)), None)
                if serving is None:
                    known.append(cell.source)
                else:
                    cell.source = serving
        for cell in asked.values():
            if not has_current_scores(cell):
                self._check_metrics(cell)
        return list(asked.values())

    def check(self) -> None:
        """Makes sure that everything is there.

        Raises:
            NemoBenchError: Something is missing, all of it named.
        """
        lacking: dict[tuple[str, str], list[str]] = {}
        for need in self.needs.values():
            if need.state == "missing":
                lacking.setdefault((need.kind, need.note), []).append(need.what)
        lines = [f"{kind} {', '.join(whats)}: {note}" for (kind, note), whats in lacking.items()]
        if metrics := [what.split()[0] for (kind, _), whats in lacking.items() if kind == "metric" for what in whats]:
            lines.append(" ".join(["without these metrics:", *(f"'~metrics.{name}'" for name in metrics)]))
        if lines:
            raise NemoBenchError("\n  ".join(["what the run needs is missing, nothing was started", *lines]))

    def first_prompts(self, configs: Sequence[CellConfig]) -> dict[str, dict[str, Any]]:
        """By file that can be read: number of prompts ``taken``, ``of`` how many, and the ``first`` of them."""
        shown = {}
        for settings in (config.settings.prompts for config in configs):
            for file in settings.files:
                if not self._has("prompts", file):
                    continue
                prompts = self._read(file, settings)
                taken = prompts[: settings.limit]
                first = [{"id": prompt.id, "text": prompt.text} for prompt in taken[:FIRST]]
                shown[file] = {"taken": len(taken), "of": len(prompts), "first": first}
        return shown

    def _has(self, kind: str, what: str) -> bool:
        return (kind, what) in self.needs and self.needs[kind, what].state != "missing"

    def _look(self, kind: str, what: str, look: Callable[[], object]) -> bool:
        """Looks at something that is needed, once.

        Args:
            kind: See :class:`Need`.
            what: See :class:`Need`.
            look: Gives a :class:`Need`, a note of what is there, or anything else; raises NemoBenchError where the
                thing is missing.

        Returns:
            Whether the run can do with what is there.
        """
        key = (kind, what)
        if key not in self.needs:
            try:
                answer = look()
            except NemoBenchError as error:
                if self.strict:
                    raise
                answer = Need(kind, what, "missing", str(error))
            note = answer if isinstance(answer, str) else ""
            self.needs[key] = answer if isinstance(answer, Need) else Need(kind, what, "there", note)
        return self.needs[key].state != "missing"

    def _asked(self, config: CellConfig) -> Cell | None:
        """The cell that was asked for, with the cell of its source; None where it can't be made."""
        try:
            cell = self._cell(config)
            if cell is not None and cell.method is not None and cell.method.source:
                self._set_source(cell)
        except NemoBenchError as error:
            if self.strict:
                raise
            what = f"{config.names['method']} on {config.names['model']}, {config.names['prompts']}"
            self.needs["method", what] = Need("method", what, "missing", str(error))
            return None
        return cell

    def _cell(self, config: CellConfig) -> Cell | None:
        """The cell of a config; None where anything that it needs is missing."""
        model = config.settings.model
        method: Method = build(config.settings.method, "method")
        source = source_of(model)
        weights = f"{source.path} with {source.lora.path}" if source.lora else source.path
        has_weights = self._look("weights", weights, partial(_weights, source, weights))
        if has_weights:
            method.check(source.family.pipeline_class, model.guidance, model.dtype, compiled=model.compiled)
        inputs = self._inputs(config, method)
        if inputs is None:
            return None
        digests = {"model": source.digest() if has_weights else "missing"}
        if has_weights and source.commit:
            digests["commit"] = source.commit
        cell = make_cell(config, method, inputs, digests)
        if has_weights and not cell.store.is_done(ImageRecord):
            _check_model(source, model, method)
        return cell

    def _inputs(self, config: CellConfig, method: Method) -> Inputs | None:
        """The files of a cell, read; None where any of them is missing."""
        settings = config.settings
        listed = settings.prompts
        statistics = settings.model.statistics
        found = [self._look("prompts", file, partial(self._note_prompts, file, listed)) for file in listed.files]
        prompts = self._listed(listed.files, listed) if all(found) else []
        if all(found):
            self._note_training_images(prompts, ", ".join(listed.files))
            if file := settings.method.get("file"):
                found.append(self._look("method's file", file, partial(method.fingerprint, prompts)))
        if statistics:
            found.append(self._look("statistics", resolve(statistics), partial(read_given_statistics, statistics)))
        edits = listed.shared_from if is_pooled(method) else []
        found += [self._look("prompts of edits", file, partial(self._note_prompts, file, listed)) for file in edits]
        measured = to_measure(method, settings.model)
        if measured:
            general = listed.calibration or f"for method={config.names['method']}"
            found.append(self._look("general prompts", general, partial(self._note_general, config)))
        if not all(found):
            return None
        calibration_prompts = self._calibration_prompts(listed) if measured else []
        if measured:
            check_general(config.names["method"], calibration_prompts)
        return Inputs(
            prompts=prompts,
            calibration_prompts=calibration_prompts,
            shared_prompts=self._listed(edits, listed, memorized=False) if edits else None,
            statistics=read_given_statistics(statistics) if statistics else None,
            measured=measured,
        )

    def _set_source(self, cell: Cell) -> None:
        """Gives a cell the cell of its source, and so on, with the prompts whose neurons the method takes."""
        method = cell.method
        assert method is not None
        settings = cell.config.settings
        prompts = settings.prompts
        names = {**cell.config.names, "method": type(method.source).__name__.lower()}
        if method.pools and prompts.shared_from:
            names["prompts"] = name_of_files(prompts.shared_from)
            prompts = replace(prompts, files=prompts.shared_from, memorized=prompts.shared_from, shared_from=[])
        settings = replace(settings, method=settings.method["source"], prompts=prompts)
        cell.source = self._cell(CellConfig(names, settings))
        if cell.source is not None:
            cell.source_prompts = cell.source.prompts
            method.check_source(cell.prompts, cell.source.prompts)
            if cell.source.method is not None and cell.source.method.source:
                self._set_source(cell.source)

    def _check_metrics(self, cell: Cell) -> None:
        """Looks at the metrics of a cell; without raising, the cell goes on without metrics that lack something."""
        settings = cell.config.settings
        if self.strict:
            check_metrics(settings)
            return
        cell.config = replace(cell.config, settings=replace(settings, metrics=self._metrics(settings)))

    def _metrics(self, settings: RunSettings) -> dict[str, Any]:
        """Nodes of the metrics that lack nothing."""
        metrics = {}
        for name, node in settings.metrics.items():
            metric = _metric(name, node)
            what = f"{name} ({metric.title})"
            if self._look("metric", what, partial(_weights_of_metric, metric, what)):
                metrics[name] = node
        return metrics

    def _read(self, file: str, settings: PromptSettings, *, memorized: bool = True) -> list[Prompt]:
        """All prompts of a file, read once."""
        is_memorized = memorized and file in settings.memorized
        key = digest([file, settings.references, is_memorized])
        if key not in self._prompts:
            try:
                found = read_files([file], None, settings.references, [file] if is_memorized else [])
            except NemoBenchError as error:
                hint = f" {settings.obtain}" if settings.obtain else ""
                raise type(error)(f"{error}{hint}") from error
            self._prompts[key] = found
        return self._prompts[key]

    def _listed(self, files: Sequence[str], settings: PromptSettings, *, memorized: bool = True) -> list[Prompt]:
        """The first prompts of some files, as many of each as the settings allow."""
        prompts = [p for file in files for p in self._read(file, settings, memorized=memorized)[: settings.limit]]
        check_ids(files, prompts)
        return prompts

    def _calibration_prompts(self, settings: PromptSettings) -> list[Prompt]:
        unlinked = replace(settings, references=None)
        found = self._read(settings.calibration, unlinked, memorized=False) if settings.calibration else []
        return found[: settings.calibration_limit]

    def _note_prompts(self, file: str, settings: PromptSettings) -> str:
        return counted(len(self._read(file, settings)), "prompt")

    def _note_general(self, config: CellConfig) -> str:
        settings = config.settings.prompts
        if not settings.calibration:
            check_general(config.names["method"], [])
        note = counted(len(self._calibration_prompts(replace(settings, calibration_limit=None))), "prompt")
        if settings.calibration in settings.files:
            note += ", which are benchmarked too: give prompts.calibration a list of its own for results"
        return note

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


def make_cell(config: CellConfig, method: Method, inputs: Inputs, digests: Mapping[str, str]) -> Cell:
    """Makes a cell; its folder is named by its identity settings.

    Args:
        config: Names and settings.
        method: The mitigation.
        inputs: Its files.
        digests: Of the ``model``'s weights, and the ``commit`` of a model from the hub.
    """
    settings = config.settings
    calibration = _calibration_identity(settings, method, inputs, digests["model"])
    identity = _identity(settings, method, inputs, calibration)
    names = {group: config.names.get(group, group) for group in ("model", "method", "prompts")}
    folder = "__".join([*names.values(), digest(identity, 8)])
    calibration_folder = f"{names['model']}__{digest(calibration, 8)}"
    general = {"file": str(settings.prompts.calibration), "digest": str(calibration["prompts"])}
    spec = Spec(
        task="benchmark",
        stages=[
            *([LocalizationRecord.stage] if method.localizes else []),
            MemorizationRecord.stage,
            ImageRecord.stage,
            ScoreRecord.stage,
        ],
        cell=folder,
        model=names["model"],
        method=names["method"],
        prompts=names["prompts"],
        title=method.title,
        settings=identity,
        families=[str(family) for family in config.families],
        digests={"prompts": identity["prompts"], **digests},
        citations=_citations(method),
        calibration=f"../../calibration/{calibration_folder}" if THRESHOLD in inputs.measured else None,
        general_prompts=general if inputs.measured else None,
    )
    root = Path(settings.root)
    return Cell(
        config=config,
        method=method,
        prompts=inputs.prompts,
        calibration_prompts=inputs.calibration_prompts,
        spec=spec,
        store=Store(root / settings.name / folder),
        calibration=Store(root / "calibration" / calibration_folder),
        measured=inputs.measured,
    )


def _calibration_identity(settings: RunSettings, method: Method, inputs: Inputs, weights: str) -> dict[str, Any]:
    """Everything that changes a calibration."""
    given = inputs.statistics
    return {
        "weights": weights,
        "dtype": settings.model.dtype,
        "layers": settings.model.layers,
        "similarity": asdict(settings.model.similarity),
        "statistics": digest([[v.tolist() for v in side] for side in given]) if given else None,
        "seeds": settings.localize_seeds,
        "prompts": prompts_digest(inputs.calibration_prompts),
        "protocol": next((m.noise_protocol.of_threshold for m in lineage(method) if m.needs_calibration), None),
    }


def _identity(settings: RunSettings, method: Method, inputs: Inputs, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The identity settings of a cell: everything that changes its result, and nothing else."""
    model = settings.model
    is_calibrated = any(m.needs_calibration for m in lineage(method))
    network = {key: calibration[key] for key in ("weights", "dtype", "layers", "similarity")}
    identity = {
        "model": {**network, "steps": model.steps, "guidance": model.guidance},
        "method": identity_settings(settings.method, method, inputs.prompts),
        "prompts": prompts_digest(inputs.prompts),
        "calibration": digest(calibration) if is_calibrated else None,
        "seeds": settings.seeds,
        "localize_seeds": settings.localize_seeds,
    }
    if inputs.shared_prompts is not None:
        identity["shared_from"] = prompts_digest(inputs.shared_prompts)
    return identity


def read_given_statistics(file: str) -> Any:
    """Reads activation statistics that settings name; see :func:`nemo_bench.localization.read_statistics`."""
    return read_statistics(Path(resolve(file)))


def _weights(source: Source, what: str) -> Need:
    source.check()
    if source.is_downloaded:
        return Need("weights", what, "there")
    return Need("weights", what, "fetched", "some gigabytes, from the hub at the first use")


def _weights_of_metric(metric: BenchMetric, what: str) -> Need:
    metric.check()
    if metric.space.is_fetched:
        return Need("metric", what, "there")
    return Need("metric", what, "fetched", "its weights, from the hub before the first image")


def _check_model(source: Source, model: ModelSettings, method: Method) -> None:
    """Makes sure that model and method go together, before weights load."""
    predicts = any("guidance" in m.needs or m.makes_passes or m.needs_calibration for m in lineage(method))
    check_scheduler(source, model, predicts=predicts)
    if size := source.latent_size:
        check_similarity(size, model, method)


def find_unmitigated(spec: Spec, run: Path, asked: Iterable[Cell] = ()) -> Store | None:
    """Finds the images of the same prompts, seeds and model without mitigation.

    Args:
        spec: Of the mitigated images.
        run: Folder of the run.
        asked: Cells that are asked for as well.

    Returns:
        The folder of a cell that was asked for, or else of the latest one whose images are all there.
    """
    wanted = _unmitigated_identity(spec)
    for cell in asked:
        if not cell.is_mitigated and _unmitigated_identity(cell.spec) == wanted:
            return cell.store
    done = sorted(run.glob(f"*/{ImageRecord.stage}.done"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in done:
        try:
            other = read_spec(path.parent)
        except StoreError:
            continue  # it is named where that cell is read
        if other.settings.get("method") == UNMITIGATED and _unmitigated_identity(other) == wanted:
            return Store(path.parent)
    return None


def _unmitigated_identity(spec: Spec) -> str:
    """Equal for cells whose images differ by the method alone."""
    of_method = ("method", "calibration", "images", "shared_from")
    return digest({key: value for key, value in spec.settings.items() if key not in of_method})


def _serves(cell: Cell, source: Cell) -> bool:
    """Whether a cell localizes the prompts of another one just as that would, though it may have more of them."""
    if cell.localization != source.localization:
        return False
    if cell.method is not None and cell.method.source and cell.prompts != source.prompts:
        return False
    texts = {prompt.id: prompt.text for prompt in cell.prompts}
    return all(texts.get(prompt.id) == prompt.text for prompt in source.prompts)


def read_listed(settings: PromptSettings) -> list[Prompt]:
    """Reads the prompts that are benchmarked.

    Raises:
        NemoBenchError: A file can't be read, or two have a prompt of the same id.
    """
    return read_files(settings.files, settings.limit, settings.references, settings.memorized)


def read_files(
    files: Sequence[str], limit: int | None = None, references: str | None = None, memorized: Sequence[str] = ()
) -> list[Prompt]:
    """Reads the prompts of several files.

    Args:
        files: Prompt files; ``package:`` stands for the folder of this package.
        limit: At most this many prompts per file.
        references: Folder that ``nemo-bench references`` filled.
        memorized: Those of the files whose prompts are memorized where no kind is annotated.

    Raises:
        NemoBenchError: A file can't be read, or two have a prompt of the same id.
    """
    folder = Path(resolve(references)) if references else None
    prompts = [
        p
        for file in files
        for p in read_prompts(resolve(file), references=folder, memorized=file in memorized, limit=limit)
    ]
    check_ids(files, prompts)
    return prompts


def check_ids(files: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError where two files have a prompt of the same id."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ConfigError(f"prompts.files={list(files)}: two files have a prompt with id '{prompt.id}'")
        seen.add(prompt.id)


def _metric(name: str, node: Mapping[str, Any]) -> BenchMetric:
    metric: BenchMetric = build(node, f"metrics.{name}")
    if not metric.needs <= FIELDS:
        needed, known = (", ".join(sorted(those)) for those in (metric.needs, FIELDS))
        raise ConfigError(f"metrics.{name}: it needs {needed}; expected some of {known}")
    return metric


def check_metrics(settings: RunSettings) -> None:
    """Makes sure that metrics can be computed, before anything loads.

    Raises:
        NemoBenchError: One is no metric, or weights or pictures that some need are missing; all of those are named.
    """
    lacking: dict[tuple[type[NemoBenchError], str], list[str]] = {}
    for name, node in settings.metrics.items():
        try:
            _metric(name, node).check()
        except NemoBenchError as error:
            lacking.setdefault((type(error), str(error)), []).append(f"metrics.{name}")
    if lacking:
        lines = [f"{', '.join(names)}: {message}" for (_, message), names in lacking.items()]
        without = " ".join(f"'~{name}'" for names in lacking.values() for name in names)
        raise next(kind for kind, _ in lacking)("\n".join([*lines, f"without: {without}"]))


def check_general(method: str, prompts: Sequence[Prompt]) -> None:
    """Makes sure that there are general prompts for a method's calibration.

    Raises:
        ConfigError: There are fewer than two.
    """
    if len(prompts) < 2:
        msg = f"method={method} needs general prompts, at least 2, given {len(prompts)}: set prompts.calibration"
        raise ConfigError(f"{msg} to {GENERAL_PROMPTS}; or give both model.statistics and the method's threshold")


def check_similarity(size: Sequence[int], model: ModelSettings, method: Method) -> None:
    """Makes sure that noise differences can be compared: for a method, and for the memorization score of every cell.

    Args:
        size: Height and width of a latent.
        model: Settings of the model.
        method: The mitigation.

    Raises:
        ConfigError: Its latents are too small for ``model.similarity``; the message has the values that fit.
    """
    searches = [each.noise_protocol.similarity for each in lineage(method) if each.needs_calibration]
    for measure in ("fixed", *searches):
        similarity_of(model).check(size, measure)


def source_of(settings: ModelSettings) -> Source:
    """Where the weights are; nothing is read."""
    config = resolve(settings.config) if settings.config else None
    local, lora = settings.local_files_only, None
    if settings.lora:
        lora = Lora(resolve(settings.lora), settings.lora_scale, local)
    return Source(resolve(settings.source), settings.revision, config, local, settings.variant, lora)


def check_scheduler(source: Source, model: ModelSettings, *, predicts: bool) -> None:
    """Looks whether the scheduler of a model can serve, where its settings can be read before weights load.

    Raises:
        ModelError: See :func:`nemo_bench.diffusion.check_schedule`.
    """
    if shipped := source.scheduler:
        check_schedule(shipped, model.steps, predicts=predicts, where=source.place)


def similarity_of(settings: ModelSettings) -> Similarity:
    """Window and scales with which noise differences are compared."""
    return Similarity(settings.similarity.sigma, tuple(settings.similarity.betas))


def scoring_of(cell: Cell) -> Scoring:
    """What decides the scores of given images."""
    nodes = cell.config.settings.metrics
    metrics = metrics_of(cell)
    is_paired = cell.unmitigated and any("unmitigated" in metric.needs for metric in metrics.values())
    fingerprints = {name: {**nodes[name], **metric.fingerprint()} for name, metric in metrics.items()}
    return Scoring(
        metrics=json.loads(as_json(fingerprints)),  # as it will be read again
        unmitigated=cell.unmitigated.folder.name if cell.unmitigated and is_paired else None,
        references=references_digest(cell.prompts),
    )


def has_current_scores(cell: Cell) -> bool:
    """Whether scores are finished and of the metrics asked for, so that nothing of these is needed any more."""
    try:
        return cell.store.is_done(ScoreRecord) and not has_stale_scores(cell)
    except OSError:  # a file that a metric reads is gone
        return False


def has_stale_scores(cell: Cell) -> bool:
    """Whether scores are of other metrics or reference images, or some of them were lost.

    The scores of a prompt are written after those of its images, so no kill leaves the first without the others.
    """
    path = cell.store.folder / SCORING_FILE
    if not is_whole(path, Scoring) or read_file(path, Scoring) != scoring_of(cell):
        return True
    scored = {(record.prompt, record.seed) for record in cell.store.records(ScoreRecord).values()}
    images = [(r.prompt, r.seed) for r in cell.store.records(ImageRecord).values() if r.image]
    return any((prompt, None) in scored and (prompt, seed) not in scored for prompt, seed in images)


def metrics_of(cell: Cell) -> dict[str, BenchMetric]:
    """The cell's metrics by name, in the order of the settings."""
    return {name: build(node, f"metrics.{name}") for name, node in cell.config.settings.metrics.items()}


def to_measure(method: Method, model: ModelSettings) -> list[str]:
    """What a method and its sources take from general prompts, since nobody gave it."""
    calibrated = [m for m in lineage(method) if m.needs_calibration]
    given = {STATISTICS: model.statistics is not None, THRESHOLD: not any(m.calibrates_threshold for m in calibrated)}
    return [name for name, present in given.items() if calibrated and not present]


def is_measured(threshold: Path) -> bool:
    """Whether a threshold's file is there and holds what it should; a threshold may be None in it."""
    return is_whole(threshold, Threshold)


def is_pooled(method: Method) -> bool:
    """Whether a method, or a source of it, does the same for all prompts by what was found for memorized ones."""
    return any(m.pools for m in lineage(method))


def lineage(method: Method) -> list[Method]:
    """A method, its source, the source of that, and so on."""
    return [method, *(lineage(method.source) if method.source else [])]


def identity_settings(settings: dict[str, Any], method: Method, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The settings of a method with what they refer to, in place of where it is."""
    source = {"source": identity_settings(settings["source"], method.source, prompts)} if method.source else {}
    return {**settings, **method.fingerprint(prompts), **source}


def _citations(method: Method) -> dict[str, str]:
    return {m.title: m.citation for m in lineage(method) if m.citation}


def with_sources(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, and before them the sources that were not asked for, each before what starts from it."""
    sources: list[Cell] = []
    for cell in cells:
        while cell.source:
            cell = cell.source
            sources.insert(0, cell)
    return [*dict.fromkeys(source for source in sources if source not in cells), *cells]
