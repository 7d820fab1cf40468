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
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from nemo_bench.errors import NemoBenchError
from nemo_bench.prompts import read_rows
from nemo_bench.records.data import Neurons

COLUMNS = ("Caption", "URL", "Initial Neurons", "Initial SSIM", "Refined Neurons", "Refined SSIM")
Layers = tuple[tuple[int, ...], ...]
"""Indices of neurons by layer in network order."""
_LAYERS = TypeAdapter(Annotated[list[list[Annotated[int, Field(strict=True, ge=0)]]], Field(min_length=1)])
_SCORE = TypeAdapter(Annotated[float, Field(allow_inf_nan=False)])


class PublishedRow(NamedTuple):
    """One prompt of a published file.

    Attributes:
        caption: The prompt.
        url: URL of its training image, or empty.
        initial: Candidates before refinement as they are listed, so possibly twice.
        initial_score: Highest similarity with the candidates blocked.
        refined: The memorization neurons, likewise.
        refined_score: Highest similarity with the memorization neurons blocked.
    """

    caption: str
    url: str
    initial: Layers
    initial_score: float
    refined: Layers
    refined_score: float


def read_published(path: Path) -> list[PublishedRow]:
    """Reads the lines of a published ``.csv`` file, at least one, all with the same number of layers.

    Raises:
        NemoBenchError: The file or a column is missing, or a cell has the wrong form; the message names file and line.
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
            _layers(where, "Initial Neurons", cells),
            _score(where, "Initial SSIM", cells),
            _layers(where, "Refined Neurons", cells),
            _score(where, "Refined SSIM", cells),
        )
        rows.append(row)
        expected = len(rows[0].initial)
        for given in (len(row.initial), len(row.refined)):
            if given != expected:
                msg = f"{where}: neurons of {given} layers, but of {expected} before; expected one model"
                raise NemoBenchError(msg)
    return rows


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

    Raises:
        NemoBenchError: The model has another number of layers, or a layer has no such neuron.
    """
    if len(layers) != len(widths):
        msg = f"neurons of {len(layers)} layers, but the model has {len(widths)}; take the model they were found in"
        raise NemoBenchError(f"{msg}, with model.layers=down+mid for published ones")
    for ids, (name, width) in zip(layers, widths.items(), strict=True):
        if ids and max(ids) >= width:
            msg = f"neuron {max(ids)} of layer '{name}', which has {width}; take the model they were found in"
            raise NemoBenchError(msg)
    return Neurons(dict(zip(widths, layers, strict=True)))


def _layers(where: str, column: str, cells: Mapping[str, Any]) -> Layers:
    text = cells[column.lower()]
    try:
        return tuple(map(tuple, _LAYERS.validate_json(text)))
    except ValidationError:
        expected = "a list of whole numbers for every layer, such as [[3, 17], []]"
        raise NemoBenchError(f"{where}: {column} is {str(text)[:60]!r}; expected {expected}") from None


def _score(where: str, column: str, cells: Mapping[str, Any]) -> float:
    text = cells[column.lower()]
    try:
        return _SCORE.validate_python(text)
    except ValidationError:
        raise NemoBenchError(f"{where}: {column} is {text!r}; expected a number") from None
