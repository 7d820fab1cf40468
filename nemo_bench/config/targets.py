"""Objects that settings describe by ``_target_``, their arguments checked."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from nemo_bench.errors import ConfigError, nearest


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
        raise ConfigError(f"{key}._target_={node['_target_']}: can't be imported ({first_line(error)})") from error
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
            raise ConfigError(f"{key}.{name}={value}: expected {spell(hints[name])}, given {value!r}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments and p.kind not in (2, 4)]
    if missing:
        raise ConfigError(f"{key}: {node['_target_']} also needs {', '.join(missing)}")
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {node['_target_']} can't be made ({first_line(error)})") from error


def hint_of(path: str, argument: str) -> Any:
    """The type of an argument of a class, Any where that is not known; :func:`build` says what is wrong there."""
    try:
        target = get_object(path)
        return get_type_hints(target.__init__ if inspect.isclass(target) else target).get(argument, Any)
    except Exception:
        return Any


def resolve(path: str) -> str:
    """A path as given, from the home folder for ``~``, or one in this package for ``package:...``.

    A ``local-dir:`` before either is kept.
    """
    prefix, _, rest = path.rpartition("package:")
    return prefix + str(resources.files("nemo_bench") / rest) if _ else os.path.expanduser(path)


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
"""Types in plain words."""


def spell(hint: Any) -> str:
    """A type hint in plain words."""
    if hint in SPELLED:
        return SPELLED[hint]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return "a list, in brackets"
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")


def first_line(error: BaseException) -> str:
    """What an error says first."""
    first, *rest = str(error).strip().split("\n")
    # Hydra may open with where it was, and say what is wrong in the next line.
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first
