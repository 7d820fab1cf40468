"""Settings: YAML composed by Hydra, turned at once into typed, checked dataclasses.

Everything that can be wrong with settings is found here, before anything is loaded. Nothing else imports hydra.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import itertools
import math
import re
import shlex
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bench.errors import ConfigError, nearest

GROUPS = ("model", "method", "detector", "prompts", "metrics", "trainer", "logger", "experiment")
PLUGINS = "nemo_bench.conf"
"""Entry points of installed packages that bring YAML files of their own: ``name = "package.with.folders"``."""
DEFAULT_METHODS = "none,random,nemo"
"""What is compared where no method is named."""


@dataclass
class SimilaritySettings:
    """See :class:`nemo_bench.diffusion.Similarity`."""

    sigma: float = 1.5
    betas: list[float] = field(default_factory=lambda: [0.33, 0.33, 0.33])


@dataclass
class ModelSettings:
    """A model and how it is used.

    Attributes:
        source: Pipeline folder, hub id or ``.safetensors`` file; ``package:`` stands for the folder of this package.
        revision: Commit, tag or branch of a hub id.
        config: For a file, folder or hub id of a pipeline like it; a file holds weights alone.
        local_files_only: Never ask the hub.
        dtype: float32, float16 or bfloat16.
        compiled: Compile the UNet with torch.compile; changes results by rounding only.
        layers: Value layers that can be blocked, ``down+mid`` or ``all``.
        steps: DDIM steps.
        guidance: Scale of classifier-free guidance, 1 for none.
        similarity: How noise differences are compared.
        statistics: File of published activation statistics, in place of measured ones.
        clip: open_clip model that judges alignment and diversity.
        clip_pretrained: Its weights: tag or file.
        summary: One line for ``nemo-bench ls``.
        citation: Source.
    """

    source: str = MISSING
    revision: Optional[str] = None  # noqa: UP045 - OmegaConf reads the old form only
    config: Optional[str] = None  # noqa: UP045
    local_files_only: bool = False
    dtype: str = "float32"
    compiled: bool = False
    layers: str = "down+mid"
    steps: int = 50
    guidance: float = 7.0
    similarity: SimilaritySettings = field(default_factory=SimilaritySettings)
    statistics: Optional[str] = None  # noqa: UP045
    clip: str = "ViT-B-32"
    clip_pretrained: Optional[str] = "openai"  # noqa: UP045
    summary: str = ""
    citation: str = ""


@dataclass
class PromptSettings:
    """Which prompts are benchmarked.

    Attributes:
        files: Prompt files, csv, jsonl, txt or parquet.
        memorized: Those of the files whose prompts are memorized where no kind is annotated.
        references: Folder of reference images: of those that a file names by relative paths, and of those that
            ``nemo-bench references`` fetched; by default each file's own folder.
        calibration: General prompts for statistics and threshold.
        controls: Prompts with reference images that the model has not been trained on, for audits.
        obtain: Where to get the files, for who does not have them.
        limit: Take so many prompts of each file.
        calibration_limit: Take so many general prompts.
        summary: One line for ``nemo-bench ls``.
        citation: Source.
    """

    files: list[str] = MISSING
    memorized: list[str] = field(default_factory=list)
    references: Optional[str] = None  # noqa: UP045
    calibration: Optional[str] = None  # noqa: UP045
    controls: Optional[str] = None  # noqa: UP045
    limit: Optional[int] = None  # noqa: UP045
    calibration_limit: Optional[int] = None  # noqa: UP045
    obtain: str = ""
    summary: str = ""
    citation: str = ""


@dataclass
class TrainerSettings:
    """Lightning's trainer.

    Attributes:
        accelerator: ``auto``, ``cpu``, ``gpu`` and so on.
        devices: Processes a node.
        num_nodes: Nodes.
        strategy: ``auto``, ``ddp`` and so on.
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"


@dataclass
class LoggerSettings:
    """Experiment tracking.

    Attributes:
        wandb: Whether cells become Weights & Biases runs.
        csv: Whether Lightning's CSV logger is told of every cell.
        tensorboard: Whether Lightning's TensorBoard logger is told of every cell.
        project: W&B project.
        entity: W&B user or team.
        mode: ``online``, ``offline``, or None: online only where a key is configured.
        timeout: Seconds that W&B may take to begin a run, and again to end it.
        thumbnails: Prompts shown with pictures.
    """

    wandb: bool = False
    csv: bool = False
    tensorboard: bool = False
    project: str = "nemo-bench"
    entity: Optional[str] = None  # noqa: UP045
    mode: Optional[str] = None  # noqa: UP045
    timeout: float = 120
    thumbnails: int = 64


@dataclass
class RunSettings:
    """One cell: a model, a method and prompts, and how they are run.

    Attributes:
        name: Folder of the run under ``root``.
        root: Folder of all results.
        model: The model.
        method: ``_target_`` and arguments of the mitigation.
        detector: ``_target_`` and arguments of the detector, for ``nemo-bench detect`` alone.
        prompts: The prompts.
        metrics: ``_target_`` and arguments of each metric by name.
        weights: Folder of the weights that metrics need, each file under the name it is published by.
        real_images: Folder of real pictures that whole sets of images are compared with.
        seeds: Images a prompt.
        localize_seeds: Seeds a prompt for noise differences, at least 2.
        batch_size: Images in a batch; changes results by rounding only.
        workers: Processes that read images ahead while others are scored.
        summary: What an experiment shows, for its file alone: one line for ``nemo-bench ls``.
        grid: What an experiment consists of, for its file alone: lines of overrides, each read as on the command line.
        trainer: Lightning's trainer.
        logger: Experiment tracking.
    """

    name: str = "default"
    root: str = "results"
    model: ModelSettings = field(default_factory=ModelSettings)
    method: Any = MISSING
    detector: Any = None
    prompts: PromptSettings = field(default_factory=PromptSettings)
    metrics: dict[str, Any] = field(default_factory=dict)
    weights: str = "weights"
    real_images: Optional[str] = None  # noqa: UP045
    seeds: int = 4
    localize_seeds: int = 10
    batch_size: int = 32
    workers: int = 0
    summary: str = ""
    grid: list[str] = field(default_factory=list)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)


ConfigStore.instance().store(name="run_schema", node=RunSettings)

_CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "float16", "bfloat16"),
    "model.layers": ("down+mid", "all"),
    "logger.mode": ("online", "offline"),
}
_LEAST: dict[str, float] = {
    "model.steps": 1,
    "model.guidance": 0,
    "model.similarity.sigma": 1e-6,
    "prompts.limit": 1,
    "prompts.calibration_limit": 2,
    "seeds": 1,
    "localize_seeds": 2,
    "batch_size": 1,
    "workers": 0,
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "logger.timeout": 1,
    "logger.thumbnails": 0,
}


@dataclass(frozen=True)
class Choice:
    """Settings of one cell and the names they were chosen by.

    Attributes:
        names: Option by group, such as ``{"model": "planted", "method": "nemo", ...}``.
        settings: The checked settings.
    """

    names: Mapping[str, str]
    settings: RunSettings


def grid(overrides: Sequence[str], conf: Path | None = None) -> list[Choice]:
    """The cells that overrides ask for; comma lists and other sweeps of Hydra's grammar are multiplied out.

    Where several methods are compared, a setting ``method.x`` goes to those that have it, and in a method that starts
    from another one to that source, so that a control stays the control of what it is compared with.

    An experiment may have a ``grid`` of its own: lines of overrides, of which each is multiplied out. What is
    overridden here takes the place of the same key, or of what lies in it, in all its lines.

    Args:
        overrides: ``key=value`` words in Hydra's grammar.
        conf: Folder with more YAML files, in groups like those of the package.

    Returns:
        One choice per cell, in the order of the product; the method changes fastest.

    Raises:
        ConfigError: Anything is wrong with them.
    """
    if conf is not None and not conf.is_dir():
        raise ConfigError(f"--conf {conf} is no folder; give one with subfolders such as method/ and model/")
    if any(o.key_or_group == "grid" for o in _parse(overrides)):
        raise ConfigError("grid belongs into the file of an experiment; give the overrides themselves instead")
    cells: dict[tuple[str, ...], None] = {}
    for typed in _product(overrides):
        for words in _with_experiment(typed, conf):
            if not any(o.key_or_group == "method" for o in _parse(words)):
                words = [*words, f"method={DEFAULT_METHODS}"]
            cells |= dict.fromkeys(map(tuple, _product(words)))
    shared = dict.fromkeys(map(tuple, _share_out(_share_out(list(cells), "method", conf), "detector", conf)))
    try:
        return [_choose(list(cell), conf) for cell in shared]
    except ConfigError as error:
        if any("method.source." in word for word in overrides):
            raise
        # It was shared out to the source, and given for the method.
        raise ConfigError(str(error).replace("method.source.", "method.")) from error


DETECTING = ("model", "detector", "prompts", "trainer", "batch_size", "name", "root", "experiment")
"""Settings that detection takes up."""


def detector_grid(overrides: Sequence[str], conf: Path | None = None) -> list[Choice]:
    """The detectors that overrides ask for, on each model and its prompts; see :func:`grid`.

    Args:
        overrides: ``key=value`` words, each of :data:`DETECTING`; where no detector is named, all of them.
        conf: Folder with more YAML files, in groups like those of the package.

    Returns:
        One choice per detector, model and prompts.

    Raises:
        ConfigError: Anything is wrong with them.
    """
    typed = {str(o.key_or_group) for o in _parse(overrides)}
    for key in sorted(typed):
        if key in ("seeds", "localize_seeds"):
            raise ConfigError(f"every detector has seeds of its own; give detector.seeds=... in place of {key}=...")
        if not any(f"{key}.".startswith(f"{known}.") for known in DETECTING):
            raise ConfigError(f"{key} does not matter to detection; settings of detection: {', '.join(DETECTING)}")
    every = [] if "detector" in typed else [f"detector={','.join(options('detector', conf))}"]
    return grid([*overrides, *every, "method=none"], conf)


SCORING = ("metrics", "weights", "real_images", "batch_size", "workers", "trainer", "logger", "prompts.references")
"""Settings that can be others when images that are there are scored again."""


OWN_METRICS = "own"
"""Stands for the metrics of a run in the group of metrics."""


def rescore(overrides: Sequence[str], names: Mapping[str, str], stored: Mapping[str, Any], conf: Path | None) -> Choice:
    """The settings of images that are there, with those of scoring overridden.

    Args:
        overrides: ``key=value`` words, each of :data:`SCORING`; where no metrics are named they stay what they were.
        names: Option by group that the images were made with.
        stored: The settings they were made with.
        conf: The user's own folder.

    Returns:
        One choice. The trainer is that of this machine.

    Raises:
        ConfigError: Anything is wrong with the overrides, or another version wrote the settings.
    """
    typed = {str(o.key_or_group) for o in _parse(overrides)}
    for key in sorted(typed):
        if not any(f"{key}.".startswith(f"{known}.") for known in SCORING):
            known = ", ".join(SCORING)
            raise ConfigError(f"{key} can't be changed for images that are there; settings of scoring: {known}")
    if typed & {"weights", "real_images"} and "metrics" not in typed:
        raise ConfigError("weights and real_images are taken up by metrics: name those too, such as metrics=default")
    model = stored["model"]
    kept = {
        "model.clip": model["clip"],
        "model.clip_pretrained": model["clip_pretrained"],
        "weights": stored.get("weights"),
        "real_images": stored.get("real_images"),
    }
    # What metrics may refer to.
    words = [f"{key}={_quoted(value)}" for key, value in kept.items() if key not in typed and value is not None]
    if "metrics" not in typed:
        # Changes of single metrics are changes of those that the images were scored with.
        ConfigStore.instance().store(group="metrics", name=OWN_METRICS, node=stored["metrics"])
        words.append(f"metrics={OWN_METRICS}")
    chosen = one([*overrides, *words, "method=none"], conf).settings
    try:
        node = OmegaConf.create(dict(stored))
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunSettings), node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"another version wrote these settings ({_first_line(error)}); run again") from error
    assert isinstance(settings, RunSettings)
    for part in {"trainer", *(key.split(".")[0] for key in typed)} - {"prompts"}:
        setattr(settings, part, getattr(chosen, part))
    settings.prompts.references = chosen.prompts.references or settings.prompts.references
    return Choice(names, settings)


def one(overrides: Sequence[str], conf: Path | None) -> Choice:
    """The one cell that overrides ask for.

    Raises:
        ConfigError: See :func:`grid`; also where they ask for several.
    """
    choices = grid(overrides, conf)
    if len(choices) > 1:
        raise ConfigError(f"{len(choices)} sets of settings are asked for; images are scored with one value of each")
    return choices[0]


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def about_method(name: str, conf: Path | None) -> tuple[dict[str, Any], str, str]:
    """What a name says of how images were made.

    Args:
        name: A method of the group, or any other name.
        conf: The user's own folder.

    Returns:
        Settings that stand for it, its title and its citation.
    """
    if name not in options("method", conf):
        return {"name": name}, name, ""
    node = one([f"method={name}"], conf).settings.method
    target = get_object(node["_target_"])
    return ({"name": name} if name != "none" else dict(node)), target.title, target.citation


def _share_out(cells: Sequence[Sequence[str]], group: str, conf: Path | None) -> list[list[str]]:
    """The cells of several methods (detectors), each with those of their common settings that it has."""
    chosen = [next((word for word in words if word.startswith(f"{group}=")), "") for words in cells]
    if len(set(chosen)) < 2:
        return [list(words) for words in cells]
    for override in _parse(sorted(set(chosen))):
        _check_option(override, conf)
    with initialize_config_module("nemo_bench.conf", version_base="1.3"):
        composed = {word: _compose([word, *_search_path(conf)]) for word in set(chosen)}

    def placed(word: str, own: DictConfig) -> list[str]:
        """The setting where this method has it, nowhere if only others have it."""
        key = word.split("=")[0]
        of_source = key.replace(f"{group}.", f"{group}.source.", 1)
        if not key.startswith(f"{group}.") or _has(own, key):
            return [word]
        if _has(own, of_source):
            return [word.replace(key, of_source, 1)]
        if any(_has(other, place) for other in composed.values() for place in (key, of_source)):
            return []
        nodes = [other[group] for other in composed.values()]
        known = {str(name) for node in nodes for name in (*node, *node.get("source", ()))}
        hint = nearest(key.removeprefix(f"{group}."), known - {"_target_", "source"})
        raise ConfigError(f"unknown key '{key}': none of the {group}s that are compared has it. {hint}")

    return [
        [w for word in words for w in placed(word, composed[own])] for words, own in zip(cells, chosen, strict=True)
    ]


def _has(config: DictConfig, key: str) -> bool:
    *parents, last = key.split(".")
    node: Any = config
    for parent in parents:
        if not OmegaConf.is_dict(node) or parent not in node:
            return False
        node = node[parent]
    return OmegaConf.is_dict(node) and last in node


def _product(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides with one value each; the method (detector) changes fastest."""
    axes = []
    for override in sorted(_parse(overrides), key=lambda o: o.key_or_group in ("method", "detector")):
        if override.is_sweep_override():
            axes.append([f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()])
        else:
            axes.append([str(override.input_line)])
    return [list(words) for words in itertools.product(*axes)]


def _with_experiment(typed: list[str], conf: Path | None) -> list[list[str]]:
    """The lines of the experiment's grid, each completed by what was typed; or that alone."""
    parsed = _parse(typed)
    # Files of one's own take the place of all prompts that an experiment names.
    keys = [*(o.key_or_group for o in parsed), *("prompts" for o in parsed if o.key_or_group == "prompts.files")]
    chosen = [o for o in parsed if o.key_or_group == "experiment" and o.value() is not None]
    if not chosen:
        return [typed]
    for override in chosen:
        _check_option(override, conf)
    with initialize_config_module("nemo_bench.conf", version_base="1.3"):
        lines = _compose([*(str(o.input_line) for o in chosen), *_search_path(conf)]).grid

    def is_typed(key: str) -> bool:
        return any(f"{key}.".startswith(f"{own}.") for own in keys)

    own = [[str(o.input_line) for o in _parse(_split(line)) if not is_typed(o.key_or_group)] for line in lines]
    return [[*words, *typed] for words in own or [[]]]


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"can't read {line!r} in the grid of an experiment ({error})") from error


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        text = str(error).split("\n")[0]
        raise ConfigError(f"can't read an override ({text}); write key=value, such as seeds=8 method=nemo") from error


def _choose(overrides: Sequence[str], conf: Path | None) -> Choice:
    parsed = _parse(overrides)
    for override in parsed:
        _check_option(override, conf)
    search = _search_path(conf)
    # Hydra knows no way to take an experiment back that is none already.
    overrides = [_word(o) for o in parsed if o.key_or_group != "experiment" or o.value() is not None]
    keys = [o.key_or_group for o in parsed]
    groups = [word for word in overrides if _parse([word])[0].key_or_group in GROUPS]
    with initialize_config_module("nemo_bench.conf", version_base="1.3"):
        base = _compose([*groups, *search])
        for override in parsed:
            if override.key_or_group not in GROUPS and not override.is_add():
                _check_key(override.key_or_group, base)
        config = _compose([*overrides, *search])
    names = {group: str(name) for group, name in config.hydra.runtime.choices.items() if name and group in GROUPS}
    node = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
    if "prompts.files" in keys:
        files = list(node.prompts.files)
        names["prompts"] = "+".join(re.sub(r"[^A-Za-z0-9._-]", "-", Path(resolve(file)).stem) for file in files)
        if "prompts.memorized" not in keys:
            node.prompts.memorized = [file for file in node.prompts.memorized if file in files]
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunSettings), node))
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    assert isinstance(settings, RunSettings)
    _check_values(settings)
    return Choice(names, settings)


def _word(override: Override) -> str:
    """An override as Hydra takes it; a single file need not be put into brackets."""
    value = override.value()
    is_file = override.key_or_group in ("prompts.files", "prompts.memorized") and isinstance(value, str | QuotedString)
    return f"{override.key_or_group}=[{_quoted(str(value))}]" if is_file else str(override.input_line)


def _search_path(conf: Path | None) -> list[str]:
    places = [f"pkg://{name}" for name in _plugins()] + ([f"file://{conf.resolve()}"] if conf else [])
    return [f"hydra.searchpath=[{','.join(map(_quoted, places))}]"] if places else []


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("run", overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        key = getattr(cause, "full_key", None)
        given = next((o for o in overrides if key and o.split("=")[0] == key), "")
        raise ConfigError(f"{given or 'settings'}: {_expected(str(key)) or _first_line(cause)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"a YAML file can't be read: {' '.join(str(error).split())}") from error


def _expected(key: str) -> str:
    """What a setting takes, for an error message; empty where its type says nothing."""
    hint: Any = RunSettings
    for part in key.split("."):
        hint = get_type_hints(hint).get(part) if inspect.isclass(hint) else None
    if get_origin(hint) is Union:
        hint = get_args(hint)[0]
    return f"expected {_spell(hint)}" if hint in SPELLED or get_origin(hint) is list else ""


def _first_line(error: BaseException) -> str:
    first, *rest = str(error).strip().split("\n")
    # Hydra may open with where it was, and say what is wrong in the next line.
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first


def _check_option(override: Override, conf: Path | None) -> None:
    if override.key_or_group in GROUPS:
        choices = options(override.key_or_group, conf)
        value = "null" if override.value() is None else str(override.value())
        known = [("experiment", "null"), ("metrics", OWN_METRICS)]
        if value not in choices and (override.key_or_group, value) not in known:
            raise ConfigError(f"unknown {override.key_or_group} '{value}'. {nearest(value, choices)}")


def _check_key(key: str, base: DictConfig) -> None:
    parts = key.split(".")
    node: Any = base
    for depth, part in enumerate(parts):
        if not OmegaConf.is_dict(node) or part not in node:
            parent = ".".join(parts[:depth])
            known = [k for k in node if k != "hydra"] if OmegaConf.is_dict(node) else []
            where = f" in '{parent}'" if parent else ""
            raise ConfigError(f"unknown key '{key}': there is no '{part}'{where}. {nearest(part, map(str, known))}")
        node = node._get_node(part) if OmegaConf.is_missing(node, part) else node[part]


def _check_values(settings: RunSettings) -> None:
    def value_of(key: str) -> Any:
        value: Any = settings
        for part in key.split("."):
            value = getattr(value, part)
        return value

    for key, choices in _CHOICES.items():
        value = value_of(key)
        if value is not None and value not in choices:
            raise ConfigError(f"{key}={value}: unknown value. {nearest(str(value), choices)}")
    for key, least in _LEAST.items():
        value = value_of(key)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{key}={value}: expected at least {least:g}")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", settings.name) or not settings.name.strip("."):
        raise ConfigError(f"name={settings.name}: expected letters, digits, '.', '_' and '-' only; it names a folder")
    if unlisted := [file for file in settings.prompts.memorized if file not in settings.prompts.files]:
        raise ConfigError(f"prompts.memorized: {unlisted[0]} is none of prompts.files={settings.prompts.files}")
    build(settings.method, "method")
    if settings.detector is not None:
        build(settings.detector, "detector")
    for name, node in settings.metrics.items():
        build(node, f"metrics.{name}")


def options(group: str, conf: Path | None = None) -> list[str]:
    """Names that can be chosen in a group.

    Args:
        group: One of :data:`GROUPS`.
        conf: The user's own folder.

    Raises:
        ConfigError: There is no such group.
    """
    if group not in GROUPS:
        raise ConfigError(f"unknown group '{group}'. {nearest(group, GROUPS)}")
    return sorted({path.stem for folder in _folders(group, conf) for path in folder.glob("*.yaml")})


def _folders(group: str, conf: Path | None) -> list[Path]:
    """Where the files of a group are, the package's own first: of two files of one name Hydra takes that one."""
    packages = ["nemo_bench.conf", *_plugins()]
    return [*(Path(str(resources.files(name))) / group for name in packages), *([conf / group] if conf else [])]


@cache
def _plugins() -> list[str]:
    """Packages of YAML files that installed plugins name, in order of their names.

    Raises:
        ConfigError: One can't be imported.
    """
    found = sorted(importlib.metadata.entry_points(group=PLUGINS))
    for entry in found:
        try:
            importlib.import_module(entry.value)
        except ImportError as error:
            msg = f"plugin {entry.name}: its package of settings {entry.value} can't be imported ({error})"
            raise ConfigError(f"{msg}; mend or uninstall it") from error
    return [entry.value for entry in found]


def resolve(path: str) -> str:
    """A path as given, or one in this package for ``package:...``, with ``local-dir:`` before either kept."""
    prefix, _, rest = path.rpartition("package:")
    return prefix + str(resources.files("nemo_bench") / rest) if _ else path


def build(node: Mapping[str, Any], key: str) -> Any:
    """Makes the object that a node describes, its arguments checked against the signature.

    Args:
        node: ``_target_`` with the class, other keys its arguments; arguments may be such nodes themselves.
        key: Where the node is, for messages.

    Returns:
        The object.

    Raises:
        ConfigError: The class can't be imported, or an argument is unknown, missing or of the wrong type.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{key}: expected _target_ with the path of a class, given {node}")
    try:
        target = get_object(node["_target_"])
    except Exception as error:
        raise ConfigError(f"{key}._target_={node['_target_']}: can't be imported ({_first_line(error)})") from error
    arguments = {k: v for k, v in node.items() if k != "_target_"}
    try:
        parameters = inspect.signature(target).parameters
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(f"{key}._target_={node['_target_']}: is no class that can be made here ({error})") from error
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not open_ended:
            raise ConfigError(f"unknown key '{key}.{name}'. {nearest(name, parameters)}")
        if isinstance(value, Mapping) and "_target_" in value:
            value = arguments[name] = build(value, f"{key}.{name}")
        elif isinstance(value, str):
            arguments[name] = resolve(value)
        if name in hints and not _fits(value, hints[name]):
            raise ConfigError(f"{key}.{name}={value}: expected {_spell(hints[name])}, given {value!r}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments and p.kind not in (2, 4)]
    if missing:
        raise ConfigError(f"{key}: {node['_target_']} also needs {', '.join(missing)}")
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {node['_target_']} can't be made ({_first_line(error)})") from error


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value if inner)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if inspect.isclass(kind) else True


SPELLED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _spell(hint: Any) -> str:
    if hint in SPELLED:
        return SPELLED[hint]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return "a list, in brackets"
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")


def describe_options(group: str, conf: Path | None = None) -> list[dict[str, str]]:
    """What ``nemo-bench ls`` shows of a group.

    Args:
        group: One of :data:`GROUPS`.
        conf: The user's own folder.

    Returns:
        Objects with group, name, summary and citation; a metrics file gives one per metric, ``FILE/METRIC``.

    Raises:
        ConfigError: There is no such group.
    """
    entries = []
    for name in options(group, conf):
        settings = _choose([f"{group}={name}", *(["method=none"] if group != "method" else [])], conf).settings
        if group in ("method", "detector"):
            target = get_object(getattr(settings, group)["_target_"])
            entries.append((name, target.summary, target.citation))
        elif group == "metrics":
            for metric, node in settings.metrics.items():
                built = build(node, f"metrics.{metric}")
                entries.append((f"{name}/{metric}", built.description, built.citation))
        else:
            node = settings if group == "experiment" else getattr(settings, group)
            entries.append((name, getattr(node, "summary", ""), getattr(node, "citation", "")))
    keys = ("name", "summary", "citation")
    return [{"group": group, **dict(zip(keys, entry, strict=True))} for entry in entries]


def explain_option(group: str, name: str, conf: Path | None = None) -> str:
    """What can be set of one option of a group.

    Args:
        group: One of :data:`GROUPS`.
        name: One of :func:`options`.
        conf: The user's own folder.

    Returns:
        Its YAML file, with the words of the class that it names, if it names one.

    Raises:
        ConfigError: There is no such option.
    """
    if name not in (choices := options(group, conf)):
        raise ConfigError(f"unknown {group} '{name}'. {nearest(name, choices)}")
    path = next(p for folder in _folders(group, conf) if (p := folder / f"{name}.yaml").is_file())
    text = path.read_text(encoding="utf-8")
    target = dict(yaml.safe_load(text)).get("_target_")
    words = inspect.getdoc(get_object(target)) if target else None
    return "\n".join([f"# {path}", text, *([f"{target}:", words] if words else [])])


def logger_settings(overrides: Sequence[str]) -> LoggerSettings:
    """Settings of the logger group alone.

    Args:
        overrides: ``logger=...`` and ``logger.key=value`` words; without the first, W&B is the logger.

    Returns:
        The checked settings.

    Raises:
        ConfigError: A word is none of the logger group, or wrong in itself.
    """
    keys = [override.key_or_group for override in _parse(overrides)]
    for key in keys:
        if key.split(".")[0] != "logger":
            raise ConfigError(f"unknown setting '{key}'; only logger=... and logger.key=value can be given here")
    choices = grid(["method=none", *([] if "logger" in keys else ["logger=wandb"]), *overrides])
    if len(choices) > 1:
        raise ConfigError(f"{' '.join(overrides)}: give one value for each setting; logger=all takes every logger")
    return choices[0].settings.logger


def train_settings(overrides: Sequence[str], schema: type[Any]) -> Any:
    """A dataclass with some fields overridden.

    Args:
        overrides: ``key=value`` words.
        schema: The dataclass.

    Returns:
        An instance.

    Raises:
        ConfigError: A key is unknown or a value of the wrong type.
    """
    known = list(schema.__dataclass_fields__)
    for word in overrides:
        key, separator, _ = word.partition("=")
        if not separator or key not in known:
            raise ConfigError(f"unknown setting '{word}'; write key=value. {nearest(key, known)}")
    try:
        return OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(list(overrides)))
        )
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
