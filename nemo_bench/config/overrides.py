"""Overrides in Hydra's grammar, and YAML files, whose text stays text whatever it looks like."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from typing_extensions import override

from nemo_bench.config.schema import RunSettings, type_of
from nemo_bench.config.targets import is_text
from nemo_bench.errors import ConfigError

SHOWN = 200
"""Longest word that an error message quotes."""
FILES = ("prompts.files", "prompts.memorized", "prompts.shared_from")
"""Lists of files; a single file needs no brackets."""
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z/._-]*[./_-][A-Za-z0-9/._-]*")
"""Paths that Hydra's grammar reads as text."""


def quoted(text: str) -> str:
    """A text as a value in Hydra's grammar: in quotes, except for plain paths.

    Example:
        >>> print(quoted("results (new)"))
        "results (new)"
    """
    inert = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)
    if _PLAIN.fullmatch(text):
        return text
    return QuotedString(inert, Quote.double).with_quotes()


def shell_word(key: str, value: str) -> str:
    """A ``key=value`` word for a shell whose value is exactly this text.

    Example:
        >>> print(shell_word("root", "results (new)"))
        'root="results (new)"'
    """
    return shlex.quote(f"{key}={quoted(value)}")


@cache  # a grid has the same few words in thousands of cells
def read(word: str) -> Override:
    """Reads a ``key=value`` word.

    Characters outside Hydra's grammar (``~``, ``&``, letters beyond ASCII, ``=`` in a value ...) need no quotes. A
    value that can't be read at all is taken literally where the setting is text, else the error shows it in quotes.
    """
    key, separator, value = word.partition("=")
    try:
        return _parse(f"{key}={_with_quotes(value)}" if separator else word)
    except (HydraException, RecursionError, ValueError) as error:
        hint = type_of(key)
        if separator and is_text(hint):
            return _parse(f"{key}={quoted(value)}")
        text = str(error).split("\n")[0][:SHOWN]
        advice = "write key=value, such as seeds=8 method=nemo"
        if separator and len(word) < SHOWN and (hint is Any or hint == list[str]):
            advice = f"a text with special characters goes into quotes: {_advised(key, value)}"
        raise ConfigError(f"can't read an override ({text}), given {word[:SHOWN]}; {advice}") from error


def _parse(word: str) -> Override:
    (override,) = OverridesParser.create().parse_overrides([word])
    return override


def _advised(key: str, value: str) -> str:
    if not value.startswith("["):
        return shell_word(key, value)
    items = value.removeprefix("[").removesuffix("]").split(",")
    return shlex.quote(f"{key}=[{','.join(quoted(item.strip()) for item in items)}]")


_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[\[\]{}(),]|[^'"\[\]{}(),]+|.""", re.DOTALL)
_KNOWN = re.compile(r"[A-Za-z0-9_/\-\\+.$%*@?|: \t]*")
_ESCAPED = re.compile(r"\\[\[\]{}(),:= \t]")


def _with_quotes(value: str) -> str:
    """Puts the parts of a value with characters outside Hydra's grammar in quotes."""
    if "${" in value or _ESCAPED.search(value):
        return value
    tokens = _TOKEN.findall(value)
    inside: list[str] = []
    for place, token in enumerate(tokens):
        if token in ("[", "{", "("):
            inside.append(token)
        elif token in ("]", "}", ")"):
            inside = inside[:-1]
        beside = tokens[max(0, place - 1) : place] + tokens[place + 1 : place + 2]
        if len(token) > 1 and token[0] not in "'\"" and not any(other[0] in "'\"" for other in beside):
            # In a dictionary keys end at a colon, in a function names of arguments at an equals sign.
            mark = {"{": ":", "(": "="}.get(inside[-1] if inside else "", "")
            parts = re.split(f"({mark})", token) if mark else [token]
            tokens[place] = "".join(part if part == mark else _in_quotes(part) for part in parts)
        elif len(token) == 1 and token not in "'\"[]{}()," and not _KNOWN.fullmatch(token):
            tokens[place] = quoted(token)
    return "".join(tokens)


def _in_quotes(part: str) -> str:
    core = part.strip(" \t")
    return part if _KNOWN.fullmatch(core) else part.replace(core, quoted(core))


def sweep_words(override: Override) -> Iterator[str]:
    """One word for each value of a sweep, as it was typed."""
    values = str(override.input_line).partition("=")[2].strip()
    function = re.fullmatch(r"(\w+)\((.*)\)", values, re.DOTALL)
    if not isinstance(override._value, ChoiceSweep) or (function and function[1] != "choice"):
        items = override.sweep_string_iterator()
    else:
        items = iter(_items(function[2] if function else values))
    yield from (f"{override.get_key_element()}={item}" for item in items)


def value_of(override: Override, hint: Any) -> Any:
    """The value of an override without a sweep; where the setting is text, as it was typed, whatever it looks like."""
    value = override.value()
    is_list = get_origin(hint) is list
    if override.is_delete() or not is_text(get_args(hint)[0] if is_list else hint):
        return value
    if value is None and (is_list or NoneType in get_args(hint)):
        return None
    text = str(override.input_line).partition("=")[2].strip()
    if isinstance(value, list):
        return [_as_text(item, typed) for item, typed in zip(value, _items(text[1:-1]), strict=True)]
    is_single = override.key_or_group in FILES
    return [_as_text(value, text)] if is_single else _as_text(value, text)


def _as_text(value: Any, text: str) -> Any:
    """The text of what Hydra reads as a number, a truth value or null; other values as they are."""
    return text if value is None or isinstance(value, bool | int | float) else value


def _items(text: str) -> list[str]:
    """Splits a text at commas outside quotes and brackets."""
    if not text.strip():
        return []
    items = [""]
    depth = 0
    for token in _TOKEN.findall(text):
        depth += (token in "[{(") - (token in "]})")
        if token == "," and not depth:
            items.append("")
        else:
            items[-1] += token
    return [item.strip() for item in items]


class ConfFolder(FileConfigSource):  # type: ignore[misc]
    """A user's folder of YAML files, in which settings that are text are read as text."""

    @staticmethod
    @override
    def scheme() -> str:
        return "conf"

    @override
    def load_config(self, config_path: str) -> ConfigResult:
        found = super().load_config(config_path)
        group = config_path.split("/")[0]
        schema = RunSettings if found.header["package"] == "_global_" else type_of(group)
        with open(f"{self.path}/{self._normalize_file_name(config_path)}", encoding="utf-8") as stream:
            loader = get_yaml_loader()(stream)
            node = loader.get_single_node()
        if node is not None:
            _keep_text(node, schema)
            found.config = OmegaConf.create(loader.construct_document(node))
        return found


_CHANGED = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "timestamp")}


def _keep_text(node: yaml.Node, hint: Any) -> None:
    """Marks scalars as text where the settings are text."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _keep_text(value, type_of(str(key.value), hint))
    elif isinstance(node, yaml.SequenceNode) and get_origin(hint) is list:
        for value in node.value:
            _keep_text(value, get_args(hint)[0])
    elif is_text(hint) and node.tag in _CHANGED:
        node.tag = "tag:yaml.org,2002:str"


Plugins.instance().register(ConfFolder)
