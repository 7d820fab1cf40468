"""Reads lists of prompts from CSV, JSON lines, plain text and parquet."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bench.errors import PromptError, did_you_mean
from nemo_bench.prompts.datasets import DatasetPlace
from nemo_bench.prompts.lists import split_links, split_list, without_login
from nemo_bench.prompts.manifest import MANIFEST, read_manifest
from nemo_bench.records.data import Kind, Prompt, Record
from nemo_bench.records.io import digest, parse_json
from nemo_bench.records.pictures import unreadable, visible

# Accepted column names in lower case; where a file has several of a group, the first one counts.
TEXT_COLUMNS = ("caption", "prompt", "text")
KIND_COLUMNS = ("kind", "type", "overfit_type")
REFERENCE_COLUMNS = ("references", "reference")
LINK_COLUMNS = ("url", "urls")
ID_COLUMNS = ("id", "index", "#0")  # "#0" is a first column without a name, as pandas writes it

# The field writes the two words in either order: verbatim memorization, matching verbatim.
KINDS: dict[str, Kind | None] = {
    "": None,
    "VM": "VM",
    "MV": "VM",
    "RV": "VM",  # a copy, by retrieval
    "TM": "TM",
    "TV": "TM",
    "MEMORIZED": "memorized",
}


class _Needed(NamedTuple):
    names: Sequence[str]
    what: str


class Row(NamedTuple):
    """One prompt as the file has it.

    Attributes:
        where: File and line, for errors.
        cells: Its cells by column name in lower case.
    """

    where: str
    cells: dict[str, Any]

    def first(self, names: Iterable[str]) -> Any:
        """The first cell of these names that is there, or None."""
        return next((self.cells[name] for name in names if self.cells.get(name) is not None), None)


def read_prompts(
    path: Path | str,
    *,
    references: Path | None = None,
    memorized: bool = False,
    limit: int | None = None,
    prefix: str = "",
) -> list[Prompt]:
    """Reads a list of prompts; the ending of the file name decides the format.

    ``.csv`` (separated by ``,`` or ``;``), ``.jsonl`` and ``.parquet`` have columns, found whatever their case:

    - text: ``caption``, ``prompt`` or ``text``, kept letter by letter;
    - kind, if any: ``kind``, ``type`` or ``overfit_type``, holding VM (MV, RV), TM (TV), memorized, or nothing;
    - id, if any: ``id``, ``index`` or a first column without a name. An ``id`` must be unique, the others are used
      only if they are;
    - reference images, if any: ``references`` or ``reference``, file names separated by ``|``, or a list;
    - links to reference images, if any: ``url`` or ``urls``, one link or several
      (:func:`nemo_bench.prompts.lists.split_links`). They are used where the folder of the reference images is one
      that ``nemo-bench references`` fetched them to.

    A list may be one of the file's format, or written out as text, as pandas, numpy and JSON do
    (:func:`nemo_bench.prompts.lists.split_list`).

    Other columns are ignored. ``.txt`` has one prompt a line. Without ids, prompts are numbered as
    ``<prefix>-0001``, before anything is left out. Data sets of Hugging Face ``datasets`` have such columns too, see
    :class:`nemo_bench.prompts.datasets.DatasetPlace` for how they are named.

    Args:
        path: The file or data set.
        references: Folder that relative reference files and fetched ones are in; by default the folder of ``path``.
        memorized: Whether prompts without a kind are memorized, in a way that nobody annotated.
        limit: Keeps at most this many prompts (at least 1), the first ones.
        prefix: What numbered ids start with; by default the file name without its ending.

    Returns:
        The prompts in the order of the file, at least one. All reference files exist and can be decoded; those that
        can't be are in ``damaged_references``, links that could not be fetched in ``dead_references``.

    Raises:
        PromptError: The file or a reference file is missing, the file can't be read as a list of prompts, only some
            of its links were tried, or no reference file can be decoded; the message names file and line.
    """
    dataset, path = DatasetPlace.from_source(path), Path(path)
    if limit is not None and limit < 1:
        raise PromptError(f"{path}: limit is {limit}; expected 1 or more, or None for all prompts")
    rows = _dataset_rows(dataset) if dataset else read_rows(path)
    folder = path.parent if references is None else Path(references)
    prefix = prefix or (dataset.name if dataset else path.stem)
    prompts = [
        Prompt(id_, _text(row), _kind(row) or ("memorized" if memorized else None), _references(row, folder))
        for id_, row in zip(_ids(rows, prefix), rows, strict=True)
    ]
    links = {prompt.id: _links(row) for prompt, row in zip(prompts, rows, strict=True)}
    prompts = [p._replace(links=links[p.id]) for p in prompts[:limit]]
    if (folder / MANIFEST).is_file():
        prompts = _with_fetched(path, folder, prompts, links)
    elif references is not None and any(links[p.id] for p in prompts) and not any(p.references for p in prompts):
        msg = f"{path} has links to reference images, but {folder} holds no {MANIFEST} of fetched ones"
        raise PromptError(f"{msg}; fetch them: nemo-bench references {path} {folder}")
    return check_references(str(path), prompts)


def read_links(path: Path | str) -> dict[str, tuple[str, ...]]:
    """Reads the links of a list of prompts; see :func:`read_prompts` for the formats.

    Args:
        path: The file.

    Returns:
        Links by prompt id, in the order of the file; a prompt may have none.

    Raises:
        PromptError: The file can't be read as a list of prompts, or has no links.
    """
    dataset, path = DatasetPlace.from_source(path), Path(path)
    rows = _dataset_rows(dataset) if dataset else read_rows(path)
    prefix = dataset.name if dataset else path.stem
    links = {id_: _links(row) for id_, row in zip(_ids(rows, prefix), rows, strict=True)}
    if not any(links.values()):
        msg = f"{path}: no prompt has a link to an image. Columns found: {', '.join(map(repr, rows[0].cells))}. "
        raise PromptError(f"{msg}Accepted names: {', '.join(LINK_COLUMNS)}")
    return links


def dead_references(prompts: Iterable[Prompt]) -> list[str]:
    """Links of some prompts that could not be fetched, each once, in the order of the prompts."""
    return list(dict.fromkeys(link for prompt in prompts for link in prompt.dead_references))


def _with_fetched(
    path: Path, folder: Path, prompts: Sequence[Prompt], links: dict[str, tuple[str, ...]]
) -> list[Prompt]:
    """The prompts with what was fetched for them; a list of which no link was ever tried stays as it is."""
    manifest = read_manifest(folder)
    wanted = {link for prompt in prompts for link in links[prompt.id]}
    unknown = wanted - manifest.keys()
    if unknown == wanted:
        return list(prompts)
    if unknown:
        msg = f"{path}: {len(unknown)} of {len(wanted)} links were not tried yet, such as {min(unknown)}"
        raise PromptError(f"{msg}; go on with: nemo-bench references {path} {folder}")

    def completed(prompt: Prompt) -> Prompt:
        entries: list[Record] = [manifest[link] for link in links[prompt.id]]
        files = tuple(folder / entry["file"] for entry in entries if entry["status"] == "ok")
        dead = tuple(entry["url"] for entry in entries if entry["status"] != "ok")
        return prompt._replace(references=(*prompt.references, *files), dead_references=dead)

    return [completed(prompt) for prompt in prompts]


def references_digest(prompts: Sequence[Prompt]) -> str:
    """Hash of the contents of the prompts' reference images, in their order; folders and names do not matter.

    Args:
        prompts: The prompts.

    Returns:
        16 hexadecimal digits.

    Raises:
        PromptError: A reference image can't be read.
    """
    # Template prompts share their references: each file is read once.
    hashes = {file: _file_hash(file) for file in {file for prompt in prompts for file in prompt.references}}
    return digest([[hashes[file] for file in p.references] for p in prompts])


def _file_hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PromptError(f"{path}: this reference image can't be read ({error.strerror})") from error


def read_rows(path: Path, needed: Sequence[str] = TEXT_COLUMNS, what: str = "prompts") -> list[Row]:
    """Reads all columns of a list of prompts or of another list, unchecked; see :func:`read_prompts` for the formats.

    Args:
        path: The file.
        needed: Column names of which one must be there.
        what: What that column holds, for errors.

    Returns:
        Its rows, at least one, each with such a column.

    Raises:
        PromptError: The file is missing or is no such list; the message names file and line.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        msg = f"{path}: the ending {path.suffix!r} is no format of prompts. {did_you_mean(path.suffix, READERS)}"
        raise PromptError(msg)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise PromptError(f"{path}: there is no such file. {_neighbours(path)}") from error
    except OSError as error:
        raise PromptError(f"{path}: can't be read ({error.strerror}); expected a file of prompts") from error
    if not content.strip():
        raise PromptError(f"{path}: the file is empty; expected at least one prompt")
    rows = list(reader(path, content, _Needed(needed, what)))
    if not rows:
        raise PromptError(f"{path}: holds no prompt; expected at least one")
    return rows


def _dataset_rows(dataset: DatasetPlace) -> list[Row]:
    """Rows of a data set, checked as those of a file are."""
    found = dataset.rows(TEXT_COLUMNS, (*KIND_COLUMNS, *REFERENCE_COLUMNS, *LINK_COLUMNS, "id", "index"))
    if not found:
        raise PromptError(f"prompts of {dataset.source}: holds no prompt; expected at least one")
    columns = _columns(f"prompts of {dataset.source}", found[0], _Needed(TEXT_COLUMNS, "prompts"))
    rows = enumerate(found, start=1)
    return [Row(f"{dataset.source}, row {n}", dict(zip(columns, cells.values(), strict=True))) for n, cells in rows]


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    names = [file.name for file in visible(path.parent.iterdir(), path.parent) if file.suffix.lower() in READERS]
    return did_you_mean(path.name, names) if names else f"No file of prompts is in the folder {path.parent.resolve()}."


def _decode(path: Path, content: bytes) -> str:
    """The text of a file in UTF-8, with or without the mark that spreadsheets put first."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        msg = f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise PromptError(msg) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PromptError(f"{path}, line {line}: holds a NUL character; expected text in UTF-8, not UTF-16 or binary")
    return text


def _columns(where: str, names: Iterable[str], needed: _Needed) -> list[str]:
    """Column names in lower case, those without a name by position; checks that each is there once."""
    names = list(names)
    columns = [name.strip().lower() or f"#{position}" for position, name in enumerate(names)]
    twice = next((name for name, count in Counter(columns).items() if count > 1), None)
    if twice is not None:
        raise PromptError(f"{where}: two columns are called {twice!r} (case does not matter); rename one")
    if not set(columns) & set(needed.names):
        msg = f"{where}: no column of {needed.what}. Columns found: {', '.join(map(repr, names))}. "
        raise PromptError(f"{msg}Accepted names: {', '.join(needed.names)}")
    return columns


def _read_csv(path: Path, content: bytes, needed: _Needed) -> Iterator[Row]:
    text = _decode(path, content)
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a list of neurons may be longer than Python expects
    delimiter = _delimiter(text, needed)
    # Strict, since a quotation mark that is never closed would swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            msg = f"{where}: not valid CSV ({error}); close every quoted text, and double quotation marks within it"
            raise PromptError(msg) from error
        if not cells:
            continue
        if not columns:
            columns = _columns(where, cells, needed)
        elif len(cells) != len(columns):
            msg = f"{where}: {len(cells)} cells, but {len(columns)} columns; quote texts that hold {delimiter!r}"
            raise PromptError(msg)
        else:
            yield Row(where, dict(zip(columns, cells, strict=True)))


def _delimiter(text: str, needed: _Needed) -> str:
    """The one that splits off a needed column, else the one that splits most."""

    def split(delimiter: str) -> tuple[bool, int]:
        names = next(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)), [])
        return any(name.strip().lower() in needed.names for name in names), len(names)

    # The first wins ties: a file of one column is not to be split at all, and no text holds a unit separator.
    return max("\x1f", ",", ";", key=split)


def _read_jsonl(path: Path, content: bytes, needed: _Needed) -> Iterator[Row]:
    for where, line in _lines(path, content):
        try:
            value = parse_json(line)
        except ValueError as error:
            raise PromptError(f"{where}: not valid JSON ({error}); expected one object a line") from error
        if not isinstance(value, dict):
            raise PromptError(f'{where}: {line.strip()[:40]} is no object; expected such as {{"text": "a prompt"}}')
        yield Row(where, dict(zip(_columns(where, value, needed), value.values(), strict=True)))


def _read_txt(path: Path, content: bytes, needed: _Needed) -> Iterator[Row]:
    for where, line in _lines(path, content):
        yield Row(where, {"text": line})


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Lines that are not blank. Not ``splitlines``, which also splits at characters that texts may hold."""
    for number, line in enumerate(io.StringIO(_decode(path, content), newline=None), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.removesuffix("\n")


def _read_parquet(path: Path, content: bytes, needed: _Needed) -> Iterator[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise PromptError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (OSError, ValueError) as error:
        raise PromptError(f"{path}: not valid parquet ({error})") from error
    columns = _columns(str(path), table.column_names, needed)
    for number, cells in enumerate(table.to_pylist(), start=1):
        yield Row(f"{path}, row {number}", dict(zip(columns, cells.values(), strict=True)))


READERS: dict[str, Callable[[Path, bytes, _Needed], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}


def _text(row: Row) -> str:
    text = row.first(TEXT_COLUMNS)
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise PromptError(f"{row.where}: the prompt is {text!r}, a {type(text).__name__}; expected text")
    if not text.strip():
        raise PromptError(f"{row.where}: the prompt is empty; write one or take the line out")
    return _printable(row, "prompt", text)


def _printable(row: Row, what: str, text: str) -> str:
    """Refuses what escapes in JSON can bring in and neither tokenizers nor files take."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        msg = f"{row.where}: the {what} {text!r} holds a NUL or half a surrogate pair; expected characters of UTF-8"
        raise PromptError(msg)
    return text


def _kind(row: Row) -> Kind | None:
    value = row.first(KIND_COLUMNS)
    word = "" if value is None else str(value).strip().upper()
    if word not in KINDS:
        hint = did_you_mean(word, [name for name in KINDS if name])
        raise PromptError(f"{row.where}: {value!r} is no kind of memorization. {hint} Or leave it empty.")
    return KINDS[word]


def _references(row: Row, folder: Path) -> tuple[Path, ...]:
    value = row.first(REFERENCE_COLUMNS)
    written = split_list(value)
    if written is None and isinstance(value, str):
        written = [value]  # a name may begin with a bracket
    if written is None:
        msg = f"{row.where}: the references are {value!r:.60}; expected file names, as a list or separated by '|'"
        raise PromptError(msg)
    names = [name.strip() for text in written for name in text.split("|")]
    return tuple(folder / name for name in names if name)


def _links(row: Row) -> tuple[str, ...]:
    """Links of a row, each once, without user names and passwords, which nobody else is to have."""
    written = split_list(row.first(LINK_COLUMNS))
    if written is None:
        raise PromptError(f"{row.where}: holds no list of links; expected such as ['https://...', ...], whole")
    links = [without_login(link) for text in written for link in split_links(text)]
    return tuple(dict.fromkeys(links))


def check_references(where: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Decodes the training images of prompts; :func:`nemo_bench.records.pictures.unreadable` says when again.

    Args:
        where: What the prompts come from, for errors.
        prompts: The prompts.

    Returns:
        The prompts, with files that can't be decoded in ``damaged_references``, and no longer in ``references``.

    Raises:
        PromptError: A file is missing, or there are some and none can be decoded.
    """
    prompts = [p._replace(references=(*p.references, *p.damaged_references), damaged_references=()) for p in prompts]
    missing = [(file, prompt.id) for prompt in prompts for file in prompt.references if not file.is_file()]
    if missing:
        listed = ", ".join(f"{file} (prompt {id_!r})" for file, id_ in missing[:3])
        more = ", ..." if len(missing) > 3 else ""
        of = f"{len(missing)} reference files of {len({id_ for _, id_ in missing})} prompts are missing"
        msg = f"{where}: {of}: {listed}{more}. Add them, or name the folder that relative file names start from"
        raise PromptError(msg)
    # Prompts may share references: each file is looked at once.
    owners = {file: prompt.id for prompt in reversed(prompts) for file in prompt.references}
    damaged = unreadable(owners, "training images")
    if damaged and len(damaged) == len(owners):
        listed = ", ".join(f"{file} of prompt {owners[file]!r} ({why})" for file, why in list(damaged.items())[:3])
        more = ", ..." if len(damaged) > 3 else ""
        msg = f"{where}: none of the {len(owners)} reference files can be read as an image: {listed}{more}"
        raise PromptError(f"{msg}; replace them, or take them out of the list")
    if not damaged:
        return prompts

    def split(prompt: Prompt) -> Prompt:
        good = tuple(file for file in prompt.references if file not in damaged)
        return prompt._replace(
            references=good, damaged_references=tuple(file for file in prompt.references if file in damaged)
        )

    return [split(prompt) for prompt in prompts]


def _ids(rows: Sequence[Row], prefix: str) -> list[str]:
    """The ids in the file if it has good ones, else numbers."""
    for column in ID_COLUMNS:
        ids = [_id(row, column) for row in rows]
        if column == "id" and any("id" in row.cells for row in rows):
            _check_ids(rows, ids)
        if all(ids) and len(set(ids)) == len(ids):
            return ids
    return [f"{prefix}-{position:04d}" for position in range(1, len(rows) + 1)]


def _id(row: Row, column: str) -> str:
    """The id in this column, empty where there is none."""
    value = row.cells.get(column)
    return _printable(row, "id", str(value).strip()) if isinstance(value, str | int) else ""


def _check_ids(rows: Iterable[Row], ids: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for row, id_ in zip(rows, ids, strict=True):
        if not id_:
            given = row.cells.get("id")
            msg = f"{row.where}: the id is {given!r}; expected text or a whole number, in every row or in none"
            raise PromptError(msg)
        if id_ in seen:
            raise PromptError(f"{row.where}: the id {id_!r} is taken by {seen[id_]}; every prompt needs its own")
        seen[id_] = row.where
