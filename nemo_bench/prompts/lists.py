"""Parsing of lists of links or file names in a table cell, in all forms that programs write."""

from __future__ import annotations

import ast
import re
from typing import Any

from nemo_bench.records.io import parse_json

_OPENING = re.compile(r"\s*(?:array\()?[\[({'\"]")
"""Start of a written list."""
_CLOSING = {"[": "]", "(": ")", "{": "}", "a": ")", "'": "'", '"': '"'}
"""Its end, by its first letter."""
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
"""A quoted text, as Python and numpy write it."""
_BETWEEN = re.compile(r"(?:array\(|np\.str_\(|nan|None|null|[\[\](){},|;\s])*")
"""Everything allowed between quoted texts."""
_TYPE = re.compile(r",\s*dtype=['\"\w<>|]+(?=\)\s*$)")
"""End of a numpy array."""
_BETWEEN_LINKS = re.compile(r"[\s,;|]+(?=https?://)", re.IGNORECASE)
_NO_LINK = {"", "nan", "none", "null", "[]"}
_LOGIN = re.compile(r"^(\s*(?:[a-z][a-z0-9+.-]*:)?//)[^/?#]*@", re.IGNORECASE)


def split_list(value: Any) -> list[str] | None:
    """Parses a cell: a list of texts and None, nothing (None or NaN), one text, or a list written out as text.

    JSON, Python and pandas write lists as ``['a', 'b']``, numpy as ``['a' 'b']`` over several lines.

    Returns:
        The texts; a text that is no list is a list of one. None for anything else, and for a list cut short (``...``).
    """
    if value is None or value != value:
        return []
    if isinstance(value, list):
        return [text for text in value if text is not None] if all(isinstance(t, str | None) for t in value) else None
    if not isinstance(value, str):
        return None
    if not _OPENING.match(value):
        return [value]
    try:
        read = parse_json(value)
    except ValueError:
        read = None
    if isinstance(read, list):
        return split_list(read)
    value = _TYPE.sub("", value).strip()
    if not value.endswith(_CLOSING[value[0]]):
        return None
    quoted = _QUOTED.findall(value)
    if not all(_BETWEEN.fullmatch(part) for part in _QUOTED.split(value)):
        # Brackets around texts without quotes, as some programs write lists.
        return [value[1:-1]] if not quoted and "://" in value else None
    try:
        return [ast.literal_eval(re.sub(r"[\r\n]+", "", text)) for text in quoted]
    except (ValueError, SyntaxError):
        return None


def split_links(text: str) -> list[str]:
    """Splits a text of links, or of none (also ``nan``, ``None``), at spaces, line breaks, ``,``, ``;`` and ``|``.

    A link may hold these characters, so it ends only where ``http://`` or ``https://`` comes next.
    """
    links = (part.strip(" \t\r\n\f\v,;|") for part in _BETWEEN_LINKS.split(text))
    return [link for link in links if link.lower() not in _NO_LINK]


def without_login(link: str) -> str:
    """Removes user name and password from a link (``https://user:password@host``)."""
    return _LOGIN.sub(r"\1", link)
