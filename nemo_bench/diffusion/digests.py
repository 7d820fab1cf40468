"""Digests of files of weights and settings."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from nemo_bench.records.images import visible
from nemo_bench.records.io import digest


def folder_digest(folder: Path) -> str:
    """Content digest of the settings and weights in a folder, 16 hexadecimal digits."""
    found = sorted(visible(folder.rglob("*"), folder))
    files = [path for path in found if path.suffix in {".json", ".safetensors", ".bin", ".txt"}]
    return digest([[p.relative_to(folder).as_posix(), file_digest(p)] for p in files])


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; read once while it stays as it is."""
    about = path.stat()
    return _digest_at(path, about.st_size, about.st_mtime_ns)


@cache
def _digest_at(path: Path, size: int, time: int) -> str:
    """Hash of a file that was last written at a time; the cells of a grid share their weights."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
