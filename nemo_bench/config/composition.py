"""Settings of cells: YAML files composed by Hydra, overrides set on top, all of it checked."""

from __future__ import annotations

import itertools
import logging
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bench.config.families import FAMILIES, STRENGTHS, FamilySettings, settle, take_strength
from nemo_bench.config.groups import GROUPS, named_classes, options, own_folders, read_option
from nemo_bench.config.overrides import ConfFolder, quoted, read, sweep_words, value_of
from nemo_bench.config.schema import (
    LoggerSettings,
    ModelSettings,
    PublishedSettings,
    RunSettings,
    check_values,
    is_within,
    targets_of,
    type_of,
    typed,
    unknown_key,
)
from nemo_bench.config.targets import build, check_found, check_stored, check_value, hint_of, resolve
from nemo_bench.errors import ConfigError, did_you_mean, first_line
from nemo_bench.records.schema import Strength

DEFAULT_METHODS = "none,random,nemo,other_prompt,one_edit"
"""Methods that are compared where none is named."""
DETECTING = ("model", "detector", "prompts", "trainer", "logger", "batch_size", "name", "root", "experiment")
"""Settings of detection."""
COMPARING = {
    "model": "planted_routed",
    "metrics": "similarity",
    "weights": "",
    "seeds": "",
    "name": "similarity",
    "root": "",
}
"""Settings of a comparison of similarity metrics, with options that differ from those of a run."""
NOT_LOCALIZING = ("method", "detector", "region", "strengths")
"""Settings of a run that do not matter to the benchmark of localizers."""
SCORING = (
    *("metrics", "weights", "real_images", "batch_size", "workers", "trainer", "logger"),
    *("prompts.references", "prompts.masks"),
)
"""Settings that may change when existing images are scored again."""
SUBJECTS = ("method", "detector", "localizer", "region")
"""Groups of what is compared."""
log = logging.getLogger(__name__)
OTHER_WEIGHTS = {"model.source", "model.training", "model.unet"}
"""Settings by which a model has other weights than its file says."""
OTHER_SHAPE = {"model.tokens", "model.size"}
"""Settings by which a pass takes another number of operations."""
NAMES = {"region": "localizer of regions"}
"""What an option of a group is called, where not as the group."""
MOST_CELLS = 10_000
"""Most cells of one command."""


class Composed(NamedTuple):
    """YAML files of one option per group, merged."""

    names: dict[str, str]  #: Option by group.
    content: dict[str, Any]  #: Settings with interpolations unresolved.
    config: DictConfig  #: The same, for words to be set on.
    by_experiment: list[str]  #: Keys of settings that the file of the experiment has.
    by_option: dict[str, list[str]]  #: Keys of settings that files of what is compared have, by group.
    beside_strengths: list[str]  #: Keys of settings that files have which begin with that of a method with strengths.
    of_model: list[list[str]]  #: Keys of settings of the model: of the experiment, then of each file, the basis last.


# Without types: Hydra merges files and defaults, and `typed` checks the result. It would refuse a grid of another type.
ConfigStore.instance().store(name="run_schema", node={**asdict(RunSettings()), "grid": None})


@dataclass(frozen=True)
class CellConfig:
    """Settings of one cell and the options that they come from."""

    names: Mapping[str, str]  #: Option by group, such as ``{"model": "planted", "method": "nemo", ...}``.
    settings: RunSettings  #: The checked settings.
    families: tuple[FamilySettings, ...] = ()  #: Settings that were chosen for the family of the model.
    strength: Strength | None = None  #: Of a run with ``strengths=true``: what other cells vary of this method.


def grid(
    overrides: Sequence[str], conf: Path | None = None, metrics: Mapping[str, Any] | None = None
) -> list[CellConfig]:
    """Makes the settings of all cells; comma lists and other sweeps of Hydra's grammar are multiplied out.

    Where several methods are compared, a setting ``method.x`` goes to the methods that have it. A control, which
    starts from another method, passes it on to that source, so that it stays the control of the compared method.

    With ``strengths=true`` each method that has strengths is taken at each of them, but where their setting is given.

    An experiment may have a ``grid``: lines of overrides, each multiplied out. An override given here replaces the
    same key, and keys inside it, in all lines.

    Args:
        overrides: ``key=value`` words in Hydra's grammar.
        conf: Folder with more YAML files, in groups like those of the package.
        metrics: What overrides of metrics change, in place of those of a file.

    Returns:
        Settings of each cell, in the order of the product; the method changes fastest.

    Raises:
        ConfigError: A word can't be read, or a setting is unknown, of the wrong type or out of range.
    """
    if conf is not None and not conf.is_dir():
        raise ConfigError(f"--conf {conf} is no folder; give one with subfolders such as method/ and model/")
    if "grid" in _keys_of(overrides):
        raise ConfigError("grid belongs into the file of an experiment; give the overrides themselves instead")

    @cache
    def composed(groups: tuple[str, ...]) -> Composed:
        return _compose(groups, conf, metrics)

    rows: dict[tuple[str, ...], None] = {}
    for given in _product(overrides):
        for words in _with_experiment(given, conf, composed):
            if "method" not in _keys_of(words):
                words = [*words, f"method={DEFAULT_METHODS}"]
            rows |= dict.fromkeys(map(tuple, _product(words)))
    split = [_split(words, conf) for words in rows]
    bases = [composed(groups) for groups in dict.fromkeys(groups for groups, _ in split)]
    # Methods that lack a setting give the same cell for each of its values.
    cells = dict.fromkeys((groups, _placed(settings, composed(groups), bases)) for groups, settings in split)
    configs = [config for groups, settings in cells for config in _cell_configs(composed(groups), settings)]
    # Most cells of a grid share most nodes: each is looked at once.
    nodes = {(key, repr(node)): node for config in configs for key, node in targets_of(config.settings).items()}
    for (key, _), node in nodes.items():  # before any class is built, since that loads torch
        check_found(node, key, conf)
    for config in configs:
        check_values(config.settings)
    for (key, _), node in nodes.items():
        build(node, key)
    if any(c.settings.strengths for c in configs) and not any(c.strength for c in configs):
        names = ", ".join(dict.fromkeys(config.names.get("method", "") for config in configs))
        log.warning(
            "strengths=true changes nothing: of method=%s none has strengths that are not given; `nemo-bench ls method "
            "NAME` shows them",
            names,
        )
    return configs


def one(overrides: Sequence[str], conf: Path | None, metrics: Mapping[str, Any] | None = None) -> CellConfig:
    """Makes the settings of a single cell, of overrides without sweeps; see :func:`grid`."""
    configs = grid(overrides, conf, metrics)
    if len(configs) > 1:
        raise ConfigError(f"{len(configs)} sets of settings are asked for; images are scored with one value of each")
    return configs[0]


def detector_grid(overrides: Sequence[str], conf: Path | None = None) -> list[CellConfig]:
    """Makes the settings of each detector, model and prompts; see :func:`grid`.

    Overrides are of :data:`DETECTING`; without a detector among them, all detectors are meant.
    """
    return _watching_grid("detector", "detection", overrides, conf)


def region_grid(overrides: Sequence[str], conf: Path | None = None) -> list[CellConfig]:
    """Makes the settings of each localizer of regions, model and prompts; see :func:`detector_grid`."""
    return _watching_grid("region", "regions", overrides, conf)


def _watching_grid(group: str, what: str, overrides: Sequence[str], conf: Path | None) -> list[CellConfig]:
    """The settings of each option of a group that watches sampling, all options where none is named."""
    keys, known = _keys_of(overrides), [group if key == "detector" else key for key in DETECTING]
    for key in sorted(keys):
        if key in ("seeds", "localize_seeds"):
            raise ConfigError(
                f"every {NAMES.get(group, group)} has seeds of its own; give {group}.seeds=... in place of {key}=..."
            )
        if not is_within(key, known):
            raise ConfigError(f"{key} does not matter to {what}; settings of {what}: {', '.join(known)}")
    every = [] if group in keys else [f"{group}={','.join(options(group, conf))}"]
    return grid([*overrides, *every, "method=none"], conf)


def localizer_grid(overrides: Sequence[str], conf: Path | None = None) -> list[CellConfig]:
    """Makes the settings of each localizer, model and prompts; see :func:`grid`.

    Without a localizer among the overrides all are meant but, where the model has no ``model.truth``, those that need
    it; without metrics those of ``metrics=localizers``.
    """
    keys = _keys_of(overrides)
    for key in sorted(keys):
        if is_within(key, ("launcher",)):
            raise ConfigError(
                f"{key}: localizers are run without a launcher; leave it out, and start the same command several times "
                "or in a job script: the processes share the work"
            )
        if is_within(key, NOT_LOCALIZING):
            raise ConfigError(f"{key} does not matter to localizers; leave it out, and choose them by localizer=...")
    every = [] if "localizer" in keys else [f"localizer={','.join(options('localizer', conf))}"]
    metrics = [] if "metrics" in keys else ["metrics=localizers"]
    configs = grid([*overrides, *every, *metrics, "method=none"], conf)
    if any(config.settings.localizer is None for config in configs):
        raise ConfigError("localizer=null: there is nothing to localize with; name some, or leave it out for all")
    return [config for config in configs if not every or config.settings.localizer.get("truth", "") is not None]


def similarity_settings(overrides: Sequence[str], conf: Path | None = None) -> RunSettings:
    """Makes the settings of a comparison of similarity metrics; overrides are of :data:`COMPARING`, without sweeps."""
    keys = _keys_of(overrides)
    for key in sorted(keys):
        if not is_within(key, COMPARING):
            raise ConfigError(f"{key} does not matter to similarity; settings of it: {', '.join(COMPARING)}")
    words = [f"{key}={option}" for key, option in COMPARING.items() if option and key not in keys]
    return one([*words, *overrides, "method=none"], conf).settings


def rescore(
    overrides: Sequence[str],
    names: Mapping[str, str],
    stored: Mapping[str, Any],
    conf: Path | None,
    known: dict[str, RunSettings] | None = None,
) -> CellConfig:
    """Makes the settings for scoring images again, from the options and settings that they were made with.

    Overrides of :data:`SCORING` change the stored metrics, or name others. The trainer is that of this machine.
    ``known`` keeps what one cell composed for others of these overrides.
    """
    keys = _keys_of(overrides)
    for key in sorted(keys):
        if not is_within(key, SCORING):
            msg = f"{key} can't be changed for existing images; settings of scoring: {', '.join(SCORING)}"
            raise ConfigError(msg)
    if keys & {"weights", "real_images"} and "metrics" not in keys:
        raise ConfigError("weights and real_images are taken up by metrics: name those too, such as metrics=default")
    settings = _read_stored(stored, conf)
    # Metrics may refer to these.
    referred = ("model.clip", "model.clip_pretrained", "weights", "real_images", "prompts.masks")
    before = {key: attrgetter(key)(settings) for key in referred if key not in keys}
    words = [f"{key}={quoted(value)}" for key, value in before.items() if value is not None]
    metrics = None if "metrics" in keys else settings.metrics
    known = {} if known is None else known
    if (key := repr([words, metrics])) not in known:
        known[key] = one([*overrides, *words, "method=none"], conf, metrics).settings
    changed = known[key]
    for part in {"trainer", *(key.split(".")[0] for key in keys)} - {"prompts"}:
        setattr(settings, part, getattr(changed, part))
    settings.prompts.references = changed.prompts.references or settings.prompts.references
    settings.prompts.masks = changed.prompts.masks or settings.prompts.masks
    return CellConfig(names, settings)


def _read_stored(stored: Mapping[str, Any], conf: Path | None) -> RunSettings:
    """Checks settings of a results folder; no class outside the package and the user's YAML files is imported."""
    classes = named_classes(conf)
    for key, value in stored.items():
        if key != "method":  # not built for scoring; an audit checks it
            check_stored(value, str(key), classes)
    try:
        return typed(stored, RunSettings)
    except ConfigError as error:
        raise ConfigError(f"another version wrote these settings ({error}); run again") from error


def logger_settings(overrides: Sequence[str]) -> LoggerSettings:
    """Makes the settings of the logger group alone, W&B if none is named."""
    keys = _keys_of(overrides)
    for key in sorted(keys):
        if not is_within(key, ["logger"]):
            raise ConfigError(f"unknown setting '{key}'; only logger=... and logger.key=value can be given here")
    configs = grid(["method=none", *([] if "logger" in keys else ["logger=wandb"]), *overrides])
    if len(configs) > 1:
        raise ConfigError(f"{' '.join(overrides)}: give one value for each setting; logger=all takes every logger")
    return configs[0].settings.logger


def name_of_files(files: Sequence[str]) -> str:
    """The name of prompts that are given by files, or of a model that is given by the folder of its training."""
    return "+".join(re.sub(r"[^A-Za-z0-9._-]", "-", Path(resolve(file)).stem) for file in files)


def _parse(words: Sequence[str]) -> list[Override]:
    overrides = [read(word) for word in words]
    for override in overrides:
        key = str(override.key_or_group)
        if re.split("[./]", key)[0] == "hydra" or override.package is not None:
            raise ConfigError(f"unknown key '{override.get_key_element()}': Hydra's own settings are not taken")
    return overrides


def _keys_of(words: Sequence[str]) -> set[str]:
    return {str(override.key_or_group) for override in _parse(words)}


def _product(words: Sequence[str]) -> list[list[str]]:
    """Words with one value each; the method (detector, localizer) changes fastest."""
    axes = []
    for override in sorted(_parse(words), key=lambda o: o.key_or_group in SUBJECTS):
        axes.append(_swept(override) if override.is_sweep_override() else [str(override.input_line)])
    if (count := math.prod(map(len, axes))) > MOST_CELLS:
        raise ConfigError(f"{count:,} cells are asked for, more than {MOST_CELLS:,}; give fewer values")
    return [list(row) for row in itertools.product(*axes)]


def _swept(override: Override) -> list[str]:
    """One word for each value of a sweep."""
    try:
        words = list(itertools.islice(sweep_words(override), MOST_CELLS + 1))
    except Exception as error:  # Hydra raises errors of any kind for endless ranges, empty choices and patterns
        msg = f"{override.input_line}: can't be multiplied out ({first_line(error)})"
        raise ConfigError(f"{msg}; give the values themselves, separated by commas") from error
    if not words or len(words) > MOST_CELLS:
        count = f"more than {MOST_CELLS:,}" if words else "no"
        raise ConfigError(f"{override.input_line}: stands for {count} values; give those that are meant")
    return words


def _with_experiment(
    given: list[str], conf: Path | None, composed: Callable[[tuple[str, ...]], Composed]
) -> list[list[str]]:
    """Adds the given words to each line of the experiment's grid, where there is one."""
    groups, _ = _split(given, conf)
    experiment = tuple(word for word in groups if word.startswith("experiment="))
    content = composed(experiment).content if experiment else {}
    lines = check_value(f"{' '.join(experiment)}: grid", content.get("grid", []), list[str])
    # Files given here replace all prompts of the experiment.
    keys = _keys_of(given)
    if "prompts.files" in keys:
        keys.add("prompts")
    rows = []
    for line in lines:
        try:
            words = _parse(shlex.split(line))
        except ValueError as error:
            raise ConfigError(f"can't read {line!r} in the grid of an experiment ({error})") from error
        rows.append([str(o.input_line) for o in words if not is_within(str(o.key_or_group), keys)] + given)
    return rows or [given]


def _split(words: Sequence[str], conf: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words that choose options of groups, checked, and words for single settings."""
    groups, settings = [], []
    for override in _parse(words):
        group = override.key_or_group
        if group not in GROUPS:
            settings.append(str(override.input_line))
            continue
        value = override.value()
        if group == "experiment" and value is None:
            continue
        choices = options(group, conf)
        name = "null" if value is None else str(value)
        if name not in choices:
            raise ConfigError(f"unknown {NAMES.get(group, group)} '{name}'. {did_you_mean(name, choices)}")
        groups.append(str(override.input_line))
    return tuple(groups), tuple(settings)


def _compose(groups: Sequence[str], conf: Path | None, metrics: Mapping[str, Any] | None) -> Composed:
    folders = ",".join(quoted(f"{ConfFolder.scheme()}://{folder.resolve()}") for folder in own_folders(conf))
    try:
        with initialize_config_module("nemo_bench.conf", version_base="1.3"):
            config = compose("run", [*groups, f"hydra.searchpath=[{folders}]"], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise ConfigError(f"settings: {first_line(cause)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"a YAML file can't be read: {' '.join(str(error).split())}") from error
    choices = config.hydra.runtime.choices
    names = {group: str(choices[group]) for group in GROUPS if choices.get(group)}
    content: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment] # keys are strings
    del content["hydra"]
    if content["grid"] is None:
        content["grid"] = []
    by_experiment = _written_by_experiment(names["experiment"], conf) if "experiment" in names else []
    by_option: dict[str, list[str]] = {
        group: _written_by_option(group, names[group], conf, FAMILIES) for group in SUBJECTS if group in names
    }
    beside = _written_by_option("method", names["method"], conf, STRENGTHS) if "method" in names else []
    of_model = [by_experiment, *_keys_by_file("model", names["model"], conf)] if "model" in names else []
    if metrics is not None:
        content["metrics"] = metrics
    return Composed(names, content, OmegaConf.create(content), by_experiment, by_option, beside, of_model)


def _has(content: Any, key: str) -> bool:
    name, _, rest = key.partition(".")
    return isinstance(content, dict) and name in content and (not rest or _has(content[name], rest))


def _placed(settings: Sequence[str], base: Composed, bases: Sequence[Composed]) -> tuple[tuple[str, str], ...]:
    """Words for settings, each with its key: of the method, or of its source where only that one has the setting."""
    names, content = base.names, base.content
    placed = []
    for word in settings:
        (override,) = _parse([word])
        key = str(override.key_or_group)
        group, _, argument = key.partition(".")
        others = [other.content for other in bases if other.names.get(group) != names.get(group)]
        is_shared = group in SUBJECTS and others and override.type is OverrideType.CHANGE
        if is_shared and not _has(content, key):
            in_source = f"{group}.source.{argument}"
            if _has(content, in_source):
                key = in_source
            elif any(_has(other, key) or _has(other, in_source) for other in others):
                continue
            else:
                nodes = [other.content[group] or {} for other in bases]
                known = {name for node in nodes for name in (*node, *(node.get("source") or ()))}
                hint = did_you_mean(argument, known - {"_target_", "source", FAMILIES, STRENGTHS})
                raise ConfigError(f"unknown key '{key}': none of the {group}s that are compared has it. {hint}")
        placed.append((key, word))
    return tuple(placed)


def _cell_configs(base: Composed, settings: Sequence[tuple[str, str]]) -> list[CellConfig]:
    """Sets words on top of what Hydra composed, and checks the result but for classes that it names.

    There are several cells where a method is taken at all of its strengths.
    """
    names, given = dict(base.names), [key for key, _ in settings]
    try:
        for key, word in settings:
            _set(base.config, base.content, key, read(word))
        content: dict[str, Any] = OmegaConf.to_container(base.config, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    for part in {key.partition(".")[0] for key in given} & base.content.keys():  # as it was, for the next cell
        base.config[part] = base.content[part]
    own = given if "prompts.files" in given else [*given, *base.by_experiment]
    if "prompts.files" in own:
        # Other settings of a list of prompts are about its own files.
        content["prompts"] = {key: value for key, value in content["prompts"].items() if f"prompts.{key}" in own}
    run = typed(content, RunSettings)
    if "prompts.files" in own:
        names["prompts"] = name_of_files(run.prompts.files)
    if training := run.model.training:
        names["model"] = name_of_files([training])
        run.model.source = f"{training}/model/pipeline"
    _forget_published(run.model, [given, *base.of_model])
    run.root = resolve(run.root)
    families: list[FamilySettings] = []
    for group, node in ((group, getattr(run, group)) for group in SUBJECTS):
        if isinstance(node, dict):
            own_keys = [*given, *base.by_experiment, *base.by_option.get(group, ())]
            families += settle(node, group, run.model.family, own_keys)
    strength = take_strength(run.method, "method") if isinstance(run.method, dict) else None
    config = CellConfig(names, run, tuple(families), strength)
    own_keys = [*given, *base.by_experiment, *base.beside_strengths]
    if strength and run.strengths and not is_within(f"method.{strength.setting}", own_keys):
        return [_at_strength(config, strength.setting, value) for value in strength.values]
    return [replace(config, strength=None)]


def _at_strength(config: CellConfig, setting: str, value: Any) -> CellConfig:
    """The cell with one of the values of its method's strengths."""
    method = config.settings.method
    if method[setting] == value:
        return config
    families = tuple(
        replace(
            found,
            values={name: chosen for name, chosen in found.values.items() if name != setting},
            strength={setting: value},
        )
        if found.node == "method"
        else found
        for found in config.families
    )
    settings = replace(config.settings, method={**method, setting: value})
    return replace(config, settings=settings, families=families)


def _forget_published(model: ModelSettings, written: Sequence[Sequence[str]]) -> None:
    """Drops what a file says of weights that are replaced, or of the cost of a pass whose shape is changed.

    ``written`` are the keys that are set in each place: first what is given, then each file before the one that it
    begins with. What is said holds for the settings of its own place and of those after it.
    """
    for name, plain in asdict(PublishedSettings()).items():
        own = f"model.published.{name}"
        place = next((i for i, keys in enumerate(written) if is_within(own, keys)), len(written))
        changed = {key for keys in written[:place] for key in keys}
        if changed & OTHER_WEIGHTS or (name == "teraflops" and changed & OTHER_SHAPE):
            setattr(model.published, name, plain)


def _set(config: DictConfig, composed: Mapping[str, Any], key: str, override: Override) -> None:
    """Sets, adds or deletes one setting; the key is not the override's where a control passes it on."""
    *parents, last = parts = key.split(".")
    node: Any = composed  # before any change, for checks of the key
    target = None
    for depth, part in enumerate(parts):
        if not isinstance(node, Mapping) or (part not in node and not override.is_add()):
            raise unknown_key(key, depth, node if isinstance(node, Mapping) else ())
        target = node.get("_target_")
        node = node.get(part, {})
    hint = hint_of(target, last) if target else type_of(key)
    value = value_of(override, hint)
    if key != override.key_or_group and "${" not in str(value):
        check_value(str(override.key_or_group), value, hint)  # while the key as typed is known
    if override.is_delete():
        del (OmegaConf.select(config, ".".join(parents)) if parents else config)[last]
    elif override.is_add() and node and not isinstance(value, dict | list):
        raise ConfigError(f"{override.input_line}: {key} is set already; leave out the +")
    else:
        OmegaConf.update(config, key, value, force_add=True)


def _written_by_experiment(name: str, conf: Path | None) -> list[str]:
    """Keys of settings of model, prompts and what is compared in the file of an experiment, except in its grid."""
    content = read_option("experiment", name, conf)
    return [key for group in (*SUBJECTS, "model", "prompts") for key in _keys(content.get(group, {}), group)]


def _written_by_option(group: str, name: str, conf: Path | None, end: str) -> list[str]:
    """Keys of settings in a file, and in files it begins with, up to the file that has ``end``."""
    content = read_option(group, name, conf) if name in options(group, conf) else {}
    if not content or end in content:
        return []
    bases = [base for base in content.pop("defaults", None) or [] if isinstance(base, str) and base != "_self_"]
    return [*_keys(content, group), *(key for base in bases for key in _written_by_option(group, base, conf, end))]


def _keys_by_file(group: str, name: str, conf: Path | None) -> list[list[str]]:
    """Keys of settings of a file, then of each file that it begins with."""
    content = read_option(group, name, conf) if name in options(group, conf) else {}
    bases = [base for base in content.pop("defaults", None) or [] if isinstance(base, str) and base != "_self_"]
    return [_keys(content, group), *(keys for base in bases for keys in _keys_by_file(group, base, conf))]


def _keys(node: Any, prefix: str) -> list[str]:
    """Full keys of all values in nested mappings."""
    if not isinstance(node, Mapping):
        return [prefix]
    return [key for name, value in node.items() for key in _keys(value, f"{prefix}.{name}")]
