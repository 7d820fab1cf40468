"""Settings composed by Hydra from YAML and overrides, turned at once into typed, checked dataclasses."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bench.config.families import FAMILIES, FamilySettings, settle
from nemo_bench.config.groups import GROUPS, file_of, named_classes, options, plugins
from nemo_bench.config.importable import check_found
from nemo_bench.config.schema import LoggerSettings, PromptSettings, RunSettings, check_values
from nemo_bench.config.targets import SPELLED, check_stored, first_line, hint_of, resolve, spell
from nemo_bench.config.text import ConfFolder, hint_in, kept, quoted, read, swept
from nemo_bench.errors import ConfigError, did_you_mean

DEFAULT_METHODS = "none,random,nemo,other_prompt,one_edit"
"""What is compared where no method is named."""
DETECTING = ("model", "detector", "prompts", "trainer", "batch_size", "name", "root", "experiment")
"""Settings that detection takes up."""
SCORING = ("metrics", "weights", "real_images", "batch_size", "workers", "trainer", "logger", "prompts.references")
"""Settings that can be others when images that are there are scored again."""
_BUILT = ("method", "detector", "metrics")
"""Settings that are arguments of classes."""
MOST_CELLS = 10_000
"""Cells that one command may ask for."""
OWN_METRICS = "own"
"""Stands for the metrics of a run in the group of metrics."""


@dataclass(frozen=True)
class CellConfig:
    """Settings of one cell and the names they were chosen by.

    Attributes:
        names: Option by group, such as ``{"model": "planted", "method": "nemo", ...}``.
        settings: The checked settings.
        families: Which of them were chosen for the family of the model.
    """

    names: Mapping[str, str]
    settings: RunSettings
    families: tuple[FamilySettings, ...] = ()


def grid(overrides: Sequence[str], conf: Path | None = None) -> list[CellConfig]:
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
        return _checked([_chosen(list(cell), conf) for cell in shared], conf)
    except ConfigError as error:
        if any("method.source." in word for word in overrides):
            raise
        # It was shared out to the source, and given for the method.
        raise ConfigError(str(error).replace("method.source.", "method.")) from error


def detector_grid(overrides: Sequence[str], conf: Path | None = None) -> list[CellConfig]:
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


def rescore(
    overrides: Sequence[str], names: Mapping[str, str], stored: Mapping[str, Any], conf: Path | None
) -> CellConfig:
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
    settings = _read_stored(stored, conf)
    before = {
        "model.clip": settings.model.clip,
        "model.clip_pretrained": settings.model.clip_pretrained,
        "weights": settings.weights,
        "real_images": settings.real_images,
    }
    # What metrics may refer to.
    words = [f"{key}={quoted(value)}" for key, value in before.items() if key not in typed and value is not None]
    if "metrics" not in typed:
        # Changes of single metrics are changes of those that the images were scored with.
        ConfigStore.instance().store(group="metrics", name=OWN_METRICS, node=settings.metrics)
        words.append(f"metrics={OWN_METRICS}")
    chosen = one([*overrides, *words, "method=none"], conf).settings
    for part in {"trainer", *(key.split(".")[0] for key in typed)} - {"prompts"}:
        setattr(settings, part, getattr(chosen, part))
    settings.prompts.references = chosen.prompts.references or settings.prompts.references
    return CellConfig(names, settings)


def _read_stored(stored: Mapping[str, Any], conf: Path | None) -> RunSettings:
    """Settings of a results folder, as data: nothing that they name is imported but what the user has.

    Raises:
        ConfigError: Another version wrote them, or they name or hold what no run writes down.
    """
    classes = named_classes(conf)
    for key, value in stored.items():
        if key != "method":  # is not made where images are scored; an audit looks at it
            check_stored(value, str(key), classes)
    try:
        settings = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(RunSettings), OmegaConf.create(dict(stored)))
        )
    except OmegaConfBaseException as error:
        raise ConfigError(f"another version wrote these settings ({first_line(error)}); run again") from error
    assert isinstance(settings, RunSettings)
    for name, node in settings.metrics.items():
        if not isinstance(node, Mapping) or "_target_" not in node:
            raise ConfigError(f"metrics.{name}: expected _target_ with the path of a class, given {node}")
    return settings


def one(overrides: Sequence[str], conf: Path | None) -> CellConfig:
    """The one cell that overrides ask for.

    Raises:
        ConfigError: See :func:`grid`; also where they ask for several.
    """
    choices = grid(overrides, conf)
    if len(choices) > 1:
        raise ConfigError(f"{len(choices)} sets of settings are asked for; images are scored with one value of each")
    return choices[0]


def _share_out(cells: Sequence[Sequence[str]], group: str, conf: Path | None) -> list[list[str]]:
    """The cells of several methods (detectors), each with those of their common settings that it has."""
    chosen = [next((word for word in words if word.startswith(f"{group}=")), "") for words in cells]
    if len(set(chosen)) < 2:
        return [list(words) for words in cells]
    for override in _parse(sorted(set(chosen))):
        _check_option(override, conf)

    @cache
    def composed(word: str) -> DictConfig:
        return _compose([word, *_search_path(conf)])

    def placed(word: str, chosen_one: str) -> list[str]:
        """The setting where this method has it, nowhere if only others have it."""
        key = word.split("=")[0]
        if not key.startswith(f"{group}."):
            return [word]
        of_source = key.replace(f"{group}.", f"{group}.source.", 1)
        own = composed(chosen_one)
        if _has(own, key):
            return [word]
        if _has(own, of_source):
            return [word.replace(key, of_source, 1)]
        others = [composed(other) for other in dict.fromkeys(chosen)]
        if any(_has(other, place) for other in others for place in (key, of_source)):
            return []
        known = {str(name) for other in others for name in (*other[group], *other[group].get("source", ()))}
        hint = did_you_mean(key.removeprefix(f"{group}."), known - {"_target_", "source", FAMILIES})
        raise ConfigError(f"unknown key '{key}': none of the {group}s that are compared has it. {hint}")

    with initialize_config_module("nemo_bench.conf", version_base="1.3"):
        return [[w for word in words for w in placed(word, own)] for words, own in zip(cells, chosen, strict=True)]


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
            axes.append([f"{override.get_key_element()}={v}" for v in _swept(override)])
        else:
            axes.append([str(override.input_line)])
    if (count := math.prod(map(len, axes))) > MOST_CELLS:
        raise ConfigError(f"{count:,} cells are asked for, more than {MOST_CELLS:,}; give fewer values")
    return [list(words) for words in itertools.product(*axes)]


def _swept(override: Override) -> list[str]:
    """The values of a sweep, no more than can be meant."""
    try:
        values = list(itertools.islice(swept(override), MOST_CELLS + 1))
    except Exception as error:  # Hydra raises what comes for ranges without end, choices of nothing and patterns
        msg = f"{override.input_line}: can't be multiplied out ({first_line(error) or type(error).__name__})"
        raise ConfigError(f"{msg}; give the values themselves, separated by commas") from error
    if not values or len(values) > MOST_CELLS:
        count = f"more than {MOST_CELLS:,}" if values else "no"
        raise ConfigError(f"{override.input_line}: stands for {count} values; give those that are meant")
    return values


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
    parsed = [read(word) for word in overrides]
    for override in parsed:
        # Nothing of Hydra's own matters here but where it looks for files, which --conf says.
        if override.key_or_group.split(".")[0].split("/")[0] == "hydra" and override.key_or_group != "hydra.searchpath":
            raise ConfigError(f"unknown key '{override.key_or_group}': Hydra's own settings are not taken")
    return parsed


def choose(overrides: Sequence[str], conf: Path | None) -> CellConfig:
    """The settings of overrides that hold one value each, an experiment's grid left aside; see :func:`grid`."""
    return _checked([_chosen(overrides, conf)], conf)[0]


def _checked(choices: list[CellConfig], conf: Path | None) -> list[CellConfig]:
    """The choices, once all that they name is found and then made; that it is not there is said before torch loads."""
    for settings in (choice.settings for choice in choices):
        nodes = {"method": settings.method, "detector": settings.detector}
        for key, node in (nodes | {f"metrics.{name}": node for name, node in settings.metrics.items()}).items():
            check_found(node, key, conf)
    for choice in choices:
        check_values(choice.settings)
    return choices


def _chosen(overrides: Sequence[str], conf: Path | None) -> CellConfig:
    parsed = _parse(overrides)
    for override in parsed:
        _check_option(override, conf)
    search = _search_path(conf)
    # Hydra knows no way to take an experiment back that is none already.
    parsed = [o for o in parsed if o.key_or_group != "experiment" or o.value() is not None]
    keys = [o.key_or_group for o in parsed]
    with initialize_config_module("nemo_bench.conf", version_base="1.3"):
        config = _composed(parsed, search)
    names = {group: str(name) for group, name in config.hydra.runtime.choices.items() if name and group in GROUPS}
    node = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
    written = _of_experiment(parsed, conf)
    named = next((own for own in (keys, written) if "prompts.files" in own), None)
    if named is not None:
        # What else a list of prompts has belongs to its own files; nothing of it holds for others.
        own = {key.removeprefix("prompts.") for key in {*named, *keys} if key.startswith("prompts.")}
        typed = {key: node.prompts[key] for key in node.prompts if key in own}
        node.prompts = OmegaConf.merge(OmegaConf.structured(PromptSettings), typed)
        names["prompts"] = name_of_files(list(node.prompts.files))
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunSettings), node))
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    assert isinstance(settings, RunSettings)
    settings.root = resolve(settings.root)
    given = [*keys, *written]
    for group in ("method", "detector"):
        given += _of_files(group, names[group], conf) if group in names else []
    nodes = {"method": settings.method, "detector": settings.detector}
    families = [
        found
        for key, own in nodes.items()
        if isinstance(own, dict)
        for found in settle(own, key, settings.model.family, given)
    ]
    return CellConfig(names, settings, tuple(families))


def _composed(parsed: Sequence[Override], search: Sequence[str]) -> DictConfig:
    """What overrides give, their keys checked: arguments of classes against their YAML, all others by their types."""
    groups = [str(o.input_line) for o in parsed if o.key_or_group in GROUPS]
    inner = [str(o.key_or_group) for o in parsed if o.key_or_group not in GROUPS and not o.is_add()]
    arguments = [key for key in inner if key.split(".")[0] in _BUILT]
    for key in inner:
        if key not in arguments and not key.startswith("hydra."):
            _check_typed(key)
    base = None
    if arguments:  # composing takes long, so only for these
        base = _compose([*groups, *search])
        for key in arguments:
            _check_key(key, base)
    return _compose([*(_word(override, base) for override in parsed), *search])


def _of_experiment(parsed: Sequence[Override], conf: Path | None) -> list[str]:
    """Settings of method, detector and prompts in the file of an experiment, other than in lines of its grid."""
    found = []
    for name in [str(o.value()) for o in parsed if o.key_or_group == "experiment" and o.value() is not None]:
        content = yaml.safe_load(file_of("experiment", name, conf).read_text(encoding="utf-8")) or {}
        found += [key for group in ("method", "detector", "prompts") for key in _keys(content.get(group, {}), group)]
    return found


def _of_files(group: str, name: str, conf: Path | None) -> list[str]:
    """Settings that a file holds which takes its settings by family over from another one."""
    if name not in options(group, conf):
        return []
    content = yaml.safe_load(file_of(group, name, conf).read_text(encoding="utf-8"))
    if not content or FAMILIES in content:
        return []
    bases = [base for base in content.pop("defaults", None) or [] if isinstance(base, str) and base != "_self_"]
    return [*_keys(content, group), *(key for base in bases for key in _of_files(group, base, conf))]


def _keys(node: Any, prefix: str) -> list[str]:
    """Full keys of all values in nested mappings."""
    if not isinstance(node, Mapping):
        return [prefix]
    return [key for name, value in node.items() for key in _keys(value, f"{prefix}.{name}")]


def _word(override: Override, base: DictConfig | None) -> str:
    """An override as Hydra takes it, its text kept; a single file need not be put into brackets.

    Args:
        override: The override.
        base: What the options of groups give, where settings of what is built from a class are overridden.
    """
    key = str(override.key_or_group)
    if key in GROUPS:
        return str(override.input_line)
    node: Any = base
    *parents, last = key.split(".")
    for parent in parents:
        node = node.get(parent) if OmegaConf.is_dict(node) else None
    target = node.get("_target_") if OmegaConf.is_dict(node) else None
    return kept(override, hint_of(target, last) if target else hint_in(RunSettings, key))


def name_of_files(files: Sequence[str]) -> str:
    """What prompts are called that are named by files alone."""
    return "+".join(re.sub(r"[^A-Za-z0-9._-]", "-", Path(resolve(file)).stem) for file in files)


def _search_path(conf: Path | None) -> list[str]:
    own = [Path(str(resources.files(name))) for name in plugins()] + ([conf.resolve()] if conf else [])
    places = [quoted(f"{ConfFolder.scheme()}://{folder}") for folder in own]
    return [f"hydra.searchpath=[{','.join(places)}]"] if places else []


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("run", overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        key = getattr(cause, "full_key", None)
        given = next((o for o in overrides if key and o.split("=")[0] == key), "")
        raise ConfigError(f"{given or 'settings'}: {_expected(str(key)) or first_line(cause)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"a YAML file can't be read: {' '.join(str(error).split())}") from error


def _expected(key: str) -> str:
    """What a setting takes, for an error message; empty where its type says nothing."""
    hint: Any = RunSettings
    for part in key.split("."):
        hint = get_type_hints(hint).get(part) if inspect.isclass(hint) else None
    if get_origin(hint) is Union:
        hint = get_args(hint)[0]
    return f"expected {spell(hint)}" if hint in SPELLED or get_origin(hint) is list else ""


def _check_option(override: Override, conf: Path | None) -> None:
    if override.key_or_group in GROUPS:
        choices = options(override.key_or_group, conf)
        value = "null" if override.value() is None else str(override.value())
        known = [("experiment", "null"), ("metrics", OWN_METRICS)]
        if value not in choices and (override.key_or_group, value) not in known:
            raise ConfigError(f"unknown {override.key_or_group} '{value}'. {did_you_mean(value, choices)}")


def _check_key(key: str, base: DictConfig) -> None:
    """Raises ConfigError where a key is not in what was composed."""
    parts = key.split(".")
    node: Any = base
    for depth, part in enumerate(parts):
        if not OmegaConf.is_dict(node) or part not in node:
            known = [k for k in node if k != "hydra"] if OmegaConf.is_dict(node) else []
            raise _unknown(parts, depth, map(str, known))
        node = node._get_node(part) if OmegaConf.is_missing(node, part) else node[part]


def _check_typed(key: str) -> None:
    """Raises ConfigError where a key is none of the typed settings."""
    parts = key.split(".")
    hint: Any = RunSettings
    for depth, part in enumerate(parts):
        known = get_type_hints(hint) if is_dataclass(hint) else {}
        if part not in known:
            raise _unknown(parts, depth, known)
        hint = known[part]


def _unknown(parts: Sequence[str], depth: int, known: Iterable[str]) -> ConfigError:
    """The error of a key whose part at some depth does not exist."""
    parent = ".".join(parts[:depth])
    where = f" in '{parent}'" if parent else ""
    return ConfigError(
        f"unknown key '{'.'.join(parts)}': there is no '{parts[depth]}'{where}. {did_you_mean(parts[depth], known)}"
    )


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
