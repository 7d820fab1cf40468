"""Small pictures for the page, made once and kept beside the run."""

from __future__ import annotations

import base64
import io
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from nemo_bench.errors import StoreError
from nemo_bench.records.io import read_json, write_json
from nemo_bench.records.store import thumbnail


@dataclass(frozen=True)
class Thumbnail:
    """An embedded image.

    Attributes:
        uri: Data URI.
        width: In pixels.
        height: In pixels.
        tiny: The image was not made smaller, so its pixels may be shown as squares.
    """

    uri: str
    width: int
    height: int
    tiny: bool


class Thumbnails:
    """Thumbnails of one cell, kept in its ``thumbnails.json``, which may be deleted at any time.

    One is made again when name, size or time of its image has changed. Threads may share an instance.

    Args:
        folder: The folder of the cell.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "thumbnails.json"
        self._kept: dict[str, Thumbnail] = {}
        self._used: dict[str, Thumbnail] = {}
        with suppress(StoreError, AttributeError, TypeError):
            self._kept = {key: Thumbnail(*values) for key, values in read_json(self._file).items()}

    def __call__(self, path: Path, box: tuple[int, int], *, lossless: bool = True) -> Thumbnail | None:
        """An image as WebP, made to fit a box; None if there is no image to read.

        Args:
            path: The image.
            box: Width and height to fit.
            lossless: Keep every pixel of an image that fits already.
        """
        try:
            about = path.stat()
        except OSError:
            return None
        folder = self._file.parent
        name = path.relative_to(folder) if path.is_relative_to(folder) else path
        key = f"{name} {about.st_size} {about.st_mtime_ns} {box[0]}x{box[1]}"
        found = self._kept.get(key) or _make(path, box, lossless)
        if found:
            self._used[key] = found
        return found

    def keep(self) -> None:
        """Writes what was asked for, if any of it is new; a folder that can't be written is left as it is."""
        if self._used.keys() != self._kept.keys():
            with suppress(OSError):
                write_json(self._file, {key: astuple(self._used[key]) for key in sorted(self._used)})


def _make(path: Path, box: tuple[int, int], lossless: bool) -> Thumbnail | None:
    found = thumbnail(path, box)
    if not found:
        return None
    picture, smaller = found
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=lossless and not smaller, quality=70, method=4)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(uri, picture.width, picture.height, not smaller)
