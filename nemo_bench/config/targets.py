"""Values checked against types, and objects described by ``_target_`` and arguments: checked, then built."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from pydantic import ValidationError

from nemo_bench.errors import ConfigError, did_you_mean, first_line, shortened
from nemo_bench.records.ranges import validator

BASES = {
    "method": "nemo_bench.methods.Method",
    "detector": "nemo_bench.detectors.Detector",
    "localizer": "nemo_bench.localization.localizers.Localizer",
    "region": "nemo_bench.detectors.regions.RegionLocalizer",
    "metrics": "nemo_bench.metrics.BenchMetric",
}
"""Base class of the objects of a group, by the first part of their key."""
_PACKAGE = "nemo_bench"
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list, in brackets",
}
"""Plain words for errors of pydantic."""


def build(node: Mapping[str, Any], key: str) -> Any:
    """Builds the object that a node describes, its arguments checked against the constructor.

    A class is called only if it derives from the base class of its group (:data:`BASES`), or fits the annotation of
    the argument that it is for.

    Args:
        node: ``_target_`` with the path of a class, and its arguments, which may be nodes themselves.
        key: Key of the node, for messages; its first part is one of :data:`BASES`.

    Raises:
        ConfigError: The class can't be imported or is of another kind, or an argument is unknown, missing or of the
            wrong type.
    """
    return _build(node, key, (get_object(BASES[key.split(".")[0]]),))


def _build(node: Mapping[str, Any], key: str, expected: tuple[type, ...]) -> Any:
    target: Any = _class_of(node, key, expected)
    arguments = {k: v for k, v in node.items() if k != "_target_"}
    try:
        parameters = _parameters(target)
        hints = _hints(target)
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(f"{key}._target_={node['_target_']}: is no class that can be made here ({error})") from error
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not open_ended:
            raise ConfigError(f"unknown key '{key}.{name}'. {did_you_mean(name, parameters)}")
        if isinstance(value, Mapping) and "_target_" in value:
            value = arguments[name] = _build(value, f"{key}.{name}", _classes(hints.get(name)))
        elif isinstance(value, str):
            arguments[name] = resolve(value)
        check_value(f"{key}.{name}", value, hints.get(name, Any))
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments and p.kind not in (2, 4)]
    if missing:
        raise ConfigError(f"{key}: {node['_target_']} also needs {', '.join(missing)}")
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {node['_target_']} can't be made ({first_line(error)})") from error


def hint_of(path: str, argument: str) -> Any:
    """The type of an argument of a class, Any where it is unknown; :func:`build` explains the error then."""
    try:
        target: Any = get_object(path)
        hints: dict[str, Any] = _hints(target) if isinstance(target, type) else get_type_hints(target)
        return hints.get(argument, Any)
    except Exception:
        return Any


@cache
def _parameters(target: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(target).parameters


@cache
def _hints(target: Any) -> dict[str, Any]:
    """Types of the arguments of a class; those of a dataclass may be names in the modules of its bases."""
    names: dict[str, Any] = {}
    for kind in reversed(target.__mro__):
        names |= vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
    return get_type_hints(target.__init__, names)


def _class_of(node: Mapping[str, Any], key: str, expected: tuple[type, ...]) -> type:
    """The class that a node names, checked against the expected classes."""
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}: expected _target_ with the path of a class, given {node}")
    try:
        target: Any = get_object(node["_target_"])
    except Exception as error:
        raise ConfigError(f"{key}._target_={node['_target_']}: can't be imported ({first_line(error)})") from error
    if not inspect.isclass(target) or not issubclass(target, expected):
        names = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in expected)
        what = "a class" if expected == (object,) else f"a class of {names}"
        raise ConfigError(f"{key}._target_={node['_target_']}: expected {what}")
    return target


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes that an annotation allows, object for others."""
    found = [get_origin(option) or option for option in _options(hint)]
    return tuple(kind for kind in found if inspect.isclass(kind) and kind not in (NoneType, Any)) or (object,)


def _walk(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """A node and everything inside it, each with its key."""
    yield key, node
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _walk(value, f"{key}.{name}")
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _walk(value, key)


def targets_in(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The classes that a node and all nodes inside it name as ``_target_``, each after the key of its node."""
    for place, value in _walk(node, key):
        if isinstance(value, Mapping) and isinstance(value.get("_target_"), str):
            yield place, value["_target_"]


def check_found(node: Any, key: str, conf: Path | None) -> None:
    """Checks that Python finds the modules of all classes that a node names, without importing them.

    The ConfigError of a missing module lists the folders that were searched; the user's ``conf`` is not one.
    """
    for place, target in targets_in(node, key):
        name = target.partition(".")[0]
        if not name or name in sys.modules or find_spec(name):
            continue
        near = [Path.cwd(), *([conf.resolve(), conf.resolve().parent] if conf else [])]
        folder = next((str(p) for p in near if (p / f"{name}.py").is_file() or (p / name).is_dir()), None)
        looked = ", ".join(path for path in (path or str(Path.cwd()) for path in sys.path) if Path(path).is_dir())
        found = f"{name} is in {folder}" if folder else f"name the folder that {name}.py is in"
        raise ConfigError(
            f"{place}._target_={target}: can't be imported; there is no module {name} in the folders that Python looks "
            f"in: {looked}. (--conf is for YAML files alone.) {found}: export PYTHONPATH={folder or 'FOLDER'}, or "
            "install its package"
        )


def check_stored(node: Any, key: str, known: Collection[str]) -> None:
    """Checks a node of a results folder, which may come from anybody, without importing unknown code.

    Its classes must be of this package or of ``known``, those of the user's YAML files; an interpolation or another
    key with a meaning for Hydra is a ConfigError too.
    """
    for place, value in _walk(node, key):
        if isinstance(value, str) and "${" in value:
            msg = f"{place}={value}: settings of a results folder are resolved, this one was put in; take it out"
            raise ConfigError(msg)
        if not isinstance(value, Mapping):
            continue
        for name in value:
            if name != "_target_" and not re.fullmatch(r"[A-Za-z]\w*", str(name)):
                raise ConfigError(f"{place}.{name}: no such setting is written to a results folder; take it out")
        if "_target_" in value and str(value["_target_"]) not in known and not _is_ours(value, place):
            raise ConfigError(
                f"{place}._target_={value['_target_']}: a results folder names this, and it is no class of {_PACKAGE} "
                "nor of a YAML file of yours; if you trust it, give --conf DIR with the file that names it"
            )


def _is_ours(node: Mapping[str, Any], key: str) -> bool:
    """Whether a node names a class of this package, whose modules also have names that they imported."""
    first, *parts = str(node["_target_"]).split(".")
    is_public = first == _PACKAGE and not any(part.startswith("_") for part in parts)
    return is_public and _class_of(node, key, (object,)).__module__.split(".")[0] == _PACKAGE


def resolve(path: str) -> str:
    """Replaces ``~`` by the home folder and ``package:`` by the folder of this package; ``local-dir:`` stays."""
    prefix, separator, rest = path.rpartition("package:")
    if not separator:
        return os.path.expanduser(path)
    return prefix + str(resources.files(_PACKAGE) / rest)


def check_value(key: str, value: Any, hint: Any) -> Any:
    """A value in its type, whole numbers as float where that is the type.

    The ConfigError of a value of another type or out of range names key, value, and choices with the nearest one.
    """
    try:
        return validator(hint).validate_python(value)
    except ValidationError as error:
        errors = error.errors()
    if isinstance(value, list) and any(e["type"] == "tuple_type" for e in errors):  # YAML has no tuples
        return check_value(key, tuple(value), hint)
    choices = [str(c) for option in _options(hint) if get_origin(option) is Literal for c in get_args(option)]
    words = {**_EXPECTED, "literal_error": f"one of {', '.join(choices)}"} if len(choices) > 1 else _EXPECTED
    expected = [words.get(e["type"]) or e["msg"].removeprefix("Input should be ") for e in errors]
    inside = " in every place of the list" if any(isinstance(part, int) for e in errors for part in e["loc"]) else ""
    advice = f". {did_you_mean(str(value), choices)}" if choices else ""
    given, exact = shortened(str(value), 40), shortened(repr(value), 40)
    raise ConfigError(f"{key}={given}: expected {' or '.join(dict.fromkeys(expected))}{inside}, given {exact}{advice}")


def is_text(hint: Any) -> bool:
    """Whether a type takes text, or text and None, and nothing else."""
    values: list[Any] = []
    for option in _options(hint):
        values += get_args(option) if get_origin(option) is Literal else [option]
    return values != [NoneType] and all(value in (str, NoneType) or isinstance(value, str) for value in values)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of another type that alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
