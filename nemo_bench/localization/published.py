"""The CSV form in which localizations are published (scripts of Hintersdorf et al. 2024).

Separated by ``;``, one line a prompt, the columns :data:`COLUMNS`. A cell of neurons is a list of lists, one list of
indices a value layer in network order: ``[[3, 17], [], [], [], [], [], []]``. A prompt that is not memorized has empty
lists and scores of 0.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bench.errors import NemoBenchError
from nemo_bench.prompts import read_rows
from nemo_bench.records.data import Neurons
from nemo_bench.records.io import parse_json

COLUMNS = ("Caption", "URL", "Initial Neurons", "Initial SSIM", "Refined Neurons", "Refined SSIM")


class PublishedRow(NamedTuple):
    """One prompt of a published file.

    Attributes:
        caption: The prompt.
        url: Its training image, or an empty text.
        initial: Candidates before refinement: indices by layer in network order, as listed, so possibly twice.
        initial_score: Highest similarity with these blocked.
        refined: The memorization neurons, in the same form.
        refined_score: Highest similarity with these blocked.
    """

    caption: str
    url: str
    initial: tuple[tuple[int, ...], ...]
    initial_score: float
    refined: tuple[tuple[int, ...], ...]
    refined_score: float


def read_published(path: Path) -> list[PublishedRow]:
    """Reads a published file.

    Args:
        path: The file, ``.csv``.

    Returns:
        Its lines in their order, at least one, all with the same number of layers.

    Raises:
        NemoBenchError: The file is missing, a column is missing, or a cell does not hold what it should; the message
            names file and line.
    """
    found: list[PublishedRow] = []
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
        expected = len((found or [row])[0].initial)
        for given in (len(row.initial), len(row.refined)):
            if given != expected:
                raise NemoBenchError(
                    f"{where}: neurons of {given} layers, but of {expected} before; expected one model"
                )
        found.append(row)
    return found


def published_text(rows: Iterable[PublishedRow]) -> str:
    """The content of a published file.

    Args:
        rows: The prompts.

    Returns:
        CSV that :func:`read_published` and the published scripts read.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=";")
    writer.writerow(COLUMNS)
    for row in rows:
        initial, refined = ([list(ids) for ids in layers] for layers in (row.initial, row.refined))
        writer.writerow([row.caption, row.url, initial, row.initial_score, refined, row.refined_score])
    return buffer.getvalue()


def by_position(neurons: Mapping[str, Sequence[int]], widths: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    """Indices layer by layer, as they are published.

    Args:
        neurons: Indices by layer.
        widths: Number of neurons of every layer of the model, in network order.
    """
    return tuple(tuple(neurons.get(layer, ())) for layer in widths)


def by_name(layers: Sequence[Sequence[int]], widths: Mapping[str, int]) -> Neurons:
    """Neurons of a model from published indices.

    Args:
        layers: Indices by layer in network order.
        widths: Number of neurons of every layer of the model, in network order.

    Returns:
        The same neurons, each once.

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


def _layers(where: str, column: str, cells: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    text = cells[column.lower()]
    try:
        layers = parse_json(text)
    except (TypeError, ValueError):
        layers = None
    if not (
        isinstance(layers, list)
        and layers
        and all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in layers)
    ):
        shown = str(text)[:60]
        msg = f"{where}: {column} is {shown!r}; expected a list of whole numbers for every layer, such as [[3, 17], []]"
        raise NemoBenchError(msg)
    return tuple(map(tuple, layers))


def _score(where: str, column: str, cells: Mapping[str, Any]) -> float:
    text = cells[column.lower()]
    try:
        score = float(text)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise NemoBenchError(f"{where}: {column} is {text!r}; expected a number")
    return score
