"""Lists in a cell, in all the ways that tables have them."""

from __future__ import annotations

import ast
import re
from typing import Any

from nemo_bench.records.io import parse_json

_OPENING = re.compile(r"\s*(?:array\()?[\[({'\"]")
"""How a written list begins."""
_CLOSING = {"[": "]", "(": ")", "{": "}", "a": ")", "'": "'", '"': '"'}
"""How it ends, by its first letter."""
_TEXT = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
"""A quoted text, as Python and numpy write it."""
_BETWEEN = re.compile(r"(?:array\(|np\.str_\(|nan|None|null|[\[\](){},|;\s])*")
"""What may stand between the quoted texts of a list."""
_TYPE = re.compile(r",\s*dtype=['\"\w<>|]+(?=\)\s*$)")
"""What numpy writes at the end of an array."""
_BETWEEN_LINKS = re.compile(r"[\s,;|]+(?=https?://)", re.IGNORECASE)
_AROUND_LINKS = " \t\r\n\f\v,;|"
_NO_LINK = {"", "nan", "none", "null", "[]"}
_LOGIN = re.compile(r"^(\s*(?:[a-z][a-z0-9+.-]*:)?//)[^/?#]*@", re.IGNORECASE)


def split_list(value: Any) -> list[str] | None:
    """The texts of a list, or of a list that was written out as text.

    Args:
        value: A list of texts, in which None stands for nothing; None or NaN; one text; or a text that holds such a
            list as JSON, Python, pandas (``['a', 'b']``) or numpy (``['a' 'b']``, over several lines) write it.

    Returns:
        The texts; a text that is no list, by itself. None where there is something else, or a list was cut (``...``).
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
    quoted = _TEXT.findall(value)
    if not value.endswith(_CLOSING[value[0]]):
        return None
    if not all(_BETWEEN.fullmatch(part) for part in _TEXT.split(value)):
        # Brackets around texts without quotes, as some programs write lists.
        return [value[1:-1]] if not quoted and "://" in value else None
    try:
        return [ast.literal_eval(re.sub(r"[\r\n]+", "", text)) for text in quoted]
    except (ValueError, SyntaxError):
        return None


def split_links(text: str) -> list[str]:
    """The links in a text, separated by spaces, lines, ``,``, ``;`` or ``|``.

    These may be part of a link too, so a link only ends where ``http://`` or ``https://`` comes next.

    Args:
        text: One link, several, or none (also ``nan``, ``None``).

    Returns:
        The links, in their order.
    """
    parts = (part.strip(_AROUND_LINKS) for part in _BETWEEN_LINKS.split(text))
    return [part for part in parts if part.lower() not in _NO_LINK]


def without_login(link: str) -> str:
    """A link without the user name and password that stand before its host (``https://user:password@host``)."""
    return _LOGIN.sub(r"\1", link)
