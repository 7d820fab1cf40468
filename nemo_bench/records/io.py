"""Files written whole, read with errors that name them, and hashed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_bench.errors import StoreError, did_you_mean
from nemo_bench.records.images import visible


def as_json(content: Any, indent: int | None = None) -> str:
    """JSON that every parser reads: numbers that are not finite become null, since JSON has none."""
    try:
        return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(content: Any) -> Any:
    """The same content with None in place of numbers that are not finite."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def check_folder(folder: Path, wanted: str = "a run, a cell, or a folder of images") -> None:
    """Refuses a path that is no folder.

    Args:
        folder: Where results or images are.
        wanted: What the folder should be, for the message.

    Raises:
        StoreError: There is none; names the nearest of those beside it.
    """
    if folder.is_dir():
        return
    if folder.exists():
        raise StoreError(f"{folder} is no folder; give {wanted}")
    parent = folder.parent
    names = [path.name for path in visible(parent.iterdir(), parent) if path.is_dir()] if parent.is_dir() else []
    raise StoreError(
        f"{folder} does not exist; give {wanted}. {did_you_mean(folder.name, names) if names else ''}".rstrip()
    )


def check_writable(folder: Path) -> None:
    """Makes sure that a folder can be written to or made, by a nameless file that is gone at once.

    Raises:
        StoreError: It can't, or something else has its name.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise StoreError(f"root={folder}: {place} is no folder; name a folder for results: root=FOLDER")
    try:
        # os.access says yes to root even where nobody can write.
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        msg = f"root={folder}: {place} can't be written to ({error.strerror}); name a folder that can: root=FOLDER"
        raise StoreError(msg) from error


def write_text(path: Path, content: str) -> None:
    """Writes a file under a temporary name, then renames it, so that a reader never sees half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; see :func:`write_text`."""
    write_text(path, as_json(content, indent=2) + "\n")


_RUN = "the command of the run writes it again, and computes nothing twice"
_SCORE = "nemo-bench score, with its folder, writes it again"
REPAIRS = {
    "run.json": "the command of the run writes it again, with all cells that are in the folder",
    "spec.json": _RUN,
    "env.json": _RUN,
    "prompts.jsonl": _RUN,
    "layers.json": _RUN,
    "scoring.json": _SCORE,
    "sets.json": _SCORE,
    "metrics.json": f"{_SCORE}; that of a detector, nemo-bench detect",
    "audit.json": "the commands of the audits write it again, and compute nothing twice",
    "threshold.json": "the next run that needs it writes it again from its records",
    "detection.json": "nemo-bench detect writes it again",
}
"""What writes a file of a results folder again that was deleted; records and images stay."""


def damaged(path: Path, why: object) -> StoreError:
    """The error of a file that does not hold what it should: it names that file, and what repairs it."""
    repair = REPAIRS.get(path.name, "put back what it held")
    return StoreError(f"{path} does not hold what it should ({why}); delete this one file: {repair}")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        StoreError: The file is not there or is no JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        repair = REPAIRS.get(path.name, "or its run never started")
        raise StoreError(f"{path} is missing: {path.parent} is no results folder of nemo_bench, or {repair}") from None
    except ValueError as error:
        raise damaged(path, f"no JSON: {error}") from error


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        keys: What must be in it.

    Raises:
        StoreError: The file is not there, is no JSON object, or lacks a key.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise damaged(path, f"a {type(content).__name__} in place of an object")
    if lacking := [key for key in keys if key not in content]:
        raise damaged(path, f"no {', '.join(lacking)}")
    return content


def is_whole(path: Path, *keys: str) -> bool:
    """Whether a file is there and holds a JSON object with these keys."""
    try:
        read_object(path, *keys)
    except StoreError:
        return False
    return True


def parse_json(text: str) -> Any:
    """Reads JSON of any origin.

    Raises:
        ValueError: It is none, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def digest(content: Any, length: int = 16) -> str:
    """Hash of JSON-like data, the same on every machine.

    Args:
        content: What to hash; keys are sorted, so their order does not matter.
        length: Number of hexadecimal digits.

    Returns:
        The first digits of a SHA-256.
    """
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]
