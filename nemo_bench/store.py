"""Results on disk: append-only records that survive being killed and can be continued by any number of processes."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nemo_bench.errors import StoreError
from nemo_bench.pictures import to_rgb, visible
from nemo_bench.types import Record

SCHEMA = 1
"""Version of everything written here."""
PREVIEW = 160
"""Longest side of the preview in a saved image: small pictures are made of it, without decoding the whole image."""
_PREVIEW = b"prVW"  # by its case: may be ignored, is our own, and is dropped by a program that changes the image


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


def check_writable(folder: Path) -> None:
    """Makes sure that a folder can be written to or made, without doing either.

    Raises:
        StoreError: It can't, or something else has its name.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise StoreError(f"root={folder}: {place} is no folder; name a folder for results: root=FOLDER")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StoreError(f"root={folder}: {place} can't be written to; name a folder that can: root=FOLDER")


def write_text(path: Path, content: str) -> None:
    """Writes a file under a temporary name, then renames it, so that a reader never sees half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; see :func:`write_text`."""
    write_text(path, as_json(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        StoreError: The file is not there or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        msg = f"{path} is missing: {path.parent} is no results folder of nemo_bench, or its run never started"
        raise StoreError(msg) from None
    except ValueError as error:
        raise StoreError(f"{path} is no JSON ({error}); restore it or delete {path.parent} and run again") from error


def read_records(folder: Path, stage: str) -> dict[str, Record]:
    """All records of a stage by id; see :func:`iterate_records`."""
    return {record["id"]: record for record in iterate_records(folder, stage)}


def iterate_records(folder: Path, stage: str) -> Iterator[Record]:
    """The records of a stage, one after the other, over all files that any process wrote.

    A last line that is no JSON was torn by a kill and is dropped. Equal lines count once, whatever their ``cost``.

    Args:
        folder: A cell's folder.
        stage: Name of the stage, such as ``"generate"``.

    Yields:
        Records of different ids. Only their lines are kept, which take a tenth of what they do when read.

    Raises:
        StoreError: A line in the middle is no JSON, or two lines of one id differ.
    """
    seen: dict[str, tuple[str, Path]] = {}
    for path in sorted((folder / "records").glob(f"{stage}.*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    record: Record = json.loads(line)
                    name = record["id"]
                except (ValueError, KeyError, TypeError):
                    if next(file, None) is None:
                        break
                    msg = f"{path}, line {number} is no record; delete that line (its item is computed again)"
                    raise StoreError(f"{msg} or the file") from None
                if name not in seen:
                    seen[name] = line, path
                    yield record
                elif not _same(_result(json.loads(seen[name][0])), _result(record)):
                    msg = f"{seen[name][1]} and {path} hold different results for {name}"
                    raise StoreError(f"{msg}; delete the one that is wrong")


def _result(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "cost"}


def _same(a: Any, b: Any) -> bool:
    """Whether two results are equal, numbers up to what another device rounds otherwise."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)
    return bool(a == b)


def thumbnail(path: Path, box: tuple[int, int]) -> tuple[Image.Image, bool] | None:
    """A picture made to fit a box.

    Args:
        path: The picture.
        box: Width and height to fit.

    Returns:
        The picture as :func:`nemo_bench.pictures.to_rgb` makes it, and whether it was made smaller; None if there is
        none to read.
    """
    try:
        with Image.open(path) as opened:
            size = opened.size
            preview = dict(getattr(opened, "private_chunks", ())).get(_PREVIEW) if max(box) <= PREVIEW else None
            source = Image.open(io.BytesIO(preview)) if preview else opened
            source.draft("RGB", (2 * max(box), 2 * max(box)))  # decodes no more of a JPEG than it takes
            picture = to_rgb(source)
    except Exception:  # Pillow raises many kinds for many kinds of damage
        return None
    whole = size if (size[0] > size[1]) == (picture.width > picture.height) else size[::-1]  # EXIF may turn it
    picture.thumbnail(box, Image.Resampling.LANCZOS)
    return picture, whole[0] > box[0] or whole[1] > box[1]


class Store:
    """The folder of one cell.

    Args:
        folder: Where it is; need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, spec: dict[str, Any]) -> None:
        """Makes the folder, or checks that it belongs to the same configuration.

        Args:
            spec: What the cell is; its ``settings`` decide what it holds, and are compared.

        Raises:
            StoreError: The folder belongs to another configuration.
        """
        path = self.folder / "spec.json"
        content = {"schema": SCHEMA, **json.loads(as_json(spec))}
        if path.exists():
            present = read_json(path)
            old, new = present.get("settings", {}), content["settings"]
            differing = ["schema"] if present.get("schema") != SCHEMA else []
            differing += sorted(f"settings.{key}" for key in {*old, *new} if old.get(key) != new.get(key))
            if differing:
                msg = (
                    f"{self.folder} was written by another configuration (differing: {', '.join(differing)}); "
                    "choose another name=... or delete the folder"
                )
                raise StoreError(msg)
        elif self.folder.exists() and any(p.suffix != ".part" for p in visible(self.folder.iterdir(), self.folder)):
            raise StoreError(f"{self.folder} is not empty and holds no spec.json; choose another name=... or root=...")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
        for part in ("records", "images", "noise", "neurons"):
            (self.folder / part).mkdir(exist_ok=True)

    def records(self, stage: str) -> dict[str, Record]:
        """See :func:`read_records`."""
        return read_records(self.folder, stage)

    def open_ids(self, stage: str, ids: Iterable[str]) -> list[str]:
        """Those of the ids that have no record yet, or whose picture is gone, in the order given."""
        done = {record["id"] for record in iterate_records(self.folder, stage) if self._has_files(record)}
        return [i for i in ids if i not in done]

    def _has_files(self, record: Record) -> bool:
        return all((self.folder / record[kind]).is_file() for kind in ("image", "noise", "file") if kind in record)

    def writer(self, stage: str) -> Callable[[Iterable[Record]], None]:
        """A function that appends records to a file of this process alone, made at the first call."""
        return _Writer(self.folder / "records", stage)

    def save_image(self, name: str, image: Image.Image) -> str:
        """Writes an image under a temporary name, then renames it; with a preview inside if it is large.

        Args:
            name: Path in the folder, such as ``"images/a_00.png"``.
            image: What to save.

        Returns:
            The name.
        """
        path = self.folder / name
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        image.save(part, format="PNG", pnginfo=_preview(image))
        part.replace(path)
        return name

    def is_done(self, stage: str) -> bool:
        """Whether the stage was finished and recounted."""
        return (self.folder / f"{stage}.done").is_file()

    def finish(self, stage: str, ids: Iterable[str]) -> None:
        """Recounts a stage and marks it done.

        Raises:
            StoreError: Records are missing.
        """
        ids = list(ids)
        missing = self.open_ids(stage, ids)
        if missing:
            msg = f"{self.folder}: {len(missing)} of {len(ids)} records of '{stage}' are missing; run the command again"
            raise StoreError(msg)
        write_json(self.folder / f"{stage}.done", {"records": len(ids)})

    def reopen(self, stage: str) -> None:
        """Takes back that a stage is done."""
        (self.folder / f"{stage}.done").unlink(missing_ok=True)

    def forget(self, stage: str) -> None:
        """Deletes the records of a stage, so that it is computed again."""
        self.reopen(stage)
        for path in (self.folder / "records").glob(f"{stage}.*.jsonl"):
            path.unlink()


def _preview(image: Image.Image) -> PngInfo:
    info = PngInfo()
    if min(image.size) > PREVIEW:
        small, content = image.convert("RGB"), io.BytesIO()
        small.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
        small.save(content, "JPEG", quality=90)
        info.add(_PREVIEW, content.getvalue())
    return info


class _Writer:
    def __init__(self, folder: Path, stage: str) -> None:
        self.folder, self.stage = folder, stage
        self.path: Path | None = None

    def __call__(self, records: Iterable[Record]) -> None:
        text = "".join(as_json(record) + "\n" for record in records)
        if self.path is None:
            self.path = self._claim()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _claim(self) -> Path:
        number = 0
        while True:
            path = self.folder / f"{self.stage}.{number}.jsonl"
            try:
                path.open("x").close()
            except FileExistsError:
                number += 1
            else:
                return path
