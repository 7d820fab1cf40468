"""Objects described by ``_target_`` and arguments: checked, then built."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from nemo_bench.errors import ConfigError, did_you_mean

BASES = {
    "method": "nemo_bench.methods.Method",
    "detector": "nemo_bench.detectors.Detector",
    "metrics": "nemo_bench.metrics.BenchMetric",
}
"""Base class of the objects of a group, by the first part of their key."""
_PACKAGE = "nemo_bench"


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
        parameters = inspect.signature(target).parameters
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
        check_type(f"{key}.{name}", value, hints.get(name, Any))
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
        target = get_object(path)
        return (_hints(target) if inspect.isclass(target) else get_type_hints(target)).get(argument, Any)
    except Exception:
        return Any


def _hints(target: type) -> dict[str, Any]:
    """Types of the arguments of a class; those of a dataclass may be names in the modules of its bases."""
    names: dict[str, Any] = {}
    for kind in reversed(target.__mro__):
        names |= vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
    return get_type_hints(target.__init__, names)  # type: ignore[misc] # of a class, not of an object


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
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    found = [get_origin(option) or option for option in options]
    return tuple(kind for kind in found if inspect.isclass(kind) and kind not in (type(None), Any)) or (object,)


def check_found(node: Any, key: str, conf: Path | None) -> None:
    """Checks that Python finds the modules of all classes that a node names, without importing them.

    Args:
        node: ``_target_`` and arguments, which may be such nodes themselves.
        key: Key of the node, for messages.
        conf: The user's folder of YAML files.

    Raises:
        ConfigError: A module is missing; the message lists the folders that were searched.
    """
    if not isinstance(node, Mapping):
        return
    target = node.get("_target_")
    name = target.partition(".")[0] if isinstance(target, str) else ""
    if name and name not in sys.modules and not find_spec(name):
        near = [Path.cwd(), *([conf.resolve(), conf.resolve().parent] if conf else [])]
        folder = next((str(p) for p in near if (p / f"{name}.py").is_file() or (p / name).is_dir()), None)
        looked = ", ".join(path for path in (path or str(Path.cwd()) for path in sys.path) if Path(path).is_dir())
        found = f"{name} is in {folder}" if folder else f"name the folder that {name}.py is in"
        raise ConfigError(
            f"{key}._target_={target}: can't be imported; there is no module {name} in the folders that Python looks "
            f"in: {looked}. (--conf is for YAML files alone.) {found}: export PYTHONPATH={folder or 'FOLDER'}, or "
            "install its package"
        )
    for argument, value in node.items():
        check_found(value, f"{key}.{argument}", conf)


def check_stored(node: Any, key: str, known: Collection[str]) -> None:
    """Checks a node of a results folder, which may come from anybody, without importing unknown code.

    Args:
        node: The node; its classes must be of this package or of ``known``.
        key: Key of the node, for messages.
        known: Classes of the user's YAML files; see :func:`nemo_bench.config.groups.named_classes`.

    Raises:
        ConfigError: The node names another class, or holds an interpolation or another key with a meaning for Hydra.
    """
    if isinstance(node, str) and "${" in node:
        raise ConfigError(f"{key}={node}: settings of a results folder are resolved, this one was put in; take it out")
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name != "_target_" and not re.fullmatch(r"[A-Za-z]\w*", str(name)):
                raise ConfigError(f"{key}.{name}: no such setting is written to a results folder; take it out")
            check_stored(value, f"{key}.{name}", known)
        if "_target_" in node:
            _check_known(node, key, known)
    elif isinstance(node, list | tuple):
        for value in node:
            check_stored(value, key, known)


def _check_known(node: Mapping[str, Any], key: str, known: Collection[str]) -> None:
    name = str(node["_target_"])
    if name in known:
        return
    first, *parts = name.split(".")
    is_ours = first == _PACKAGE and not any(part.startswith("_") for part in parts)
    # Modules of the package also have names that they imported, such as subprocess.Popen.
    if is_ours and _class_of(node, key, (object,)).__module__.split(".")[0] == _PACKAGE:
        return
    msg = f"{key}._target_={name}: a results folder names this, and it is no class of {_PACKAGE} nor of a YAML file of "
    raise ConfigError(f"{msg}yours; if you trust it, give --conf DIR with the file that names it")


def resolve(path: str) -> str:
    """Replaces ``~`` by the home folder and ``package:`` by the folder of this package; ``local-dir:`` stays."""
    prefix, separator, rest = path.rpartition("package:")
    if not separator:
        return os.path.expanduser(path)
    return prefix + str(resources.files(_PACKAGE) / rest)


def check_type(key: str, value: Any, hint: Any) -> None:
    """Raises ConfigError where an argument does not fit its annotation."""
    if not _fits(value, hint):
        raise ConfigError(f"{key}={value}: expected {spell(hint)}, given {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value if inner)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if inspect.isclass(kind) else True


def is_text(hint: Any) -> bool:
    """Whether a type takes text, or text and None, and nothing else."""
    if get_origin(hint) in (Union, UnionType):
        options = [option for option in get_args(hint) if option is not NoneType]
        return bool(options) and all(map(is_text, options))
    return hint is str or (get_origin(hint) is Literal and all(isinstance(v, str) for v in get_args(hint)))


def spell(hint: Any) -> str:
    """A type in plain words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list, in brackets"}
    return plain.get(hint) or (hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", ""))


def first_line(error: BaseException) -> str:
    """The first line of an error message."""
    first, *rest = str(error).strip().split("\n")
    # Hydra may begin with a place, and explain the error in the next line.
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first
