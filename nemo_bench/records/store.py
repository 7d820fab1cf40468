"""Results on disk: append-only records that survive being killed and can be continued by any number of processes."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from nemo_bench.errors import StoreError
from nemo_bench.records import schema
from nemo_bench.records.data import Localization, Prompt
from nemo_bench.records.images import to_rgb, visible
from nemo_bench.records.io import (
    as_json,
    damaged,
    digest,
    explain,
    in_this_version,
    is_whole,
    prompts_digest,
    read_file,
    remove_parts,
    replacing,
    stated_version,
    write_json,
    write_text,
    writing,
)
from nemo_bench.records.schema import ImageRecord, LocalizationRecord, PromptRecord, Record, ScoreRecord, Spec

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)

PREVIEW = 160
"""Longest side of the preview in a saved image: small pictures are made of it, without decoding the whole image."""
_PREVIEW = b"prVW"  # by its case: may be ignored, is our own, and is dropped by a program that changes the image
_PROMPT = TypeAdapter(Prompt)


def read_spec(folder: Path) -> Spec:
    """What a cell is.

    Raises:
        StoreError: The file does not hold what it should, or other settings than those that the folder is named by.
    """
    path = folder / "spec.json"
    spec = read_file(path, Spec)
    name, _, named = spec.cell.rpartition("__")
    if name and named != digest(spec.settings, 8):
        raise damaged(path, f"its settings were changed: they are not those that {spec.cell} is named by")
    return spec


def read_starts(folder: Path) -> list[schema.Start]:
    """Every start of a cell, the latest last.

    Raises:
        StoreError: The file is not there or does not hold what it should.
    """
    path = folder / "env.json"
    starts = read_file(path, list[schema.Start])
    if not starts:
        raise damaged(path, "no start")
    return starts


def read_settings(folder: Path) -> dict[str, Any]:
    """All settings of a cell's latest start; see :func:`read_starts`."""
    settings = read_starts(folder)[-1].settings
    if not isinstance(settings.get("model"), dict):
        raise damaged(folder / "env.json", "a start without settings")
    return settings


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Writes the prompts of a cell, their images by absolute paths."""
    lines = []
    for p in prompts:
        files = {name: [file.resolve() for file in getattr(p, name)] for name in ("references", "damaged_references")}
        lines.append(as_json({**p._asdict(), **files}) + "\n")
    write_text(folder / "prompts.jsonl", "".join(lines))


def read_cell_prompts(folder: Path, spec: Spec) -> list[Prompt]:
    """The prompts of a cell.

    Raises:
        StoreError: The file does not hold what it should, or other prompts.
    """
    path = folder / "prompts.jsonl"
    older = stated_version(folder / "spec.json")
    try:
        # Lines of bytes end at a line feed alone, those of a text at a line separator in a prompt too.
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; {schema.FILES[path.name][1]}") from None
    lines = [in_this_version(path.name, line, older) for line in lines]
    try:
        prompts = [_PROMPT.validate_json(line) for line in lines]
    except ValidationError as error:
        raise damaged(path, f"a prompt with {explain(error)}") from None
    except ValueError as error:
        raise damaged(path, error) from error
    if not prompts or prompts_digest(prompts) != spec.settings.get("prompts", prompts_digest(prompts)):
        raise damaged(path, "other prompts than the cell was made of")
    return prompts


def read_run(folder: Path) -> schema.Run:
    """The cells of a run, in the order that they were asked for.

    Raises:
        StoreError: The file is not there or does not hold what it should.
    """
    path = folder / "run.json"
    run = read_file(path, schema.Run)
    if not all(name not in ("", ".", "..") and Path(name).name == name for name in run.cells):
        raise damaged(path, "cells are no list of names of folders")
    return run


_CACHED = 250_000
"""Records that are kept in memory until a file of theirs changes; those used last, in whole stages."""


@dataclass(frozen=True)
class _Stage:
    """The records of a stage in memory."""

    stamp: object  # of its files
    by_id: Mapping[str, Any]
    every: Sequence[Any]


class _Cache:
    """Stages that were read, at most :data:`_CACHED` records together unless the last one alone has more."""

    def __init__(self) -> None:
        self._stages: OrderedDict[tuple[Path, str], _Stage] = OrderedDict()
        self._count = 0

    def pop(self, key: tuple[Path, str]) -> _Stage | None:
        found = self._stages.pop(key, None)
        self._count -= len(found.every) if found else 0
        return found

    def put(self, key: tuple[Path, str], stage: _Stage) -> None:
        self._stages[key] = stage
        self._count += len(stage.every)
        while len(self._stages) > 1 and self._count > _CACHED:
            self.pop(next(iter(self._stages)))


_cache = _Cache()


def read_records(folder: Path, kind: type[R]) -> Mapping[str, R]:
    """The records of a stage by id, over all files that any process wrote; of equal lines the first.

    A last line that is no JSON was torn by a kill and is dropped. Lines are equal whatever their cost.

    Raises:
        StoreError: A line is no record of the stage, or two lines of one id differ.
    """
    return _read(folder, kind).by_id


def _read(folder: Path, kind: type[Record]) -> _Stage:
    """The records of a stage, read again only where a file of theirs has changed."""
    files = sorted((folder / "records").glob(f"{kind.stage}.*.jsonl"))
    about = [(path.name, path.stat()) for path in files]
    stamp = [(name, status.st_size, status.st_mtime_ns) for name, status in about]
    key = (folder.absolute(), kind.stage)
    known = _cache.pop(key)
    if known is None or known.stamp != stamp:
        known = _Stage(stamp, *_parse(files, kind))
    _cache.put(key, known)
    return known


def read_digests(folder: Path) -> dict[str, set[str]]:
    """SHA-256 that the file of each image may have: of the first time it was made, or of a time after."""
    found: dict[str, set[str]] = {}
    for record in _read(folder, ImageRecord).every:
        if record.image and record.sha256:
            found.setdefault(record.image, set()).add(record.sha256)
    return found


def read_localizations(folder: Path, prompts: Sequence[Prompt] = ()) -> dict[str, Localization]:
    """What was localized in a cell by prompt id, without prompts that failed.

    Variants among ``prompts`` have what was localized for the prompts that they vary.
    """
    records = read_records(folder, LocalizationRecord).values()
    found = {record.prompt: record.localization for record in records if record.localization}
    return found | {p.id: found[p.variant_of] for p in prompts if p.variant_of in found}


def read_scores(path: Path) -> dict[str, NDArray[np.float32]]:
    """Scores of neurons in the file of a localization, by layer.

    Raises:
        StoreError: It can't be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path} can't be read ({error}); delete it, and the command that made it makes it again"
        ) from None


def _parse(files: Iterable[Path], kind: type[R]) -> tuple[dict[str, R], list[R]]:
    by_id: dict[str, R] = {}
    places: dict[str, Path] = {}
    every = []
    for path in files:
        for _, record in _lines(path, kind):
            if isinstance(record, StoreError):
                raise record
            first = by_id.setdefault(record.id, record)
            place = places.setdefault(record.id, path)
            if first is not record and not _same(_result(first), _result(record)):
                msg = f"{place} and {path} hold different results for {record.id}"
                raise StoreError(f"{msg}; delete the one that is wrong")
            every.append(record)
    return by_id, every


def _lines(path: Path, kind: type[R]) -> Iterator[tuple[bytes, R | StoreError]]:
    """Every line with its record, or with what is wrong; without a last one that is no JSON, torn by a kill."""
    again = "the command that made it sets it aside and computes its item again"
    older = stated_version(path.parents[1] / "spec.json")
    sets: dict[frozenset[str], set[str]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                record = kind.model_validate_json(in_this_version(kind.stage, line, older), strict=True)
            except ValidationError as error:
                # Without its end it is torn, or being written by another process.
                if error.errors()[0]["type"] == "json_invalid" and not (line.endswith(b"\n") and file.peek(1)):
                    return
                yield line, StoreError(f"{place} is no record of this stage ({explain(error)}); {again}")
                continue
            if kind.result and getattr(record, kind.result) is None and record.failed is None:
                msg = f"{place}: the record {record.id} has no {kind.result} that it should; {again}"
                yield line, StoreError(msg)
                continue
            for entry in (record, record.cost):
                if entry is not None:  # 100,000 equal sets are nearly half of what the records of a cell take
                    names = entry.__pydantic_fields_set__
                    object.__setattr__(entry, "__pydantic_fields_set__", sets.setdefault(frozenset(names), names))
            yield line, record


def _result(record: Record) -> dict[str, Any]:
    """What must be the same in all records of an id: a picture made on another device is rounded otherwise."""
    varying: dict[str, Any] = {"cost": True, "sha256": True, "bytes": True, "localization": {"row_passes"}}
    return record.model_dump(exclude=varying)


def _same(a: Any, b: Any) -> bool:
    """Whether two results are equal, numbers up to what another device rounds otherwise."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)
    return bool(a == b)


def missing_records(folder: Path, spec: Spec, prompts: Sequence[Prompt], kinds: Sequence[type[PromptRecord]]) -> str:
    """What is missing of some stages of a cell, and what makes it again; empty where nothing is.

    Raises:
        StoreError: Records are damaged, or the settings in ``spec.json`` are not theirs.
    """
    images = read_records(folder, ImageRecord).values()
    made = [(record.prompt, record.seed) for record in images]
    expected: dict[type[PromptRecord], list[Any]] = {}
    if spec.task == "external":
        if spec.settings["images"] != digest(sorted([r.id, r.sha256] for r in images)):
            return "records of images are missing; score their folder again, with the same words"
        asked = made
    else:
        seeds = spec.settings.get("seeds")
        if not isinstance(seeds, int) or any(seed >= seeds for _, seed in made):
            raise damaged(folder / "spec.json", f"settings.seeds is {seeds}, there are records of more")
        asked = [(prompt.id, seed) for prompt in prompts for seed in range(seeds)]
        names = [(prompt.id, None) for prompt in prompts]
        own = [(prompt.id, None) for prompt in prompts if not prompt.axis]
        expected = {LocalizationRecord: own, schema.MemorizationRecord: names, ImageRecord: asked}
    with_image = {(record.prompt, record.seed) for record in images if record.image}
    of_prompts = [(prompt, None) for prompt in dict.fromkeys(prompt for prompt, _ in asked)]
    expected[ScoreRecord] = [*(key for key in asked if key in with_image), *of_prompts]
    for kind in (kind for kind in kinds if kind.stage in spec.stages):
        found = {(record.prompt, getattr(record, "seed", None)) for record in read_records(folder, kind).values()}
        if lost := sum(key not in found for key in expected.get(kind, ())):
            again = f"nemo-bench score {folder.parent} computes them again" if kind is ScoreRecord else remake(folder)
            return f"{lost} of {len(expected[kind])} records of '{kind.stage}' are missing; {again}"
    return ""


_HARMLESS = re.compile(r"nemo-bench run [^;|&$`<>\n\\]*")
"""Commands that may be shown to be pasted: what a results folder holds may come from anybody."""


def remake(folder: Path) -> str:
    """What makes lost records or images of a cell again, for a message."""
    try:
        commands = [start.command for start in read_starts(folder)]
    except StoreError:
        commands = []
    made = next((line for line in reversed(commands) if _HARMLESS.fullmatch(line)), None)
    return "the command of the run makes them again, and nothing else" + (f": {made}" if made else "")


def thumbnail(path: Path, box: tuple[int, int]) -> tuple[Image.Image, bool] | None:
    """A picture by the rules of :func:`nemo_bench.records.images.to_rgb`, made to fit a box of width and height.

    Returns:
        The picture, and whether it was made smaller; None if there is none to read.
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


def _set_aside(path: Path, kind: type[Record]) -> None:
    lines = [(line, found) for line, found in _lines(path, kind)]
    damaged = [(line, found) for line, found in lines if isinstance(found, StoreError)]
    if not damaged:
        return
    aside = path.with_name(f"{path.name}.damaged")
    with writing(aside), aside.open("ab") as file:
        file.writelines(line for line, _ in damaged)
    with replacing(path) as part:
        part.write_bytes(b"".join(line for line, found in lines if not isinstance(found, StoreError)))
    for _, error in damaged:
        log.warning("%s: it is in %s now", error, aside.name)


def _upgrade(path: Path, name: str, older: int) -> None:
    """Rewrites a file in the form of this version; it stays as old as it was, since its results are the same."""
    status, content = path.stat(), path.read_bytes()
    parts = content.splitlines() if path.suffix == ".jsonl" else [content.rstrip()]
    with replacing(path) as part:
        part.write_bytes(b"".join(in_this_version(name, each, older) + b"\n" for each in parts))
        os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))


class Store:
    """The folder of one cell, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, spec: Spec, *, is_named: bool = False) -> None:
        """Makes the folder, or checks that it belongs to the same configuration.

        Files that killed processes left half written are removed.

        A ``spec.json`` that was lost or damaged is written again in a folder that is named by its settings, or has
        another name that no other configuration has (``is_named``).

        Raises:
            StoreError: The folder belongs to another configuration.
            VersionError: It is of a newer version.
        """
        path = self.folder / "spec.json"
        is_ours = self.folder.is_dir() and (is_named or self.folder.name.endswith(f"__{digest(spec.settings, 8)}"))
        if is_ours and not is_whole(path, Spec):
            # It was damaged or deleted: the folder's name says that it is the same, but nothing of which version its
            # records are. Read as of the oldest, those of any other are not changed.
            has_records = any(self.folder.glob("records/*.jsonl"))
            write_json(path, spec.model_copy(update={"version": 1}) if has_records else spec)
        if path.exists():
            self._compare(path, read_file(path, Spec), spec, is_ours=is_ours)
        elif self.folder.exists() and any(p.suffix != ".part" for p in visible(self.folder.iterdir(), self.folder)):
            raise StoreError(f"{self.folder} is not empty and holds no spec.json; choose another name=... or root=...")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, spec)
        for part in ("records", "images", "noise"):
            (self.folder / part).mkdir(exist_ok=True)
        remove_parts(self.folder.rglob("*.part"))

    def upgrade(self) -> None:
        """Brings a folder of an older version to this one, in which its files are written on.

        Nobody else may be writing into it.
        """
        spec = self.folder / "spec.json"
        older = stated_version(spec)
        if older == schema.VERSION:
            return
        log.info("%s: from version %s of results to %s", self.folder, older, schema.VERSION)
        for path in (self.folder / "records").glob("*.jsonl"):
            _upgrade(path, path.name.partition(".")[0], older)
        for name in schema.FILES:
            if name != spec.name and (self.folder / name).is_file():
                _upgrade(self.folder / name, name, older)
        _upgrade(spec, spec.name, older)  # the last: until then all is read as of the older version

    def set_damaged_aside(self) -> None:
        """Moves lines that are no records to ``<file>.damaged``, and says so: their items are computed again.

        Nobody else may be writing records of the cell.
        """
        for kind in schema.RECORDS:
            try:
                self.records(kind)
            except StoreError:
                for path in (self.folder / "records").glob(f"{kind.stage}.*.jsonl"):
                    _set_aside(path, kind)

    def _compare(self, path: Path, present: Spec, asked: Spec, *, is_ours: bool) -> None:
        old = present.settings
        new = json.loads(as_json(asked.settings))
        differing = sorted(f"settings.{key}" for key in {*old, *new} if old.get(key) != new.get(key))
        if differing and is_ours:
            raise damaged(path, f"not what its folder is named by: {', '.join(differing)}")
        if differing:
            raise StoreError(
                f"{self.folder} was written by another configuration (differing: {', '.join(differing)}); "
                "choose another name=... or delete the folder"
            )

    def records(self, kind: type[R]) -> Mapping[str, R]:
        """See :func:`read_records`."""
        return read_records(self.folder, kind)

    def pending_ids(self, kind: type[Record], ids: Iterable[str]) -> list[str]:
        """Ids without a record, or whose file is gone or cut, in the order given."""
        # A picture that was made again has a record of its own.
        done = {record.id for record in _read(self.folder, kind).every if self._has_files(record)}
        return [i for i in ids if i not in done]

    def _has_files(self, record: Record) -> bool:
        if record.file and not (self.folder / record.file).is_file():
            return False
        if record.image is None:
            return True
        try:
            status = os.stat(os.path.join(self.folder, record.image))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and record.bytes in (None, status.st_size)

    def recount(self, kind: type[Record], ids: Iterable[str]) -> None:
        """Reopens a finished stage that misses something now."""
        if self.is_done(kind) and self.pending_ids(kind, ids):
            self.reopen(kind)

    def writer(self, kind: type[R]) -> Callable[[Iterable[R]], None]:
        """A function that appends records to a file of this process alone, made at the first call.

        Records of pictures in the folder are written with the picture's ``sha256`` and ``bytes``.
        """
        path: Path | None = None

        def write(records: Iterable[R]) -> None:
            nonlocal path
            lines = [as_json(self._with_digest(record)) + "\n" for record in records]
            place, path = path or self._claim(kind.stage), None
            with writing(place), place.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
            path = place  # a file that ends in half a line is never appended to

        return write

    def _with_digest(self, record: R) -> R:
        if record.image is None or record.sha256:
            return record
        content = (self.folder / record.image).read_bytes()
        return record.model_copy(update={"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)})

    def _claim(self, stage: str) -> Path:
        number = 0
        while True:
            path = self.folder / "records" / f"{stage}.{number}.jsonl"
            with writing(path), suppress(FileExistsError):
                path.open("x").close()
                return path
            number += 1

    def save_image(self, name: str, image: Image.Image) -> str:
        """Writes an image whole, with a preview inside if it is large, and returns its name in the folder."""
        with replacing(self.folder / name) as part:
            image.save(part, format="PNG", pnginfo=_preview(image))
        return name

    def is_done(self, kind: type[Record]) -> bool:
        """Whether the stage was finished and recounted."""
        return (self.folder / f"{kind.stage}.done").is_file()

    def finish(self, kind: type[Record], ids: Iterable[str]) -> None:
        """Recounts a stage and marks it done.

        Raises:
            StoreError: Records are missing.
        """
        ids = list(ids)
        if missing := self.pending_ids(kind, ids):
            msg = f"{self.folder}: {len(missing)} of {len(ids)} records of '{kind.stage}' are missing"
            raise StoreError(f"{msg}; run the command again")
        write_json(self.folder / f"{kind.stage}.done", {"records": len(ids)})

    def reopen(self, kind: type[Record]) -> None:
        """Takes back that a stage is done."""
        (self.folder / f"{kind.stage}.done").unlink(missing_ok=True)

    def forget(self, kind: type[Record]) -> None:
        """Deletes the records of a stage, so that it is computed again."""
        self.reopen(kind)
        for path in (self.folder / "records").glob(f"{kind.stage}.*.jsonl"):
            path.unlink()


def _preview(image: Image.Image) -> PngInfo:
    info = PngInfo()
    if min(image.size) > PREVIEW:
        small, content = image.convert("RGB"), io.BytesIO()
        small.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
        small.save(content, "JPEG", quality=90)
        info.add(_PREVIEW, content.getvalue())
    return info
