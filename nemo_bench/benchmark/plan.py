"""From settings to cells, the units of work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from nemo_bench.config import (
    CellConfig,
    ModelSettings,
    PromptSettings,
    RunSettings,
    build,
    name_of_files,
    resolve,
    rows_at_once,
)
from nemo_bench.diffusion import Lora, Similarity, Source, check_schedule
from nemo_bench.errors import ConfigError, NemoBenchError
from nemo_bench.localization import is_readable, read_statistics
from nemo_bench.methods import Method
from nemo_bench.metrics import FIELDS, BenchMetric
from nemo_bench.prompts import prompts_digest, read_prompts
from nemo_bench.prompts.data import ImageTask, PromptTask
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import check_writable, digest, is_whole
from nemo_bench.records.store import Store

STAGES = ("localize", "generate", "score")
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


class Work(Protocol):
    """What owns a results folder: settings, prompts, what decides the result, and the folder."""

    config: CellConfig
    prompts: list[Prompt]
    spec: dict[str, Any]
    store: Store


@dataclass(eq=False, kw_only=True)
class ImageCell:
    """Images of some prompts, scored together; owner of one results folder.

    Attributes:
        config: Names and settings.
        prompts: All prompts.
        spec: What decides the result, as written to ``spec.json``.
        store: Its folder.
        unmitigated: The cell of the same images without mitigation: one that was asked for, or finished before.
    """

    config: CellConfig
    prompts: list[Prompt]
    spec: dict[str, Any]
    store: Store
    unmitigated: ImageCell | None = None

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.store.folder.name

    @property
    def is_mitigated(self) -> bool:
        """Whether there is any mitigation."""
        return bool(self.spec["settings"]["method"] != UNMITIGATED)

    @property
    def prompt_tasks(self) -> list[PromptTask]:
        """All prompts."""
        return [PromptTask.from_prompt(p) for p in self.prompts]


@dataclass(eq=False, kw_only=True)
class Cell(ImageCell):
    """A model, a method and prompts: the unit of work.

    Attributes:
        method: The mitigation.
        calibration_prompts: General prompts for what is measured, none where nothing is.
        calibration: Folder of the model's calibration.
        measured: Files in it that the method, or its source, can't do without.
        source: The cell whose localization this one starts from; it need not be one that was asked for.
        source_prompts: Those of its prompts that count.
    """

    method: Method
    calibration_prompts: list[Prompt]
    calibration: Store
    measured: list[str]
    source: Cell | None = None
    source_prompts: list[Prompt] = field(default_factory=list)

    @property
    def localization(self) -> str:
        """Hash of what decides what is found for a prompt, whatever the other prompts and its images."""
        settings = self.spec["settings"]
        model = {key: value for key, value in settings["model"].items() if key not in ("steps", "guidance")}
        return digest([model, *(settings[key] for key in ("method", "calibration", "localize_seeds"))])

    @property
    def is_calibrated(self) -> bool:
        """Whether nothing is left to be measured on general prompts."""
        is_there: dict[str, Callable[[Path], bool]] = {STATISTICS: is_readable, THRESHOLD: is_measured}
        return all(is_there[name](self.calibration.folder / name) for name in self.measured)

    @property
    def image_tasks(self) -> list[ImageTask]:
        """All images, prompt by prompt."""
        return [ImageTask.from_prompt(p, seed) for p in self.prompts for seed in range(self.config.settings.seeds)]

    def ids(self, stage: str) -> list[str]:
        """Record ids of a finished stage."""
        prompts, images = [t.id for t in self.prompt_tasks], [t.id for t in self.image_tasks]
        return {"localize": prompts, "generate": images, "score": prompts}[stage]


def check_one_run(configs: Sequence[CellConfig]) -> None:
    """Makes sure that some configs can be cells of one run, whose folder can be written to.

    Raises:
        NemoBenchError: They can't.
    """
    if any(config.settings.detector is not None for config in configs):
        raise ConfigError("detectors are run by nemo-bench detect; leave out detector=...")
    for key in ("name", "root", "trainer", "logger"):
        if any(getattr(c.settings, key) != getattr(configs[0].settings, key) for c in configs):
            raise ConfigError(f"{key} must be the same for all cells of a run; give one value, or run twice")
    check_writable(Path(configs[0].settings.root) / configs[0].settings.name)


def plan(configs: Sequence[CellConfig], weights: Mapping[Source, str] | None = None) -> list[Cell]:
    """Makes the cells that were asked for.

    Args:
        configs: What was asked for.
        weights: Digests of weights that are not looked at, for cells that are counted and never run.

    Returns:
        Cells in the same order, each folder once; their prompt files are read and checked, no model is loaded and
        nothing written.

    Raises:
        NemoBenchError: Prompts, references or a model folder are not as they should be.
    """
    check_one_run(configs)
    weights = weights or {}
    prompts: dict[str, list[Prompt]] = {}
    asked: dict[str, Cell] = {}
    for config in configs:
        cell = _cell(config, prompts, weights)
        if asked.setdefault(cell.id, cell).config.settings != config.settings:
            msg = f"two cells of the grid share the folder {cell.id}: what differs does not change images; run twice"
            raise ConfigError(msg)
    by_settings = {digest(cell.spec["settings"]): cell for cell in asked.values()}
    for cell in asked.values():
        cell.unmitigated = _unmitigated(cell, by_settings, prompts, weights)
    known = list(asked.values())
    for cell in known:
        if cell.method.source:
            source = _source(cell, prompts, weights)
            cell.source_prompts = source.prompts
            cell.method.check_source(cell.prompts, source.prompts)
            cell.source = next((other for other in known if _serves(other, source)), source)
            if cell.source is source:
                known.append(source)
    return list(asked.values())


def _source(cell: Cell, cache: dict[str, list[Prompt]], weights: Mapping[Source, str]) -> Cell:
    """The cell of a method's source, with the prompts whose neurons the method takes."""
    settings, names = cell.config.settings, {**cell.config.names, "method": type(cell.method.source).__name__.lower()}
    prompts = settings.prompts
    if cell.method.pools and prompts.shared_from:
        names["prompts"] = name_of_files(prompts.shared_from)
        prompts = replace(prompts, files=prompts.shared_from, memorized=prompts.shared_from, shared_from=[])
    settings = replace(settings, method=settings.method["source"], prompts=prompts)
    return _cell(CellConfig(names, settings), cache, weights)


def _serves(cell: Cell, source: Cell) -> bool:
    """Whether a cell localizes the prompts of another one just as that would, though it may have more of them."""
    if cell.localization != source.localization or (cell.method.source and cell.prompts != source.prompts):
        return False
    own = {prompt.id: prompt.text for prompt in cell.prompts}
    return all(own.get(prompt.id) == prompt.text for prompt in source.prompts)


def _unmitigated(
    cell: Cell, asked: Mapping[str, Cell], cache: dict[str, list[Prompt]], weights: Mapping[Source, str]
) -> Cell | None:
    if not cell.is_mitigated:
        return None
    settings = replace(cell.config.settings, method=UNMITIGATED)
    none = _cell(CellConfig({**cell.config.names, "method": "none"}, settings), cache, weights)
    found = asked.get(digest(none.spec["settings"]))
    return found or (none if none.store.is_done("generate") else None)


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
        limit: Take so many prompts of each file.
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
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ConfigError(f"prompts.files={list(files)}: two files have a prompt with id '{prompt.id}'")
        seen.add(prompt.id)
    return prompts


def _read(cache: dict[str, list[Prompt]], *arguments: Any) -> list[Prompt]:
    key = digest(arguments)
    if key not in cache:
        cache[key] = read_files(*arguments)
    return cache[key]


def _cell(config: CellConfig, cache: dict[str, list[Prompt]], weights: Mapping[Source, str]) -> Cell:
    settings = config.settings
    model = settings.model
    method: Method = build(settings.method, "method")
    method.batch_size = rows_at_once(settings)
    source = source_of(model)
    if source not in weights:
        source.check()
        method.check(source.family.pipeline.__name__, model.guidance, model.dtype, compiled=model.compiled)
        predicts = any("guidance" in m.needs or m.makes_passes or m.needs_calibration for m in _lineage(method))
        check_scheduler(source, model, predicts=predicts)
        if size := source.latent_size:
            check_similarity(size, model, method)
    check_metrics(settings)
    listed = settings.prompts
    prompts = _read(cache, listed.files, listed.limit, listed.references, listed.memorized)
    published = read_statistics(Path(resolve(model.statistics))) if model.statistics else None
    measured = to_measure(method, model)
    general = [listed.calibration] if measured and listed.calibration else []
    calibration_prompts = _read(cache, general, listed.calibration_limit)
    if measured:
        check_general(config.names["method"], calibration_prompts)
    commit = {"commit": source.commit} if source not in weights and source.commit else {}
    network = {
        "weights": weights.get(source) or source.digest(),
        "dtype": model.dtype,
        "layers": model.layers,
        "similarity": asdict(model.similarity),
    }
    calibration = {
        **network,
        "statistics": digest([[v.tolist() for v in side] for side in published]) if published else None,
        "seeds": settings.localize_seeds,
        "prompts": prompts_digest(calibration_prompts),
        "protocol": next((m.protocol.of_threshold for m in _lineage(method) if m.needs_calibration), None),
    }
    general_prompts = {"file": listed.calibration, "digest": calibration["prompts"]} if measured else None
    uses_calibration = any(m.needs_calibration for m in _lineage(method))
    identity = {
        "model": {**network, "steps": model.steps, "guidance": model.guidance},
        "method": identity_settings(settings.method, method, prompts),
        "prompts": prompts_digest(prompts),
        "calibration": digest(calibration) if uses_calibration else None,
        "seeds": settings.seeds,
        "localize_seeds": settings.localize_seeds,
    }
    if listed.shared_from and is_pooled(method):
        shared = _read(cache, listed.shared_from, listed.limit)
        identity["shared_from"] = prompts_digest(shared)
    names = [config.names.get(group, group) for group in ("model", "method", "prompts")]
    root = Path(settings.root)
    folder = "__".join([*names, digest(identity, 8)])
    calibration_folder = f"{names[0]}__{digest(calibration, 8)}"
    spec = {
        "cell": folder,
        "model": names[0],
        "method": names[1],
        "prompts": names[2],
        "title": method.title,
        "settings": identity,
        "families": [str(found) for found in config.families],
        "digests": {"model": network["weights"], "prompts": identity["prompts"], **commit},
        "citations": _citations(method),
        "calibration": f"../../calibration/{calibration_folder}" if THRESHOLD in measured else None,
        "general_prompts": general_prompts,
    }
    return Cell(
        config=config,
        method=method,
        prompts=prompts,
        calibration_prompts=calibration_prompts,
        spec=spec,
        store=Store(root / settings.name / folder),
        calibration=Store(root / "calibration" / calibration_folder),
        measured=measured,
    )


def check_metrics(settings: RunSettings) -> None:
    """Makes sure that metrics can be computed, before anything loads.

    Raises:
        NemoBenchError: One is no metric, or weights or pictures that some need are missing; all of those are named.
    """
    lacking: dict[tuple[type[NemoBenchError], str], list[str]] = {}
    for name, node in settings.metrics.items():
        metric: BenchMetric = build(node, f"metrics.{name}")
        if not metric.needs <= FIELDS:
            needed, known = (", ".join(sorted(those)) for those in (metric.needs, FIELDS))
            raise ConfigError(f"metrics.{name}: it needs {needed}; expected some of {known}")
        try:
            metric.check()
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
    searches = [each.protocol.similarity for each in _lineage(method) if each.needs_calibration]
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


def metrics_of(cell: ImageCell) -> dict[str, BenchMetric]:
    """The cell's metrics by name, in the order of the settings."""
    return {name: build(node, f"metrics.{name}") for name, node in cell.config.settings.metrics.items()}


def to_measure(method: Method, model: ModelSettings) -> list[str]:
    """What a method and its sources take from general prompts, since nobody gave it."""
    calibrated = [m for m in _lineage(method) if m.needs_calibration]
    given = {STATISTICS: model.statistics is not None, THRESHOLD: not any(m.calibrates_threshold for m in calibrated)}
    return [name for name, present in given.items() if calibrated and not present]


def is_measured(threshold: Path) -> bool:
    """Whether a threshold's file is there and holds what it should; a threshold may be None in it."""
    return is_whole(threshold, "threshold", "mean", "std", "maxima")


def is_pooled(method: Method) -> bool:
    """Whether a method, or a source of it, does the same for all prompts by what was found for memorized ones."""
    return any(m.pools for m in _lineage(method))


def _lineage(method: Method) -> list[Method]:
    """A method, its source, the source of that, and so on."""
    return [method, *(_lineage(method.source) if method.source else [])]


def identity_settings(settings: dict[str, Any], method: Method, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The settings of a method with what they refer to, in place of where it is."""
    source = {"source": identity_settings(settings["source"], method.source, prompts)} if method.source else {}
    return {**settings, **method.fingerprint(prompts), **source}


def _citations(method: Method) -> dict[str, str]:
    return {m.title: m.citation for m in _lineage(method) if m.citation}


def with_sources(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, and before them the sources that were not asked for, each before what starts from it."""
    sources: list[Cell] = []
    for cell in cells:
        while cell.source:
            cell = cell.source
            sources.insert(0, cell)
    return [*dict.fromkeys(source for source in sources if source not in cells), *cells]
