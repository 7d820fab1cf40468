"""Digest of a folder of weights and settings."""

from __future__ import annotations

from pathlib import Path

from nemo_bench.records.images import visible
from nemo_bench.records.io import digest, file_digest


def folder_digest(folder: Path) -> str:
    """Digest of the settings and weights in a folder, 16 hexadecimal digits."""
    suffixes = {".json", ".safetensors", ".bin", ".txt", ".model"}
    files = sorted(path for path in visible(folder.rglob("*"), folder) if path.suffix in suffixes)
    return digest([[path.relative_to(folder).as_posix(), file_digest(path)] for path in files])
