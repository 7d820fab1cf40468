"""Small pictures for the page, made once and kept beside the run."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nemo_bench.errors import StoreError
from nemo_bench.records.data import GENERAL, Prompt
from nemo_bench.records.io import read_file, write_json
from nemo_bench.records.results import CellResults
from nemo_bench.records.schema import Thumbnail
from nemo_bench.records.store import thumbnail

PICTURED = {"VM": 4, "TM": 2, "memorized": 4, GENERAL: 2}
"""Prompts of each group whose first images are compared."""
_BOX = (160, 160)


class Thumbnails:
    """Thumbnails of one cell, kept in its ``thumbnails.json``, which may be deleted at any time.

    One is made again when name, size or time of its image has changed. Threads may share an instance.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "thumbnails.json"
        self._cached: dict[str, Thumbnail] = {}
        self._used: dict[str, Thumbnail] = {}
        with suppress(StoreError):
            self._cached = read_file(self._file, dict[str, Thumbnail])

    def __call__(self, path: Path, box: tuple[int, int], *, lossless: bool = True) -> Thumbnail | None:
        """An image as WebP, made to fit a box of width and height; None if there is no image to read.

        Where ``lossless``, an image that fits already keeps every pixel.
        """
        try:
            stat = path.stat()
        except OSError:
            return None
        folder = self._file.parent
        name = path.relative_to(folder) if path.is_relative_to(folder) else path
        key = f"{name} {stat.st_size} {stat.st_mtime_ns} {box[0]}x{box[1]}"
        made = self._cached.get(key) or _make(path, box, lossless)
        if made:
            self._used[key] = made
        return made

    def save(self) -> None:
        """Writes the thumbnails in use, if any is new; a folder that can't be written is left as it is."""
        if self._used.keys() != self._cached.keys():
            with suppress(OSError):
                write_json(self._file, dict(sorted(self._used.items())))


def first_images(
    cells: Sequence[CellResults], groups: Sequence[str]
) -> list[tuple[Prompt, Thumbnail | None, list[Thumbnail | None]]]:
    """Some prompts of each group, each with its training image and the first image of every cell."""
    thumbnails = {cell.name: Thumbnails(cell.folder) for cell in cells}
    shown = []
    by_group = {name: [prompt for prompt in cells[0].prompts if prompt.group == name] for name in groups}
    for prompt in (prompt for name, own in by_group.items() for prompt in own[: PICTURED.get(name, 2)]):
        reference = thumbnails[cells[0].name](prompt.references[0], _BOX) if prompt.references else None
        files = [next(iter(cell.outcomes[prompt.id].images.values()), None) for cell in cells]
        images = [thumbnails[cell.name](file, _BOX) if file else None for cell, file in zip(cells, files, strict=True)]
        shown.append((prompt, reference, images))
    return shown


def _make(path: Path, box: tuple[int, int], lossless: bool) -> Thumbnail | None:
    made = thumbnail(path, box)
    if not made:
        return None
    picture, is_smaller = made
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=lossless and not is_smaller, quality=70, method=4)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(uri=uri, width=picture.width, height=picture.height, tiny=not is_smaller)
