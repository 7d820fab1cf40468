"""Readers of prompt lists: CSV, JSON lines, plain text, parquet and data sets of Hugging Face."""

from __future__ import annotations

import csv
import importlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from nemo_bench.errors import PromptError, did_you_mean
from nemo_bench.prompts.datasets import dataset_address, read_dataset
from nemo_bench.prompts.lists import split_links, split_list, without_login
from nemo_bench.prompts.references import MANIFEST, check_references, with_downloaded
from nemo_bench.records.data import Axis, Kind, Prompt
from nemo_bench.records.images import visible
from nemo_bench.records.io import parse_json

COLUMNS = {
    "prompts": ("caption", "prompt", "text"),
    "kinds": ("kind", "type", "overfit_type"),
    "references": ("references", "reference"),
    "links": ("url", "urls"),
    "ids": ("id", "index"),
    "images": ("image", "file", "path"),
    "originals": ("variant_of",),
    "axes": ("axis",),
}
"""Accepted column names in lower case, by content; the first one counts."""

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

AXES: dict[str, Axis | None] = {"": None, **{axis: axis for axis in get_args(Axis)}}


class Row(NamedTuple):
    """A row of a list."""

    where: str  #: File and line, for errors.
    #: Cells by column name in lower case; columns without a name are called by position, such as ``#0``.
    cells: dict[str, Any]

    def first(self, content: str) -> Any:
        """Returns the first cell that is not None under the names that :data:`COLUMNS` accepts, else None."""
        return next((self.cells[name] for name in COLUMNS[content] if self.cells.get(name) is not None), None)


def read_prompts(
    path: Path | str,
    *,
    references: Path | None = None,
    memorized: bool = False,
    limit: int | None = None,
    prefix: str = "",
) -> list[Prompt]:
    """Reads a list of prompts in the format that its file ending names.

    ``.csv`` (separated by ``,`` or ``;``), ``.jsonl``, ``.parquet`` and data sets of Hugging Face
    (:mod:`nemo_bench.prompts.datasets`) have columns, named in any case; others are ignored:

    - text: ``caption``, ``prompt`` or ``text``, used unchanged;
    - kind (optional): ``kind``, ``type`` or ``overfit_type``, with VM (MV, RV), TM (TV), memorized, or nothing;
    - id (optional): ``id``, which must be unique; ``index`` or a first column without a name, used if unique;
    - reference images (optional): ``references`` or ``reference``, file names as a list or separated by ``|``;
    - links to reference images (optional): ``url`` or ``urls``, a list or text
      (:func:`nemo_bench.prompts.lists.split_links`), for images that ``nemo-bench references`` downloaded;
    - for variants of other prompts ``variant_of``, the id of such a prompt, of this list or of another one in the run,
      and ``axis``: rewording, paraphrase, translation or neighbour.

    A list may be one of the file format or written out as text (:func:`nemo_bench.prompts.lists.split_list`).
    ``.txt`` has one prompt a line. Prompts without ids are numbered ``<prefix>-0001``, before ``limit`` applies.

    Args:
        path: The file or data set.
        references: Folder of relative reference files and of downloaded ones; None for the folder of ``path``.
        memorized: Whether prompts without a kind count as memorized, but for variants.
        limit: Prompts to read from the start, at least 1; None for all.
        prefix: Start of numbered ids; by default the file name without its ending.

    Returns:
        The prompts in file order, at least one. All ``references`` exist and can be decoded; the rest is in
        ``damaged_references`` and ``dead_references``.

    Raises:
        PromptError: The file or a reference file is missing, the file is no list of prompts, only some of its links
            were tried, or no reference file can be decoded. The message names file and line.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"{path}: limit is {limit}; expected 1 or more, or None for all prompts")
    rows, name = _read_list(path)
    folder = Path(path).parent if references is None else Path(references)
    prompts = [
        _prompt(id_, row, folder, memorized=memorized)
        for id_, row in zip(_ids(rows, prefix or name), rows, strict=True)
    ][:limit]
    if (folder / MANIFEST).is_file():
        prompts = with_downloaded(str(path), folder, prompts)
    elif references is not None and any(p.links for p in prompts) and not any(p.references for p in prompts):
        msg = f"{path} has links to reference images, but {folder} holds no {MANIFEST} of fetched ones"
        raise PromptError(f"{msg}; fetch them: nemo-bench references {path} {folder}")
    return check_references(str(path), prompts)


def read_links(path: Path | str) -> dict[str, tuple[str, ...]]:
    """Reads links by prompt id, in file order, in any format of :func:`read_prompts`; a prompt may have none.

    Raises:
        PromptError: The file is no list of prompts or has no links.
    """
    rows, name = _read_list(path)
    links = {id_: _links(row) for id_, row in zip(_ids(rows, name), rows, strict=True)}
    if not any(links.values()):
        msg = f"{path}: no prompt has a link to an image. Columns found: {', '.join(map(repr, rows[0].cells))}. "
        raise PromptError(f"{msg}Accepted names: {', '.join(COLUMNS['links'])}")
    return links


def is_prompt_source(source: Path | str) -> bool:
    """Tells whether a text names a file or data set of prompts, by its form; a file need not exist.

    Raises:
        PromptError: It begins with ``hf://`` but is no address.
    """
    return Path(source).suffix in READERS or dataset_address(source) is not None


def read_rows(path: Path, needed: str = "prompts") -> list[Row]:
    """Reads all columns of a list in any file format of :func:`read_prompts`, unchecked; at least one row.

    Args:
        path: The file.
        needed: Content of the column that every row must have, a key of :data:`COLUMNS`.

    Raises:
        PromptError: The file is missing or is no such list. The message names file and line.
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
    rows = list(reader(path, content, needed))
    if not rows:
        raise PromptError(f"{path}: holds no prompt; expected at least one")
    return rows


def _read_list(source: Path | str) -> tuple[list[Row], str]:
    """Reads the rows of a file or data set, and its name for numbered ids."""
    address = dataset_address(source)
    if address is None:
        return read_rows(Path(source)), Path(source).stem
    optional = [
        name for content in ("kinds", "references", "links", "ids", "originals", "axes") for name in COLUMNS[content]
    ]
    cells = read_dataset(address, COLUMNS["prompts"], optional)
    if not cells:
        raise PromptError(f"prompts of {source}: holds no prompt; expected at least one")
    return list(_table_rows(str(source), list(cells[0]), cells, "prompts")), Path(address["place"]).name


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    names = [file.name for file in visible(path.parent.iterdir(), path.parent) if file.suffix.lower() in READERS]
    return did_you_mean(path.name, names) if names else f"No file of prompts is in the folder {path.parent.resolve()}."


def _decode(path: Path, content: bytes) -> str:
    """Decodes UTF-8, with or without the byte order mark of spreadsheets."""
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


def _columns(where: str, names: Sequence[str], needed: str) -> list[str]:
    """Column names in lower case, or by position; checks that each is unique and the needed one is there."""
    columns = [name.strip().lower() or f"#{position}" for position, name in enumerate(names)]
    twice = next((name for name, count in Counter(columns).items() if count > 1), None)
    if twice is not None:
        raise PromptError(f"{where}: two columns are called {twice!r} (case does not matter); rename one")
    if not set(columns) & set(COLUMNS[needed]):
        msg = f"{where}: no column of {needed}. Columns found: {', '.join(map(repr, names))}. "
        raise PromptError(f"{msg}Accepted names: {', '.join(COLUMNS[needed])}")
    return columns


def _read_csv(path: Path, content: bytes, needed: str) -> Iterator[Row]:
    text = _decode(path, content)
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a list of neurons may be longer than Python expects
    delimiter = _delimiter(text, needed)
    # Strict, since a quotation mark that is never closed would swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    start = 1
    try:
        for cells in reader:
            where = f"{path}, line {start}"
            start = reader.line_num + 1
            if not cells:
                continue
            if not columns:
                columns = _columns(where, cells, needed)
                continue
            if len(cells) != len(columns):
                msg = f"{where}: {len(cells)} cells, but {len(columns)} columns; quote texts that hold {delimiter!r}"
                raise PromptError(msg)
            yield Row(where, dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        msg = f"{path}, line {start}: not valid CSV ({error}); close every quoted text,"
        raise PromptError(f"{msg} and double quotation marks within it") from error


def _delimiter(text: str, needed: str) -> str:
    """Guesses the delimiter: the one that yields a needed column, else the one that yields most columns."""

    def split(delimiter: str) -> tuple[bool, int]:
        names = next(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)), [])
        return any(name.strip().lower() in COLUMNS[needed] for name in names), len(names)

    # The first wins ties: a file of one column is not to be split at all, and no text holds a unit separator.
    return max("\x1f", ",", ";", key=split)


def _read_jsonl(path: Path, content: bytes, needed: str) -> Iterator[Row]:
    for where, line in _lines(path, content):
        try:
            value = parse_json(line)
        except ValueError as error:
            raise PromptError(f"{where}: not valid JSON ({error}); expected one object a line") from error
        if not isinstance(value, dict):
            raise PromptError(f'{where}: {line.strip()[:40]} is no object; expected such as {{"text": "a prompt"}}')
        yield Row(where, dict(zip(_columns(where, list(value), needed), value.values(), strict=True)))


def _read_txt(path: Path, content: bytes, needed: str) -> Iterator[Row]:
    for where, line in _lines(path, content):
        yield Row(where, {"text": line})


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Lines that are not blank. Not ``splitlines``, which also splits at characters that texts may hold."""
    for number, line in enumerate(io.StringIO(_decode(path, content), newline=None), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.removesuffix("\n")


def _read_parquet(path: Path, content: bytes, needed: str) -> Iterator[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise PromptError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (OSError, ValueError) as error:
        raise PromptError(f"{path}: not valid parquet ({error})") from error
    return _table_rows(str(path), table.column_names, table.to_pylist(), needed)


def _table_rows(source: str, names: Sequence[str], table: list[dict[str, Any]], needed: str) -> Iterator[Row]:
    columns = _columns(source, names, needed)
    for number, cells in enumerate(table, start=1):
        yield Row(f"{source}, row {number}", dict(zip(columns, cells.values(), strict=True)))


READERS: dict[str, Callable[[Path, bytes, str], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
"""Readers of lists by file ending."""


def _prompt(id_: str, row: Row, folder: Path, *, memorized: bool) -> Prompt:
    kind = _kind(row)
    variant_of, axis = _variant(row)
    if axis and kind:
        msg = f"{row.where}: '{id_}' is a {axis} of '{variant_of}', and of kind {kind}"
        raise PromptError(f"{msg}; leave the kind empty: whether variants are memorized is what a run shows")
    if memorized and not axis:
        kind = kind or "memorized"
    links = _links(row)
    return Prompt(id_, _text(row), kind, _references(row, folder), links=links, variant_of=variant_of, axis=axis)


def _variant(row: Row) -> tuple[str | None, Axis | None]:
    """Id of the prompt that a variant varies, and in what way; None for both where it is no variant."""
    given, word = (row.first(content) for content in ("originals", "axes"))
    original, axis = ("" if cell is None else str(cell).strip() for cell in (given, word))
    if axis not in AXES:
        raise PromptError(f"{row.where}: {word!r} is no axis of a variant. {did_you_mean(axis, filter(None, AXES))}")
    if bool(original) != bool(axis):
        msg = f"{row.where}: variant_of is {original!r} and axis {axis!r}"
        raise PromptError(
            f"{msg}; give both for a variant, the id of a prompt and its axis, and none for other prompts"
        )
    return original or None, AXES[axis]


def _text(row: Row) -> str:
    text = row.first("prompts")
    if text is not None and not isinstance(text, str):
        raise PromptError(f"{row.where}: the prompt is {text!r}, a {type(text).__name__}; expected text")
    if not text or not text.strip():
        raise PromptError(f"{row.where}: the prompt is empty; write one or take the line out")
    return _printable(row, "prompt", text)


def _printable(row: Row, what: str, text: str) -> str:
    """Refuses characters that JSON can escape, but neither tokenizers nor files take."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        msg = f"{row.where}: the {what} {text!r} holds a NUL or half a surrogate pair; expected characters of UTF-8"
        raise PromptError(msg)
    return text


def _kind(row: Row) -> Kind | None:
    value = row.first("kinds")
    word = "" if value is None else str(value).strip().upper()
    if word not in KINDS:
        hint = did_you_mean(word, [name for name in KINDS if name])
        raise PromptError(f"{row.where}: {value!r} is no kind of memorization. {hint} Or leave it empty.")
    return KINDS[word]


def _references(row: Row, folder: Path) -> tuple[Path, ...]:
    value = row.first("references")
    texts = split_list(value)
    if texts is None and isinstance(value, str):
        texts = [value]  # a name may begin with a bracket
    if texts is None:
        msg = f"{row.where}: the references are {value!r:.60}; expected file names, as a list or separated by '|'"
        raise PromptError(msg)
    names = [name.strip() for text in texts for name in text.split("|")]
    return tuple(folder / name for name in names if name)


def _links(row: Row) -> tuple[str, ...]:
    """Links of a row, each once, without user names and passwords, which nobody else is to have."""
    texts = split_list(row.first("links"))
    if texts is None:
        raise PromptError(f"{row.where}: holds no list of links; expected such as ['https://...', ...], whole")
    return tuple(dict.fromkeys(without_login(link) for text in texts for link in split_links(text)))


def _ids(rows: Sequence[Row], prefix: str) -> list[str]:
    """Ids from the first column that has unique ones, else numbers."""
    for column in (*COLUMNS["ids"], "#0"):  # pandas writes ids as a first column without a name
        cells = [row.cells.get(column) for row in rows]
        ids = [
            _printable(row, "id", str(cell).strip()) if isinstance(cell, str | int) else ""
            for row, cell in zip(rows, cells, strict=True)
        ]
        if column == "id" and any("id" in row.cells for row in rows):
            _check_ids(rows, ids)
        if all(ids) and len(set(ids)) == len(ids):
            return ids
    return [f"{prefix}-{position:04d}" for position in range(1, len(rows) + 1)]


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
