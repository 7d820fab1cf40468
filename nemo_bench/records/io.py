"""Files that are written whole, read with errors that name them, and hashed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json
from safetensors import SafetensorError

from nemo_bench.errors import StoreError, UnwritableError, VersionError, did_you_mean
from nemo_bench.records import schema
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import visible
from nemo_bench.records.schema import FILES, Versioned
from nemo_bench.records.writers import place, process

T = TypeVar("T")


def as_json(content: Any, indent: int | None = None) -> str:
    """An entry of the schema, or other data, as JSON that every parser reads.

    Fields of an entry that have no value are left out. A number that is not finite is null, since JSON has none.
    """
    return to_json(content, indent=indent, inf_nan_mode="null", exclude_none=True).decode()


def check_folder(folder: Path, wanted: str = "a run, a cell, or a folder of images") -> None:
    """Refuses a path that is no folder; ``wanted`` is what it should be, for the message.

    Raises:
        StoreError: There is none; names the nearest of those beside it.
    """
    if folder.is_dir():
        return
    if folder.exists():
        raise StoreError(f"{folder} is no folder; give {wanted}")
    parent = folder.parent
    names = [path.name for path in visible(parent.iterdir(), parent) if path.is_dir()] if parent.is_dir() else []
    hint = f" {did_you_mean(folder.name, names)}" if names else ""
    raise StoreError(f"{folder} does not exist; give {wanted}.{hint}")


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


_UNWRITABLE = "make its folder writable, or give another one as root=FOLDER"
_GONE = "bring its disk or folder back"
_REMEDIES = {
    errno.ENOSPC: "free space on its disk",
    errno.EDQUOT: "free some of your quota on its disk",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _UNWRITABLE),
    **dict.fromkeys((errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.ESTALE, errno.EIO), _GONE),
}


_DAY = 24 * 3600


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UnwritableError where a file can't be written: it names the file, what is kept, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        system = re.search(r"os error (\d+)", str(error))  # safetensors hides the error of the system in its own
        number = error.errno if isinstance(error, OSError) else int(system[1]) if system else None
        reason = os.strerror(number) if number else str(error)
        remedy = _REMEDIES.get(number or 0, "mend that")
        msg = f"{path} can't be written ({reason}). All that was recorded is kept: {remedy}, and the same command"
        raise UnwritableError(f"{msg} goes on") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to and renames it at the end, so that a reader never sees half a file.

    Raises:
        UnwritableError: It can't be written.
    """
    part = path.with_name(f"{path.name}.{place()}.{os.getpid()}.part")
    with writing(path):
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def remove_parts(files: Iterable[Path]) -> None:
    """Removes those of some files that a killed process left half written; of other machines, after a day."""
    for file in files:
        found = re.search(r"\.([0-9a-f]{8})\.(\d+)\.part$", file.name)
        with suppress(OSError):  # another process may have removed it
            if found and (
                not process(int(found[2])) if found[1] == place() else time.time() - file.stat().st_mtime > _DAY
            ):
                file.unlink()


def write_text(path: Path, content: str) -> None:
    """Writes a file whole; see :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(content, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole; see :func:`as_json`."""
    write_text(path, as_json(content, indent=2) + "\n")


def damaged(path: Path, why: object) -> StoreError:
    """The error of a file that does not hold what it should: it names that file, and what repairs it."""
    repair = FILES[path.name][1] if path.name in FILES else "put back what it held"
    return StoreError(f"{path} does not hold what it should ({why}); delete this one file: {repair}")


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def stated_version(path: Path) -> int:
    """The version of the schema that a file states; this one where it states none, as reading it will tell.

    Raises:
        VersionError: A newer one.
    """
    try:
        status = path.stat()
        stated = _stated(path, status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError:
        return schema.VERSION
    if stated is None:
        return schema.VERSION
    if stated > schema.VERSION:
        raise VersionError(
            f"{path} has version {stated} of results, and nemo-bench {version('nemo-bench')} knows versions up to "
            f"{schema.VERSION}; update it (pip install --upgrade nemo-bench), or choose another name=... or root=..."
        )
    return stated


@cache
def _stated(path: Path, *_: int) -> int | None:
    try:
        content = from_json(path.read_bytes())
    except ValueError:
        return None
    stated = content.get("schema") if isinstance(content, dict) else None
    return stated if type(stated) is int and stated >= 1 else None


def in_this_version(name: str, content: bytes, older: int) -> bytes:
    """A file or line of an older version in the form of this one; what is no JSON stays.

    Args:
        name: Name of the file, or stage of the record.
        content: What it holds.
        older: Its version.
    """
    if older == schema.VERSION:
        return content
    try:
        parsed = from_json(content)
    except ValueError:
        return content
    return to_json(schema.upgraded(name, parsed, older))


def read_file(path: Path, form: type[T]) -> T:
    """Reads a file of the schema by its type; see :data:`nemo_bench.records.schema.FILES`.

    Raises:
        StoreError: The file is not there or does not hold what it should.
        VersionError: It is of a newer version.
    """
    is_versioned = Versioned in getattr(form, "__mro__", ())
    older = stated_version(path if is_versioned else path.with_name("spec.json"))
    try:
        found: T = _adapter(form).validate_json(in_this_version(path.name, path.read_bytes(), older), strict=True)
        return found
    except FileNotFoundError:
        repair = FILES[path.name][1] if path.name in FILES else "its run never started"
        msg = f"{path} is missing: {path.parent} is no results folder of nemo_bench, or {repair}"
        raise StoreError(msg) from None
    except ValidationError as error:
        raise damaged(path, explain(error)) from None


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, such as ``settings: Field required``."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def read_whole(path: Path, form: type[T]) -> T | None:
    """Reads a file of the schema; None where it is not there, or holds something else."""
    try:
        return read_file(path, form)
    except StoreError:
        return None


def is_whole(path: Path, form: type[Any]) -> bool:
    """Whether a file is there and holds what it should."""
    return read_whole(path, form) is not None


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
    """The first hexadecimal digits of the SHA-256 of JSON-like data, in which the order of keys does not matter."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


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


def seed_of(content: Any) -> int:
    """A seed for a generator, from 0 to 2^63 - 1, by the :func:`digest` of JSON-like data."""
    return int(digest(content), 16) >> 1


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Hash of id, text and kind of some prompts, and of what variants vary, in their order; 16 hexadecimal digits."""
    return digest([[p.id, p.text, p.kind, *((p.variant_of, p.axis) if p.axis else ())] for p in prompts])


def batched(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    """Items in their order, at most ``size`` together."""
    return (items[start : start + size] for start in range(0, len(items), size))
