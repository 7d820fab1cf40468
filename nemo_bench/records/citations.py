"""BibTeX of the papers that methods, detectors and metrics come from."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources


def cite(key: str) -> str:
    """The entry of ``citations.bib`` with a key, such as ``"wen2024detecting"``.

    Raises:
        KeyError: There is no such entry.
    """
    return _entries()[key]


@cache
def _entries() -> dict[str, str]:
    text = (resources.files("nemo_bench.records") / "citations.bib").read_text(encoding="utf-8")
    entries = (entry.strip() for entry in re.split(r"\n(?=@)", text))
    return {entry.partition("{")[2].partition(",")[0]: entry for entry in entries}
