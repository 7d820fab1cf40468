"""What became of the links to training images: one line a link, written by ``nemo-bench references``."""

from __future__ import annotations

from pathlib import Path

from nemo_bench.errors import PromptError
from nemo_bench.records.data import Record
from nemo_bench.records.io import parse_json

MANIFEST = "manifest.jsonl"
"""Name of the file in a folder of fetched images."""


def read_manifest(folder: Path) -> dict[str, Record]:
    """Reads what was fetched to a folder.

    An entry has ``url``; ``prompts``, ids by list; ``status``, ``ok`` or ``dead``. A fetched one has ``file``,
    ``sha256``, ``bytes``, ``format``, ``width`` and ``height``; a dead one has ``why`` and ``may_heal``, whether the
    same may go well another day.

    Args:
        folder: The folder.

    Returns:
        Entries by link, the last one where there are several; empty where nothing was fetched yet. A last line torn by
        a kill is dropped.

    Raises:
        PromptError: A line in the middle is no entry.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    entries: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry: Record = parse_json(line)
            entries[entry["url"]] = {**entry, "status": entry["status"], "prompts": entry.get("prompts", {})}
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            msg = f"{path}, line {number} is no entry of fetched images; delete that line, its link is tried again"
            raise PromptError(msg) from None
    return entries
