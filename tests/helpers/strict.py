"""Reads every JSON of a folder as a strict parser does."""

from __future__ import annotations

import json
from pathlib import Path


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def read_strictly(folder: Path) -> int:
    """Parses all files of JSON in a folder; returns how many there are.

    Raises:
        AssertionError: One of them holds NaN or Infinity.
    """
    files = [*folder.rglob("*.json"), *folder.rglob("*.jsonl"), *folder.rglob("*.done")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=_refuse)
    return len(files)
