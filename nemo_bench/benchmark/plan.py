"""From settings to cells, the units of work, and to everything that they need from outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_bench.config import CellConfig, ModelSettings, PromptSettings, RunSettings, build, resolve
from nemo_bench.config.composition import name_of_files
from nemo_bench.diffusion import FAMILIES, Lora, Similarity, Source, pipeline_class_of
from nemo_bench.errors import ConfigError, ModelError, NemoBenchError, StoreError, counted, first_line
from nemo_bench.localization import is_readable, read_statistics
from nemo_bench.methods import Deletion, FittedMethod, LocalizedNeurons, Method
from nemo_bench.metrics import FIELDS, BenchMetric
from nemo_bench.prompts import read_prompts, references_digest, with_originals
from nemo_bench.records import schema
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.io import as_json, check_writable, digest, is_whole, prompts_digest, read_file
from nemo_bench.records.schema import ImageRecord, LocalizationRecord, PromptRecord, ScoreRecord, Spec
from nemo_bench.records.store import Store, read_spec
from nemo_bench.records.truth import read_truth, truth_digest

if TYPE_CHECKING:
    from nemo_bench.benchmark.stages.audit import Search, SearchSettings
    from nemo_bench.detectors import Detector

SCORING_FILE = "scoring.json"
STATISTICS = "statistics.pt"
"""Activation statistics in a calibration's folder, in the published form."""
THRESHOLD = "threshold.json"
"""The memorization threshold in a calibration's folder, with the numbers it comes from."""
UNMITIGATED = {"_target_": "nemo_bench.methods.NoMitigation"}
"""Settings of a method that does nothing."""
FIRST = 3
"""Prompts of a file that a dry run shows, to see whether it is the right one, read as it was meant."""


@dataclass(frozen=True)
class Need:
    """Something that a run takes from outside."""

    #: ``"weights"``, ``"metric"``, ``"truth"``, ``"statistics"``, ``"prompts"``, ``"prompts of edits"``,
    #: ``"general prompts"``, ``"controls"``, ``"training"``, ``"method's file"``, ``"method"``,
    #: ``"training images"`` or ``"prompts to localize"``.
    kind: str
    what: str  #: File, folder, hub id, or name of a metric.
    #: ``"there"``; ``"fetched"``, by its library at the first use; ``"partly"``, the run goes on without the rest;
    #: ``"missing"``, the run would stop.
    state: Literal["there", "fetched", "partly", "missing"]
    note: str = ""  #: What it holds, or what is wrong and what to do.


@dataclass(eq=False, kw_only=True)
class Cell:
    """The unit of work: a model, a method or detector, and prompts; owner of one results folder."""

    config: CellConfig
    prompts: list[Prompt]
    spec: Spec  #: What the cell is, as written to ``spec.json``; ``spec.task`` is the task that it serves.
    store: Store
    method: Method | None = None  #: The mitigation as configured; not set up.
    detector: Detector | None = None
    unmitigated: Store | None = None  #: Folder of the same images without mitigation, asked for or finished before.
    calibration: Store | None = None
    calibration_prompts: list[Prompt] = field(default_factory=list)  #: General prompts, none if nothing is measured.
    measured: list[str] = field(default_factory=list)  #: Files of the calibration that the method can't do without.
    source: Cell | None = None  #: The cell whose localization this one starts from; it need not have been asked for.
    source_prompts: list[Prompt] = field(default_factory=list)  #: Prompts of the source that count.
    #: Pictures by prompt id whose training loss is measured; none where it is not.
    loss_pictures: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    audit: SearchSettings | None = None  #: How it is audited, if it is.
    searches: Sequence[Search] = ()  #: Of the audit: each memorized prompt's, followed by its control.

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.store.folder.name

    @property
    def is_mitigated(self) -> bool:
        """Whether there is any mitigation."""
        return bool(self.spec.settings["method"] != UNMITIGATED)

    @property
    def originals(self) -> list[Prompt]:
        """Its prompts without variants: those that methods are fitted to, and neurons localized for."""
        return [prompt for prompt in self.prompts if not prompt.axis]

    @property
    def localizes(self) -> bool:
        """Whether neurons are localized for its prompts."""
        return LocalizationRecord.stage in self.spec.stages

    @property
    def fitted(self) -> Store | None:
        """Folder of the weights that the method fits, None where it fits none."""
        return Store((self.store.folder / self.spec.fitted).resolve()) if self.spec.fitted else None

    @property
    def stages(self) -> list[type[schema.Record]]:
        """Records of its stages, in their order."""
        return [kind for kind in schema.RECORDS if kind.stage in self.spec.stages]

    @property
    def losses(self) -> dict[str, Any]:
        """Which training losses are measured, as :func:`.stages.memorization.measure_memorization` takes it."""
        return {"draws": self.config.settings.loss_draws, "pictures": self.loss_pictures}

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


def plan(configs: Sequence[CellConfig]) -> list[Cell]:
    """Makes the cells that were asked for, each folder once; no model is loaded and nothing written.

    Raises:
        NemoBenchError: Settings are wrong, or something that the run needs is missing; all that is missing is named.
    """
    planner = Planner()
    cells = planner.plan(configs)
    planner.check()
    return cells


def check_same(configs: Sequence[CellConfig], *keys: str) -> None:
    """Raises ConfigError where settings differ that a run has once."""
    for key in keys:
        if any(getattr(c.settings, key) != getattr(configs[0].settings, key) for c in configs):
            raise ConfigError(f"{key} must be the same for all cells of a run; give one value, or run twice")


class Planner:
    """Makes cells as far as they can be counted, and notes everything that they need; each thing is looked at once."""

    def __init__(self) -> None:
        self.needs: dict[tuple[str, str], Need] = {}  # by kind and name
        self.counted: list[CellConfig] = []  # those of which there are cells
        self._errors: list[NemoBenchError] = []
        self._prompts: dict[str, list[Prompt]] = {}
        self._has_metrics: dict[tuple[str, str], bool] = {}  # by name and node
        self._checked: set[str] = set()  # metrics with prompts
        self._sources: dict[str, Source] = {}  # by settings of the model, as what follows
        self._weights: dict[str, str] = {}
        self._source_cells: dict[str, Cell | None] = {}  # by config
        self._schedules: set[tuple[Any, ...]] = set()  # those that were checked

    def plan(self, configs: Sequence[CellConfig]) -> list[Cell]:
        """Makes cells, each folder once.

        Raises:
            NemoBenchError: Settings are wrong; what is merely missing is in ``needs``.
        """
        settings = configs[0].settings
        if any(config.settings.detector is not None for config in configs):
            raise ConfigError("detectors are run by nemo-bench detect; leave out detector=...")
        if any(config.settings.localizer is not None for config in configs):
            raise ConfigError("localizers are run by nemo-bench localize; leave out localizer=...")
        check_same(configs, "name", "root", "trainer", "logger", "launcher")
        check_writable(Path(settings.root) / settings.name)
        asked: dict[str, Cell] = {}
        for config in configs:
            cell = None
            try:
                cell = self._cell(config)
            except NemoBenchError as error:
                names = config.names
                self._miss("method", f"{names['method']} on {names['model']}, {names['prompts']}", error)
            if cell is None:
                self.metrics(config.settings)  # so that all that is missing is named at once
                continue
            self.counted.append(config)
            if asked.setdefault(cell.id, cell).config.settings != cell.config.settings:
                msg = f"two cells of the grid share the folder {cell.id}: what differs does not change images"
                raise ConfigError(f"{msg}; run twice")
        known = list(asked.values())
        pair(known, Path(settings.root) / settings.name)
        alike: dict[str, list[Cell]] = {}
        for cell in known:
            alike.setdefault(cell.localization, []).append(cell)
        for cell in known:  # sources are added to it, which may have sources of their own
            if cell.source:
                others = alike.setdefault(cell.source.localization, [])
                serving = next((other for other in others if _serves(other, cell.source)), None)
                if serving is None:
                    known.append(cell.source)
                    others.append(cell.source)
                else:
                    cell.source = serving
        for cell in known:
            if cell.source:
                cell.spec = cell.spec.model_copy(update={"source": cell.source.id})
        for cell in asked.values():
            if not has_current_scores(cell):
                settings = replace(cell.config.settings, metrics=self.metrics(cell.config.settings))
                cell.config = replace(cell.config, settings=settings)
        return list(asked.values())

    def check(self) -> None:
        """Raises an error of the first kind that was met where something is missing; all of it is named."""
        lacking: dict[tuple[str, str], list[str]] = {}
        for need in self.needs.values():
            if need.state == "missing":
                lacking.setdefault((need.kind, need.note), []).append(need.what)
        lines = [f"{kind} {', '.join(whats)}: {note}" for (kind, note), whats in lacking.items()]
        if metrics := [what.split()[0] for (kind, _), whats in lacking.items() if kind == "metric" for what in whats]:
            lines.append(" ".join(["without these metrics:", *(f"'~metrics.{name}'" for name in metrics)]))
        if lines:
            message = "\n  ".join(["what the run needs is missing, nothing was started", *lines])
            raise type(self._errors[0])(message)

    def first_prompts(self, configs: Sequence[CellConfig]) -> dict[str, dict[str, Any]]:
        """By file that can be read: number of prompts ``taken``, ``of`` how many, and the ``first`` of them."""
        shown = {}
        for settings in (config.settings.prompts for config in configs):
            for file in settings.files:
                with suppress(NemoBenchError):
                    prompts = self._read(file, settings)
                    taken = prompts[: settings.limit]
                    first = [{"id": prompt.id, "text": prompt.text} for prompt in taken[:FIRST]]
                    shown[file] = {"taken": len(taken), "of": len(prompts), "first": first}
        return shown

    def metrics(self, settings: RunSettings) -> dict[str, Any]:
        """Nodes of the metrics that lack nothing."""
        for name, node in settings.metrics.items():
            if (name, repr(node)) not in self._has_metrics:
                self._has_metrics[name, repr(node)] = self._has_metric(name, node)
        return {name: node for name, node in settings.metrics.items() if self._has_metrics[name, repr(node)]}

    def _has_metric(self, name: str, node: Mapping[str, Any]) -> bool:
        metric: BenchMetric = build(node, f"metrics.{name}")
        if not metric.needs <= FIELDS:
            needed, known = (", ".join(sorted(those)) for those in (metric.needs, FIELDS))
            raise ConfigError(f"metrics.{name}: it needs {needed}; expected some of {known}")
        fetched = "its weights, from the hub before the first image"
        what = f"{name} ({metric.title})"
        return self._look("metric", what, metric.check, lambda: metric.space.is_fetched, fetched)

    def check_prompts(self, settings: RunSettings, prompts: Sequence[Prompt], size: tuple[int, int] | None) -> None:
        """Looks at the files that metrics have of prompts, such as masks; ``size`` is that of images, where known."""
        for name, node in self.metrics(settings).items():
            key = digest([name, node, [prompt.id for prompt in prompts], size])
            if key in self._checked:
                continue
            self._checked.add(key)
            metric: BenchMetric = build(node, f"metrics.{name}")
            try:
                metric.check_prompts(prompts, size)
            except NemoBenchError as error:
                self._miss("metric", f"{name} ({metric.title}) for {', '.join(settings.prompts.files)}", error)

    def _look(
        self,
        kind: str,
        what: str,
        look: Callable[[], object],
        is_there: Callable[[], bool] = lambda: True,
        fetched: str = "",
    ) -> bool:
        """Looks at something that is needed, once, and says whether the run can do with it.

        ``look`` raises NemoBenchError where it is missing, and may give a note of what is there; ``fetched`` is the
        note of what is yet to be fetched.
        """
        if (kind, what) not in self.needs:
            try:
                answer = look()
                note = answer if isinstance(answer, str) else ""
                need = Need(kind, what, "there", note) if is_there() else Need(kind, what, "fetched", fetched)
                self.needs[kind, what] = need
            except NemoBenchError as error:
                self._miss(kind, what, error)
        return self.needs[kind, what].state != "missing"

    def _miss(self, kind: str, what: str, error: NemoBenchError) -> None:
        self._errors.append(error)
        # What it is of stands beside it, and what lacks the same for the same reason is named together.
        note = str(error).removeprefix(f"model '{what}': ").removeprefix(f"{what}: ")
        self.needs[kind, what] = Need(kind, what, "missing", note)

    def _cell(self, config: CellConfig, kind: type[PromptRecord] = ImageRecord) -> Cell | None:
        """The cell of a config, with those of its sources; None where any file that it needs is missing.

        ``kind`` are the last records that the model makes for it: of a source those of its localization.
        """
        settings, model, listed = config.settings, config.settings.model, config.settings.prompts
        method: Method = build(settings.method, "method")
        recipe = partial(_read_recipe, model)
        if model.training and not self._look("training", model.training, lambda: f"variant={recipe().get('variant')}"):
            return None
        source = self._sources.setdefault(repr(model), source_of(model))
        what = f"{source.path} with {source.lora.path}" if source.lora else source.path
        fetched = "some gigabytes, from the hub at the first use"
        has_weights = self._look("weights", what, source.check, lambda: source.is_downloaded, fetched)
        if has_weights:
            source.family.chosen(model.layers)
        # A method that the model can't have is said before gigabytes are fetched for it.
        if pipeline_class := source.family.pipeline_class if has_weights else pipeline_class_of(model.family):
            method.check(pipeline_class, model.guidance, model.dtype, compiled=model.compiled)
            if model.compiled and FAMILIES[pipeline_class].joint and any(m.needs_calibration for m in lineage(method)):
                raise ModelError(
                    f"model.compiled=true: {method.title} needs activations, which in a {pipeline_class} are those of "
                    "passes, and a compiled network can't be looked into; set model.compiled=false"
                )
        edits = listed.shared_from if any(m.pools for m in lineage(method)) else []
        measured = to_measure(method, model)
        if not self._has_files(config, method, edits, measured):
            return None
        prompts = read_listed(listed, self._read)
        self.check_prompts(settings, prompts, source.image_size if has_weights else None)
        general = self._general(listed)[: listed.calibration_limit] if measured else []
        if has_weights and repr(model) not in self._weights:
            self._weights[repr(model)] = source.digest()
        calibration = _calibration_identity(settings, method, general, self._weights.get(repr(model), "missing"))
        identity = _identity(settings, method, prompts, calibration)
        pictures = self._loss_pictures(settings, prompts)
        if settings.loss_draws:
            pictured = [p._replace(references=pictures[p.id]) for p in prompts if p.id in pictures]
            identity["loss"] = {"draws": settings.loss_draws, "pictures": references_digest(pictured)}
        if edits:
            unmarked = replace(listed, files=edits, memorized=[])
            identity["shared_from"] = prompts_digest(read_listed(unmarked, self._read))
        calibration_folder = f"{config.names.get('model', 'model')}__{digest(calibration, 8)}"
        commit = {"commit": source.commit} if has_weights and source.commit else {}
        localizing = [LocalizationRecord] if method.localizes else []
        spec = make_spec(
            config,
            "benchmark",
            [*localizing, schema.MemorizationRecord, ImageRecord, ScoreRecord],
            identity,
            title=method.title,
            digests={"prompts": identity["prompts"], "model": calibration["weights"], **commit},
            citations={m.title: m.citation for m in lineage(method)},
            training=recipe() if model.training else None,
            calibration=f"../../calibration/{calibration_folder}" if THRESHOLD in measured else None,
            general_prompts={"file": listed.calibration, "digest": calibration["prompts"]} if measured else None,
            measures=source.family.measures if has_weights else "",
            fitted=_fitted_folder(config, prompts, identity) if isinstance(method, FittedMethod) else None,
        )
        root = Path(settings.root)
        cell = Cell(
            config=config,
            method=method,
            prompts=prompts,
            calibration_prompts=general,
            spec=spec,
            store=Store(root / settings.name / spec.cell),
            calibration=Store(root / "calibration" / calibration_folder),
            measured=measured,
            loss_pictures=pictures,
        )
        if has_weights and not cell.store.is_done(kind):
            predicts = any(
                "guidance" in m.needs or m.makes_passes or m.needs_calibration or isinstance(m, FittedMethod)
                for m in lineage(method)
            )
            for each in lineage(method):
                each.check_tokenizer(source.tokenizer)
            if (key := (repr(model), predicts)) not in self._schedules:
                check_scheduler(source, model, predicts=predicts)
                self._schedules.add(key)
            if size := source.latent_size:
                check_similarity(size, model, method)
        if isinstance(method, LocalizedNeurons):
            self._note_lacking(method, prompts, f"{method.title} on {config.names['model']}, {config.names['prompts']}")
        if method.source:
            self._set_source(cell, method)
        return cell

    def _has_files(self, config: CellConfig, method: Method, edits: Sequence[str], measured: Sequence[str]) -> bool:
        """Looks at all files of a cell but the weights."""
        settings, listed = config.settings, config.settings.prompts
        found = [self._look("prompts", file, partial(self._note_prompts, file, listed)) for file in listed.files]
        if all(found):
            prompts = read_listed(listed, self._read)
            self._note_training_images(prompts, ", ".join(listed.files))
            if file := settings.method.get("file"):
                found.append(self._look("method's file", file, partial(method.fingerprint, prompts)))
        if settings.loss_draws and (controls := listed.controls):
            found.append(self._look("controls", controls, partial(self._note_prompts, controls, listed)))
        if truth := settings.model.truth:
            found.append(self._look("truth", truth, lambda: f"of {counted(len(truth_of(settings.model)), 'prompt')}"))
        if statistics := settings.model.statistics:
            path = resolve(statistics)
            found.append(self._look("statistics", path, partial(read_statistics, Path(path))))
        found += [self._look("prompts of edits", file, partial(self._note_prompts, file, listed)) for file in edits]
        if measured:
            general = listed.calibration or f"for method={config.names['method']}"
            found.append(self._look("general prompts", general, partial(self._note_general, config)))
        return all(found)

    def _set_source(self, cell: Cell, method: Method) -> None:
        """Gives a cell the cell of its source, with the prompts whose neurons the method takes."""
        settings, prompts = cell.config.settings, cell.config.settings.prompts
        own = cell.config.names["method"]
        name = f"{own}_neurons" if isinstance(method, Deletion) else type(method.source).__name__.lower()
        names = {**cell.config.names, "method": name}
        if method.pools and prompts.shared_from:
            names["prompts"] = name_of_files(prompts.shared_from)
            prompts = replace(prompts, files=prompts.shared_from, memorized=prompts.shared_from, shared_from=[])
        settings = replace(settings, method=settings.method["source"], prompts=prompts)
        config = CellConfig(names, settings)
        if (key := repr(config)) not in self._source_cells:
            self._source_cells[key] = self._cell(config, LocalizationRecord)
        cell.source = self._source_cells[key]
        if cell.source is not None:
            cell.source_prompts = cell.source.prompts
            method.check_source(cell.prompts, cell.source.prompts)

    def _read(self, file: str, settings: PromptSettings) -> list[Prompt]:
        """All prompts of a file, read once."""
        key = digest([file, settings.references, file in settings.memorized])
        if key not in self._prompts:
            self._prompts[key] = read_list(file, settings)
        return self._prompts[key]

    def _loss_pictures(self, settings: RunSettings, prompts: Sequence[Prompt]) -> dict[str, tuple[Path, ...]]:
        """Training images of the prompts, and held-out pictures of those that are not memorized."""
        if not settings.loss_draws:
            return {}
        controls = settings.prompts.controls
        plain = replace(settings.prompts, references=None, memorized=[])
        held_out = {p.text: p.references for p in self._read(controls, plain)} if controls else {}
        pictures = {p.id: p.references if p.kind or p.axis else held_out.get(p.text, ()) for p in prompts}
        return {prompt: files for prompt, files in pictures.items() if files}

    def _general(self, settings: PromptSettings) -> list[Prompt]:
        """All general prompts, none where no file is named."""
        plain = replace(settings, references=None, memorized=[])
        return self._read(settings.calibration, plain) if settings.calibration else []

    def _note_prompts(self, file: str, settings: PromptSettings) -> str:
        return counted(len(self._read(file, settings)), "prompt")

    def _note_general(self, config: CellConfig) -> str:
        settings = config.settings.prompts
        count = len(self._general(settings))
        if count < 2:
            raise ConfigError(
                f"method={config.names['method']} needs general prompts, at least 2, given {count}: set "
                "prompts.calibration to a file of prompts that are not memorized, hundreds or more: for Stable "
                "Diffusion additional_laion_prompts.csv in the folder prompts/ of "
                "https://github.com/ml-research/localizing_memorization_in_diffusion_models, for the embedded model "
                "package:planted/prompts/calibration.txt; or give both model.statistics and the method's threshold"
            )
        note = counted(count, "prompt")
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

    def _note_lacking(self, method: LocalizedNeurons, prompts: Sequence[Prompt], what: str) -> None:
        searched = [prompt for prompt in prompts if prompt.kind] or list(prompts)
        if lacking := method.lacking(searched):
            why = next(iter(lacking.values()))
            note = f"{len(lacking)} of {len(searched)} can't be localized, and have no images: {why}"
            self.needs["prompts to localize", what] = Need("prompts to localize", what, "partly", note)


def _fitted_folder(config: CellConfig, prompts: Sequence[Prompt], identity: Mapping[str, Any]) -> str:
    """Folder of the weights that a method fits, from the cell's; its name has everything that changes them."""
    memorized = prompts_digest([prompt for prompt in prompts if prompt.kind])
    key = digest([identity["model"], identity["method"], memorized], 8)
    names = [config.names.get(group, group) for group in ("model", "method")]
    return "/".join(["../../fitted", "__".join([*names, key])])


def make_spec(
    config: CellConfig,
    task: schema.Task,
    kinds: Sequence[type[PromptRecord]],
    identity: dict[str, Any],
    citations: Mapping[str, str],
    **about: Any,
) -> Spec:
    """What a cell is: its stages, and the names and identity settings that its folder is named by."""
    subject = "detector" if task == "detect" else "method"
    names: dict[str, Any] = {group: config.names.get(group, group) for group in ("model", subject, "prompts")}
    return Spec(
        task=task,
        stages=[kind.stage for kind in kinds],
        cell="__".join([*names.values(), digest(identity, 8)]),
        settings=identity,
        families=[str(family) for family in config.families],
        citations={title: citation for title, citation in citations.items() if citation},
        **names,
        **about,
    )


def _calibration_identity(
    settings: RunSettings, method: Method, general: Sequence[Prompt], weights: str
) -> dict[str, Any]:
    """Everything that changes a calibration."""
    model = settings.model
    given = read_statistics(Path(resolve(model.statistics))) if model.statistics else None
    return {
        "weights": weights,
        "dtype": model.dtype,
        "layers": model.layers,
        "similarity": asdict(model.similarity),
        **family_settings(model),
        "statistics": digest([[v.tolist() for v in side] for side in given]) if given else None,
        "seeds": settings.localize_seeds,
        "prompts": prompts_digest(general),
        "protocol": next((m.noise_protocol.of_threshold for m in lineage(method) if m.needs_calibration), None),
    }


def _identity(
    settings: RunSettings, method: Method, prompts: Sequence[Prompt], calibration: Mapping[str, Any]
) -> dict[str, Any]:
    """The identity settings of a cell: everything that changes its result, and nothing else."""
    network = {key: calibration[key] for key in ("weights", "dtype", "layers", "similarity")}
    network |= family_settings(settings.model)
    return {
        "model": {**network, "steps": settings.model.steps, "guidance": settings.model.guidance},
        "method": identity_settings(settings.method, method, prompts),
        "prompts": prompts_digest(prompts),
        "calibration": digest(calibration) if any(m.needs_calibration for m in lineage(method)) else None,
        "seeds": settings.seeds,
        "localize_seeds": settings.localize_seeds,
    }


def pair(cells: Sequence[Cell], run: Path) -> None:
    """Gives each cell with a mitigation the images of the same prompts, seeds and model without, where there are any.

    They are of the first such cell of these or else, in the folder of the run, the latest whose images are all there.
    """
    mitigated = {cell: _unmitigated_identity(cell.spec) for cell in cells if cell.is_mitigated}
    found: dict[str, Store] = {}
    for cell in cells:
        if not cell.is_mitigated:
            found.setdefault(_unmitigated_identity(cell.spec), cell.store)
    if not found.keys() >= set(mitigated.values()):
        done = run.glob(f"*/{ImageRecord.stage}.done")
        for path in sorted(done, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            with suppress(StoreError):  # it is named where that cell is read
                other = read_spec(path.parent)
                if other.settings.get("method") == UNMITIGATED:
                    found.setdefault(_unmitigated_identity(other), Store(path.parent))
    for cell, identity in mitigated.items():
        cell.unmitigated = found.get(identity)


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


def read_listed(
    settings: PromptSettings, read: Callable[[str, PromptSettings], Sequence[Prompt]] | None = None
) -> list[Prompt]:
    """Reads the prompts that are benchmarked: of each file the first ones, as many as the settings allow.

    With such a limit, variants of prompts that are beyond it are left out.

    Raises:
        NemoBenchError: A file can't be read, two have a prompt of the same id, or a variant varies none of the prompts.
    """
    read = read or partial(read_list, limit=settings.limit)
    by_id: dict[str, Prompt] = {}
    for prompt in (prompt for file in settings.files for prompt in read(file, settings)[: settings.limit]):
        if prompt.id in by_id:
            raise ConfigError(f"prompts.files={settings.files}: two files have a prompt with id '{prompt.id}'")
        by_id[prompt.id] = prompt
    prompts = list(by_id.values())
    if settings.limit:
        prompts = [prompt for prompt in prompts if prompt.variant_of is None or prompt.variant_of in by_id]
    return with_originals(prompts)


def read_list(file: str, settings: PromptSettings, limit: int | None = None) -> list[Prompt]:
    """Reads a list of prompts as settings say; an error says where to get it."""
    folder = Path(resolve(settings.references)) if settings.references else None
    try:
        return read_prompts(resolve(file), references=folder, memorized=file in settings.memorized, limit=limit)
    except NemoBenchError as error:
        raise type(error)(f"{error} {settings.obtain}".rstrip()) from error


def check_metrics(
    settings: Iterable[RunSettings], prompts: Iterable[tuple[Sequence[Prompt], tuple[int, int] | None]] = ()
) -> None:
    """Raises NemoBenchError where one is no metric, or weights or files that some need are missing or wrong.

    ``prompts`` are those of each of the settings with width and height of their images, as far as these are known.
    """
    planner = Planner()
    for each, about in zip_longest(settings, prompts):
        planner.metrics(each)
        if about:
            planner.check_prompts(each, *about)
    planner.check()


def truth_of(settings: ModelSettings) -> dict[str, Neurons]:
    """The neurons that are known to memorize a prompt, by its id; none where the model has no file of them."""
    return read_truth(Path(resolve(settings.truth))) if settings.truth else {}


def _read_recipe(model: ModelSettings) -> dict[str, Any]:
    """The settings of the training by ``nemo-bench train`` that made a model, from its folder.

    Raises:
        ModelError: The folder holds no finished training.
    """
    folder = Path(resolve(str(model.training)))
    try:
        recipe = dict(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        msg = f"model.training={model.training}: recipe.json can't be read ({first_line(error)}), so it is no training"
        raise ModelError(f"{msg}; nemo-bench train out={model.training} variant=... makes one") from None
    if not (folder / "model" / "pipeline" / "model_index.json").is_file():
        raise ModelError(f"model.training={model.training} is not finished; its nemo-bench train goes on with it")
    return recipe


def check_similarity(size: Sequence[int], model: ModelSettings, method: Method) -> None:
    """Makes sure that noise differences can be compared: for a method, and for the memorization score of every cell.

    Raises:
        ConfigError: Latents of this height and width are too small for ``model.similarity``; the message has the values
            that fit.
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
    unet = resolve(settings.unet) if settings.unet else None
    own = tuple(family_settings(settings).items())
    return Source(resolve(settings.source), settings.revision, config, local, settings.variant, lora, unet, own)


def family_settings(model: ModelSettings) -> dict[str, Any]:
    """Settings that some families have, as far as they are given."""
    names = ("distilled_guidance", "tokens", "size")
    return {name: getattr(model, name) for name in names if getattr(model, name) is not None}


def check_scheduler(source: Source, model: ModelSettings, *, predicts: bool) -> None:
    """Raises ModelError where the scheduler can't serve, as far as its settings can be read before weights load."""
    if shipped := source.scheduler:
        source.family.check_schedule(shipped, model.steps, predicts=predicts, where=source.place)


def similarity_of(settings: ModelSettings) -> Similarity:
    """Window and scales with which noise differences are compared."""
    return Similarity(settings.similarity.sigma, tuple(settings.similarity.betas))


def scoring_of(cell: Cell) -> schema.Scoring:
    """What decides the scores of given images."""
    nodes = cell.config.settings.metrics
    metrics = metrics_of(cell)
    model = cell.config.settings.model
    compares = cell.localizes and any("truth" in metric.needs for metric in metrics.values())
    is_paired = cell.unmitigated and any("unmitigated" in metric.needs for metric in metrics.values())
    fingerprints = {name: {**nodes[name], **metric.fingerprint()} for name, metric in metrics.items()}
    return schema.Scoring(
        metrics=json.loads(as_json(fingerprints)),  # as it will be read again
        unmitigated=cell.unmitigated.folder.name if cell.unmitigated and is_paired else None,
        references=references_digest(cell.prompts),
        truth=truth_digest(truth_of(model), cell.prompts) if compares and model.truth else None,
    )


def has_current_scores(cell: Cell) -> bool:
    """Whether scores are finished and of the metrics asked for, so that nothing of these is needed any more."""
    try:
        return cell.store.is_done(ScoreRecord) and not has_stale_scores(cell)
    except (OSError, StoreError):  # a file that a metric reads is gone, or records are damaged
        return False


def has_stale_scores(cell: Cell) -> bool:
    """Whether scores are of other metrics or reference images, or some of them were lost.

    The scores of a prompt are written after those of its images, so no kill leaves the first without the others.
    """
    path = cell.store.folder / SCORING_FILE
    if not is_whole(path, schema.Scoring) or read_file(path, schema.Scoring) != scoring_of(cell):
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
    return is_whole(threshold, schema.Threshold)


def lineage(method: Method) -> list[Method]:
    """A method, its source, the source of that, and so on."""
    return [method, *(lineage(method.source) if method.source else [])]


def identity_settings(settings: dict[str, Any], method: Method, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The settings of a method with what they refer to, in place of where it is."""
    inside: dict[str, Any] = {}
    if method.source:
        inside["source"] = identity_settings(settings["source"], method.source, prompts)
    if isinstance(method, LocalizedNeurons):
        inside["localizer"] = {**settings["localizer"], **method.localizer.fingerprint(prompts)}
    return {**settings, **method.fingerprint(prompts), **inside}


def with_sources(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, and before them the sources that were not asked for, each before what starts from it."""
    sources: list[Cell] = []
    for cell in cells:
        while cell.source:
            cell = cell.source
            sources.insert(0, cell)
    asked = set(cells)
    return [*dict.fromkeys(source for source in sources if source not in asked), *cells]
