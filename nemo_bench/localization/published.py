"""The CSV form of published localizations (scripts of Hintersdorf et al. 2024).

Separated by ``;``, one line a prompt, with the columns :data:`COLUMNS`. A cell of neurons is a list of lists, one list
of indices a value layer in network order: ``[[3, 17], [], [], [], [], [], []]``. A prompt that is not memorized has
empty lists and scores of 0.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, Json, TypeAdapter, ValidationError

from nemo_bench.errors import NemoBenchError
from nemo_bench.prompts import read_rows
from nemo_bench.records.data import Neurons

T = TypeVar("T")

COLUMNS = ("Caption", "URL", "Initial Neurons", "Initial SSIM", "Refined Neurons", "Refined SSIM")
Layers = tuple[tuple[int, ...], ...]
"""Indices of neurons by layer in network order."""
_INDEX = Annotated[int, Field(strict=True, ge=0)]
_LAYERS: tuple[TypeAdapter[Layers], str] = (
    TypeAdapter(Json[Annotated[tuple[tuple[_INDEX, ...], ...], Field(min_length=1)]]),
    "a list of whole numbers for every layer, such as [[3, 17], []]",
)
_SCORE: tuple[TypeAdapter[float], str] = (TypeAdapter(Annotated[float, Field(allow_inf_nan=False)]), "a number")
"""What cells hold, with the words for it."""


class PublishedRow(NamedTuple):
    """One prompt of a published file."""

    caption: str  #: The prompt.
    url: str  #: URL of its training image, or empty.
    initial: Layers  #: Candidates before refinement as they are listed, so possibly twice.
    initial_score: float  #: Highest similarity with the candidates blocked.
    refined: Layers  #: The memorization neurons, likewise.
    refined_score: float  #: Highest similarity with the memorization neurons blocked.


def read_published(path: Path) -> list[PublishedRow]:
    """Reads the lines of a published ``.csv`` file, at least one, all with the same number of layers.

    Raises NemoBenchError with file and line if the file or a column is missing, or a cell has the wrong form.
    """
    rows: list[PublishedRow] = []
    for where, cells in read_rows(path):
        missing = [name for name in COLUMNS if name.lower() not in cells and name != "URL"]
        if missing:
            msg = f"{where}: no column {', '.join(map(repr, missing))}; expected {', '.join(COLUMNS)}, separated by ;"
            raise NemoBenchError(msg)
        row = PublishedRow(
            cells["caption"],
            cells.get("url", ""),
            _cell(where, "Initial Neurons", cells, *_LAYERS),
            _cell(where, "Initial SSIM", cells, *_SCORE),
            _cell(where, "Refined Neurons", cells, *_LAYERS),
            _cell(where, "Refined SSIM", cells, *_SCORE),
        )
        rows.append(row)
        expected = len(rows[0].initial)
        for given in (len(row.initial), len(row.refined)):
            if given != expected:
                msg = f"{where}: neurons of {given} layers, but of {expected} before; expected one model"
                raise NemoBenchError(msg)
    return rows


def read_cluster(path: Path) -> Layers:
    """Reads a published ``.npz`` file of Di et al. (2026): one set of neurons, an array a layer in network order.

    Layers without neurons are empty arrays of floating-point numbers there.

    Raises NemoBenchError if the file is missing or has another form.
    """
    try:
        with np.load(path) as file:
            arrays = [file[f"arr_{number}"] for number in range(len(file.files))]
        for number, ids in enumerate(arrays):
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise TypeError(f"arr_{number} is no list of whole numbers")
        return tuple(tuple(ids.astype(int).tolist()) for ids in arrays)
    except Exception as error:
        msg = f"{path}: no neurons can be read ({error}); expected arrays arr_0, arr_1 ... of indices, one a layer"
        raise NemoBenchError(msg) from error


def published_text(rows: Iterable[PublishedRow]) -> str:
    """CSV that :func:`read_published` and the published scripts read."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=";")
    writer.writerow(COLUMNS)
    for row in rows:
        initial, refined = ([list(ids) for ids in layers] for layers in (row.initial, row.refined))
        writer.writerow([row.caption, row.url, initial, row.initial_score, refined, row.refined_score])
    return buffer.getvalue()


def by_position(neurons: Mapping[str, Sequence[int]], widths: Mapping[str, int]) -> Layers:
    """Converts indices by layer name to the published form; ``widths`` are the model's layers in network order."""
    return tuple(tuple(neurons.get(layer, ())) for layer in widths)


def by_name(layers: Sequence[Sequence[int]], widths: Mapping[str, int]) -> Neurons:
    """Converts published neurons to neurons by layer name, each once; see :func:`by_position`.

    Raises NemoBenchError if the model has another number of layers, or a layer has no such neuron.
    """
    if len(layers) != len(widths):
        msg = f"neurons of {len(layers)} layers, but the model has {len(widths)}; take the model they were found in"
        raise NemoBenchError(f"{msg}, with model.layers=down+mid for published ones")
    for ids, (name, width) in zip(layers, widths.items(), strict=True):
        if ids and max(ids) >= width:
            msg = f"neuron {max(ids)} of layer '{name}', which has {width}; take the model they were found in"
            raise NemoBenchError(msg)
    return Neurons(dict(zip(widths, layers, strict=True)))


def _cell(where: str, column: str, cells: Mapping[str, Any], kind: TypeAdapter[T], expected: str) -> T:
    text = cells[column.lower()]
    try:
        return kind.validate_python(text)
    except ValidationError:
        raise NemoBenchError(f"{where}: {column} is {str(text)[:60]!r}; expected {expected}") from None
