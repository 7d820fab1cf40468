"""Results on disk: append-only records that survive being killed and can be continued by any number of processes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nemo_bench.errors import StoreError
from nemo_bench.records.data import Prompt, Record, prompts_digest
from nemo_bench.records.images import to_rgb, visible
from nemo_bench.records.io import REPAIRS, as_json, damaged, digest, is_whole, parse_json, read_object, write_json

SCHEMA = 1
"""Version of everything written here."""
PREVIEW = 160
"""Longest side of the preview in a saved image: small pictures are made of it, without decoding the whole image."""
_PREVIEW = b"prVW"  # by its case: may be ignored, is our own, and is dropped by a program that changes the image


def read_spec(folder: Path) -> dict[str, Any]:
    """What a cell is, as it was written down when its folder was named.

    Raises:
        StoreError: The file is not there, does not hold what it should, or its settings were changed since.
    """
    path = folder / "spec.json"
    spec = read_object(path, "model", "prompts", "title", "settings")
    if not isinstance(spec["settings"], dict):
        raise damaged(path, "settings are no object")
    name, _, named = str(spec.get("cell", "")).rpartition("__")
    if name and named != digest(spec["settings"], 8):
        raise damaged(path, f"its settings were changed: they are not those that {spec['cell']} is named by")
    return spec


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """How a cell was begun and gone on with, the last time last.

    Raises:
        StoreError: The file is not there or does not hold what it should.
    """
    path = folder / "env.json"
    starts = read_object(path, "starts")["starts"]
    if not isinstance(starts, list) or not starts:
        raise damaged(path, "no list of starts")
    kinds = {"time": str, "command": str, "device": str, "versions": dict}
    for name, kind in kinds.items():
        if not all(isinstance(start, dict) and isinstance(start.get(name), kind) for start in starts):
            raise damaged(path, f"a start without {name}")
    return starts


def read_cell_prompts(folder: Path, spec: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a cell.

    Args:
        folder: Its folder.
        spec: What :func:`read_spec` gives.

    Raises:
        StoreError: The file is not there, does not hold what it should, or holds other prompts.
    """
    path = folder / "prompts.jsonl"
    try:
        prompts = [Prompt.from_record(parse_json(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; {REPAIRS[path.name]}") from None
    except KeyError as error:
        raise damaged(path, f"a prompt without {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error
    if not prompts or prompts_digest(prompts) != spec["settings"].get("prompts", prompts_digest(prompts)):
        raise damaged(path, "other prompts than the cell was made of")
    return prompts


def read_run(folder: Path) -> dict[str, Any]:
    """The cells of a run, in the order that they were asked for.

    Raises:
        StoreError: The file is not there or does not hold what it should.
    """
    path = folder / "run.json"
    run = read_object(path, "cells")
    if not isinstance(run["cells"], list) or not all(_is_name(name) for name in run["cells"]):
        raise damaged(path, "cells are no list of names of folders")
    return run


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def read_records(folder: Path, stage: str) -> dict[str, Record]:
    """All records of a stage by id; see :func:`iterate_records`."""
    return {record["id"]: record for record in iterate_records(folder, stage)}


_FIELDS: dict[str, dict[str, Any]] = {
    "localize": {"prompt": str},
    "generate": {"prompt": str, "seed": int},
    "score": {"prompt": str, "seed": (int, type(None)), "scores": dict},
    "detect": {"prompt": str},
}
"""What is in a record beside its id, by stage."""
_RESULTS: dict[str, dict[str, Any]] = {
    "localize": {"neurons": dict, "memorization": (int, float)},
    "generate": {"image": str},
    "detect": {"score": (int, float)},
}
"""What else is in it, unless it says why it ``failed``."""


def read_checked(folder: Path, stage: str) -> list[Record]:
    """The records of a stage, each with what belongs into it; see :func:`iterate_records`.

    Raises:
        StoreError: A record lacks something, or holds something else in its place.
    """
    records = list(iterate_records(folder, stage))
    for record in records:
        results = {} if isinstance(record.get("failed"), str) else _RESULTS.get(stage, {})
        expected = {**_FIELDS[stage], **results}
        for name, kind in expected.items():
            if name not in record or not isinstance(record[name], kind):
                msg = f"{folder / 'records'}/{stage}.*.jsonl: the record {record['id']} has no {name} that it should"
                raise StoreError(f"{msg}; delete its line (its item is computed again)")
    return records


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
    for path, line, record in _lines(folder, stage):
        name = record["id"]
        if name not in seen:
            seen[name] = line, path
            yield record
        elif not _same(_result(json.loads(seen[name][0])), _result(record)):
            msg = f"{seen[name][1]} and {path} hold different results for {name}"
            raise StoreError(f"{msg}; delete the one that is wrong")


def _lines(folder: Path, stage: str) -> Iterator[tuple[Path, str, Record]]:
    """Every record of a stage with its line and file, also those of one id."""
    for path in sorted((folder / "records").glob(f"{stage}.*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    record: Record = parse_json(line)
                    hash(record["id"])
                except (ValueError, KeyError, TypeError):
                    if next(file, None) is None:
                        break
                    msg = f"{path}, line {number} is no record; delete that line (its item is computed again)"
                    raise StoreError(f"{msg} or the file") from None
                yield path, line, record


def _result(record: Record) -> Record:
    """What must be the same in all records of an id: a picture made on another device is rounded otherwise."""
    return {key: value for key, value in record.items() if key not in ("cost", "sha256", "bytes")}


def lack(folder: Path, spec: Mapping[str, Any], prompts: Sequence[Prompt], stages: Sequence[str]) -> str:
    """Counts the records of a cell and the files that they name.

    Args:
        folder: The cell's folder.
        spec: What :func:`read_spec` gives.
        prompts: Its prompts.
        stages: Those of ``localize``, ``generate`` and ``score`` that are counted.

    Returns:
        What is missing and what makes it again; empty where nothing is.

    Raises:
        StoreError: Records are damaged, or the settings in ``spec.json`` are not theirs.
    """
    settings, names = spec["settings"], [prompt.id for prompt in prompts]
    generated = read_checked(folder, "generate")
    if "seeds" in settings:
        if not isinstance(settings["seeds"], int) or any(r["seed"] >= settings["seeds"] for r in generated):
            raise damaged(folder / "spec.json", f"settings.seeds is {settings['seeds']}, there are records of more")
        images = [(name, seed) for name in names for seed in range(settings["seeds"])]
        counted: dict[str, list[Any]] = {"localize": names, "generate": images}
    else:  # made elsewhere; their settings have a digest of what is in them
        images = [(record["prompt"], record["seed"]) for record in generated]
        if "images" in settings and settings["images"] != digest(sorted([r["id"], r.get("sha256")] for r in generated)):
            return "records of images are missing; score their folder again, with the same words"
        counted = {}
    whole = [(prompt, None) for prompt in dict.fromkeys(prompt for prompt, _ in images)]
    counted["score"] = [*(key for key in images if key in _scored(generated)), *whole]
    for stage, expected in counted.items():
        if stage in stages and (reason := _missing(folder, stage, expected, generated)):
            return reason
    return ""


def _scored(generated: Iterable[Record]) -> set[tuple[str, int]]:
    """Images that have scores: not those that failed."""
    return {(record["prompt"], record["seed"]) for record in generated if "image" in record}


def _missing(folder: Path, stage: str, expected: Sequence[Any], generated: Sequence[Record]) -> str:
    records = generated if stage == "generate" else read_checked(folder, stage)
    found = {record["prompt"] if stage == "localize" else (record["prompt"], record["seed"]) for record in records}
    missing = sum(key not in found for key in expected)
    if not missing:
        return ""
    again = f"nemo-bench score {folder.parent} computes them again" if stage == "score" else made_again(folder)
    return f"{missing} of {len(expected)} records of '{stage}' are missing; {again}"


_HARMLESS = re.compile(r"nemo-bench run [^;|&$`<>\n\\]*")
"""Commands that may be shown to be pasted: what a results folder holds may come from anybody."""


def made_again(folder: Path) -> str:
    """What makes lost records or images of a cell again, for a message."""
    try:
        commands = [start["command"] for start in read_starts(folder)]
    except StoreError:
        commands = []
    made = next((line for line in reversed(commands) if _HARMLESS.fullmatch(line)), None)
    return "the command of the run makes them again, and nothing else" + (f": {made}" if made else "")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a cell was gone on with last.

    Raises:
        StoreError: As :func:`read_starts`.
    """
    settings = read_starts(folder)[-1].get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise damaged(folder / "env.json", "a start without settings")
    return settings


def image_digests(folder: Path, stage: str = "generate") -> dict[str, set[str]]:
    """SHA-256 that the file of each picture may have: of the first time it was made, or of a time after."""
    found: dict[str, set[str]] = {}
    for _, _, record in _lines(folder, stage):
        if "sha256" in record:
            found.setdefault(record["image"], set()).add(record["sha256"])
    return found


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
        The picture as :func:`nemo_bench.records.images.to_rgb` makes it, and whether it was made smaller; None if
        there is none to read.
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

    def open(self, spec: dict[str, Any], *, is_named: bool = False) -> None:
        """Makes the folder, or checks that it belongs to the same configuration.

        Args:
            spec: What the cell is; its ``settings`` decide what it holds, and are compared.
            is_named: Whether the folder has a name that no other configuration has, so that a ``spec.json`` that was
                lost or damaged is written again. Folders that are named by their settings are known without.

        Raises:
            StoreError: The folder belongs to another configuration.
        """
        path = self.folder / "spec.json"
        content = {"schema": SCHEMA, **json.loads(as_json(spec))}
        is_ours = self.folder.is_dir() and (is_named or self._is_named_by(content))
        if is_ours and not is_whole(path, "settings"):
            write_json(path, content)  # it was damaged or deleted: the folder's name says that it is the same
        if path.exists():
            present = read_object(path, "settings")
            old, new = present["settings"], content["settings"]
            if not isinstance(old, dict):
                raise damaged(path, "settings are no object")
            differing = ["schema"] if present.get("schema") != SCHEMA else []
            differing += sorted(f"settings.{key}" for key in {*old, *new} if old.get(key) != new.get(key))
            if differing and is_ours:
                raise damaged(path, f"not what its folder is named by: {', '.join(differing)}")
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

    def _is_named_by(self, content: dict[str, Any]) -> bool:
        """Whether the folder is named by such settings."""
        return self.folder.name.endswith(f"__{digest(content['settings'], 8)}")

    def records(self, stage: str) -> dict[str, Record]:
        """See :func:`read_records`."""
        return read_records(self.folder, stage)

    def pending_ids(self, stage: str, ids: Iterable[str]) -> list[str]:
        """Those of the ids that have no record yet, or whose picture is gone or cut, in the order given."""
        done = {record["id"] for record in iterate_records(self.folder, stage) if self._has_files(record)}
        still = [i for i in ids if i not in done]
        if still:  # a picture that was made again has another record of its own
            done |= {record["id"] for _, _, record in _lines(self.folder, stage) if self._has_files(record)}
        return [i for i in still if i not in done]

    def _has_files(self, record: Record) -> bool:
        files = {kind: self.folder / record[kind] for kind in ("image", "noise", "file") if kind in record}
        if not all(path.is_file() for path in files.values()):
            return False
        return "bytes" not in record or files["image"].stat().st_size == record["bytes"]

    def recount(self, stage: str, ids: Iterable[str]) -> None:
        """Opens a stage again that was done once and misses something now."""
        if self.is_done(stage) and self.pending_ids(stage, ids):
            self.reopen(stage)

    def writer(self, stage: str) -> Callable[[Iterable[Record]], None]:
        """A function that appends records to a file of this process alone, made at the first call.

        Records of pictures in the folder are written with the picture's ``sha256`` and ``bytes``.
        """
        return _Writer(self.folder, stage)

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
        missing = self.pending_ids(stage, ids)
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
        text = "".join(as_json(self._with_digest(record)) + "\n" for record in records)
        if self.path is None:
            self.path = self._claim()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _with_digest(self, record: Record) -> Record:
        if "image" not in record or "sha256" in record:
            return record
        content = (self.folder / record["image"]).read_bytes()
        cost = {"cost": record["cost"]} if "cost" in record else {}  # stays last
        return {**record, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), **cost}

    def _claim(self) -> Path:
        number = 0
        while True:
            path = self.folder / "records" / f"{self.stage}.{number}.jsonl"
            try:
                path.open("x").close()
            except FileExistsError:
                number += 1
            else:
                return path
