"""Texts of the fields of classes: comments ``#:``, behind a field or in the lines above it."""

from __future__ import annotations

import re

_FIELD = re.compile(r"^((?:    #: .*\n)*)    (\w+): .*?(?:  #: (.*))?$", re.MULTILINE)


def field_texts(source: str) -> dict[str, str]:
    """What the source of a class says of its fields, by name."""
    found = {name: f"{above.replace('#:', '')}{behind}" for above, name, behind in _FIELD.findall(source)}
    return {name: " ".join(text.split()) for name, text in found.items() if text}
