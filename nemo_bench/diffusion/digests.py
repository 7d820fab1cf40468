"""Digests of files of weights and settings."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from nemo_bench.records.images import visible
from nemo_bench.records.io import digest


def folder_digest(folder: Path) -> str:
    """Digest of the settings and weights in a folder, 16 hexadecimal digits."""
    suffixes = {".json", ".safetensors", ".bin", ".txt"}
    files = sorted(path for path in visible(folder.rglob("*"), folder) if path.suffix in suffixes)
    return digest([[path.relative_to(folder).as_posix(), file_digest(path)] for path in files])


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; a file is read again only after a change."""
    status = path.stat()
    return _digest_at(path, status.st_size, status.st_mtime_ns)


@cache
def _digest_at(path: Path, size: int, time: int) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
