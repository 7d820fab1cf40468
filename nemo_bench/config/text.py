"""Text in settings: what was typed or written is what it becomes, whatever it looks like."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import (
    CommonTokenStream,
    InputStream,
    OverrideLexer,
    OverrideParser,
    OverridesParser,
    create_functions,
)
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from nemo_bench.config.schema import RunSettings
from nemo_bench.errors import ConfigError

SHOWN = 200
"""Longest word that an error message shows again."""
FILES = ("prompts.files", "prompts.memorized", "prompts.shared_from")
"""Lists of files of which a single one needs no brackets."""
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z/._-]*[./_-][A-Za-z0-9/._-]*")
"""Paths that no grammar takes for anything else."""


def quoted(text: str) -> str:
    """A text as Hydra's grammar takes it for just that: in quotes, but for plain paths.

    Example:
        >>> print(quoted("results (new)"))
        "results (new)"
    """
    inert = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)
    if _PLAIN.fullmatch(text):
        return text
    return QuotedString(inert, Quote.double).with_quotes()


def shell_word(key: str, value: str) -> str:
    """A setting as it is typed in a shell so that its value is this text.

    Example:
        >>> print(shell_word("root", "results (new)"))
        'root="results (new)"'
    """
    return shlex.quote(f"{key}={quoted(value)}")


def read(word: str) -> Override:
    """Reads a ``key=value`` word.

    Characters that Hydra's grammar has no use for (``~``, ``&``, letters beyond ASCII, ``=`` in a value ...) need no
    quotes, and a value that it can't read at all is taken as it is where the setting is a text.

    Raises:
        ConfigError: It can't be read; the message has the word in quotes.
    """
    key, separator, value = word.partition("=")
    try:
        return _parse(f"{key}={_with_quotes(value)}" if separator else word)
    except (HydraException, RecursionError, ValueError) as error:
        hint = hint_in(RunSettings, key)
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
    """A value in which parts with characters that Hydra's grammar does not know are in quotes."""
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


@dataclass(frozen=True)
class _AsTyped(QuotedString):  # type: ignore[misc]
    """What looks like a number, a truth value or null, as it was typed."""

    def with_quotes(self) -> str:
        return self.text


class _Source(HydraOverrideVisitor):  # type: ignore[misc]
    """Reads values as they were typed; what functions other than ``choice`` are given stays what Hydra makes of it."""

    def visitPrimitive(self, ctx: Any) -> Any:  # noqa: N802 - a name of the grammar
        value = super().visitPrimitive(ctx)
        return value if isinstance(value, str | QuotedString) else _AsTyped(ctx.getText().strip(), Quote.single)

    def visitFunction(self, ctx: Any) -> Any:  # noqa: N802
        if ctx.getChild(0).getText() == "choice":
            return super().visitFunction(ctx)
        return HydraOverrideVisitor(self.functions).visitFunction(ctx)


def _as_typed(override: Override) -> Override:
    lexer = OverrideLexer(InputStream(override.input_line))
    parser = OverrideParser(CommonTokenStream(lexer))
    for reader in (lexer, parser):
        reader.removeErrorListeners()
        reader.addErrorListener(HydraErrorListener())
    found = _Source(create_functions()).visit(parser.override())
    found.input_line = override.input_line
    return found


def swept(override: Override) -> Iterator[str]:
    """The values of a sweep, each as it was typed."""
    choices = isinstance(override._value, ChoiceSweep)
    yield from (_as_typed(override) if choices else override).sweep_string_iterator()


def kept(override: Override, hint: Any) -> str:
    """An override of one value as a word for Hydra, in which what is to be text is text.

    Args:
        override: What was typed.
        hint: The type of the setting; only text and lists of it are looked at.
    """
    items = get_args(hint)[0] if get_origin(hint) is list else hint
    if override.is_delete() or not is_text(items):
        return str(override.input_line)
    typed = _as_typed(override)
    value = typed._value  # value() takes quotes away
    is_null = isinstance(value, _AsTyped) and value.text.lower() == "null"
    found = value
    if get_origin(hint) is list:
        if isinstance(value, list):
            found = [_text(item) for item in value]
        elif override.key_or_group in FILES and not is_null:
            found = [_text(value)]
    elif not (is_null and NoneType in get_args(hint)):
        found = _text(value)
    if found == value:
        return str(override.input_line)
    return f"{override.get_key_element()}={replace(typed, _value=found).get_value_element_as_str()}"


def _text(value: Any) -> Any:
    return QuotedString(value.text, Quote.single) if isinstance(value, _AsTyped) else value


def is_text(hint: Any) -> bool:
    """Whether a type takes text, or text and None, and nothing else."""
    if get_origin(hint) in (Union, UnionType):
        options = [option for option in get_args(hint) if option is not NoneType]
        return bool(options) and all(map(is_text, options))
    return hint is str or (get_origin(hint) is Literal and all(isinstance(v, str) for v in get_args(hint)))


def hint_in(schema: Any, key: str) -> Any:
    """The type of a setting in a dataclass of settings, Any where it has no such setting."""
    hint: Any = schema
    for part in key.split("."):
        hint = get_type_hints(hint).get(part, Any) if is_dataclass(hint) else Any
    return hint


class ConfFolder(FileConfigSource):  # type: ignore[misc]
    """A folder of YAML files of the user's own, in which settings that are text are read as text."""

    @staticmethod
    def scheme() -> str:
        """What its addresses begin with."""
        return "conf"

    def load_config(self, config_path: str) -> ConfigResult:
        """Reads a file; see :class:`hydra.plugins.config_source.ConfigSource`."""
        found = super().load_config(config_path)
        group = config_path.split("/")[0]
        schema = RunSettings if found.header["package"] == "_global_" else hint_in(RunSettings, group)
        with open(f"{self.path}/{self._normalize_file_name(config_path)}", encoding="utf-8") as stream:
            loader = get_yaml_loader()(stream)
            try:
                node = loader.get_single_node()
                if node is None:
                    return found
                _keep_text(node, schema)
                found.config = OmegaConf.create(loader.construct_document(node))
            finally:
                loader.dispose()
        return found


_CHANGED = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "timestamp")}


def _keep_text(node: yaml.Node, hint: Any) -> None:
    """Makes scalars text where the settings are text."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _keep_text(value, hint_in(hint, str(key.value)))
    elif isinstance(node, yaml.SequenceNode) and get_origin(hint) is list:
        for value in node.value:
            _keep_text(value, get_args(hint)[0])
    elif is_text(hint) and node.tag in _CHANGED:
        node.tag = "tag:yaml.org,2002:str"


Plugins.instance().register(ConfFolder)
