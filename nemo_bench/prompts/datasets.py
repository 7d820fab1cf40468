"""Prompts from Hugging Face ``datasets``, on the hub or saved to disk.

An address is written ``hf://user/name``, ``hf://user/name/config`` or as the folder that ``save_to_disk`` made, with
``:split`` or ``:split:column`` after it if needed.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_bench import hub
from nemo_bench.errors import ModelError, PromptError, did_you_mean, first_line

HUB = "hf://"
_PART = r"(?::(?P<split>[^:]*))?(?::(?P<column>[^:]*))?"
_ON_HUB = re.compile(r"hf://(?P<place>[^/:]+/[^/:]+)(?:/(?P<config>[^/:]+))?" + _PART)
_SAVED = re.compile(r"(?P<place>[^:]+)" + _PART)


def dataset_address(source: Path | str) -> re.Match[str] | None:
    """Takes the address of a data set apart, into ``place`` (hub id or folder), ``config``, ``split``, ``column``.

    Returns:
        The parts by name; None if the source of prompts is a file.

    Raises:
        PromptError: It begins with ``hf://`` but is no address.
    """
    text = str(source)
    if text.startswith(HUB):
        parts = _ON_HUB.fullmatch(text)
        if parts is None:
            raise PromptError(
                f"prompts of {text}: expected hf://user/name or hf://user/name/config, and after it :split or "
                ":split:column where need be, such as hf://user/name:train:prompt"
            )
        return parts
    parts = _SAVED.fullmatch(text)
    names = ("dataset_info.json", "dataset_dict.json")
    return parts if parts and any((Path(parts["place"]) / name).is_file() for name in names) else None


def read_dataset(address: re.Match[str], texts: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
    """Reads all rows of a split.

    Args:
        address: From :func:`dataset_address`.
        texts: Accepted names of the column of prompts, in lower case; unused if the address names a column.
        others: Names of further columns to read; all others are skipped, since they may hold images.

    Returns:
        Cells by column name; the column that the address names is called ``text``.

    Raises:
        PromptError: The library or the data set is missing, or has no such split or column.
    """
    source, column = address.string, address["column"]
    data = _load(address)
    names = data.column_names
    if column and column not in names:
        raise PromptError(f"prompts of {source}: there is no column '{column}'. {did_you_mean(column, names)}")
    if not column and not any(name.lower() in texts for name in names):
        msg = f"prompts of {source}: no column of prompts. Columns found: {', '.join(names)}. "
        raise PromptError(f"{msg}Accepted names: {', '.join(texts)}; or name one: {source}:split:column")
    wanted = {*others, *(() if column else texts)}
    cells = data.select_columns([name for name in names if name == column or name.lower() in wanted]).to_list()
    return [{"text" if name == column else name: value for name, value in row.items()} for row in cells]


def _load(address: re.Match[str]) -> Any:
    """The split that an address names, or the only one."""
    source, place, split = address.string, address["place"], address["split"]
    on_hub = source.startswith(HUB)
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        msg = f"prompts of {source}: reading them needs datasets; pip install 'nemo-bench[datasets]'"
        raise PromptError(msg) from error
    try:
        if on_hub:
            hub.check_data_set(place)
        loaded = library.load_dataset(place, address["config"]) if on_hub else library.load_from_disk(place)
    except ModelError as error:
        raise PromptError(f"prompts of {source}: {error}") from error
    except Exception as error:  # the library raises many kinds, its own and those of whichever client it uses
        raise PromptError(f"prompts of {source}: the data set can't be loaded ({first_line(error)})") from error
    splits = loaded if isinstance(loaded, dict) else {loaded.split or "train": loaded}
    by_name = {str(name): data for name, data in splits.items()}
    if not split and len(by_name) == 1:
        return next(iter(by_name.values()))
    if split not in by_name:
        problem = f"is no split '{split}'" if split else f"are {len(by_name)} splits"
        example = f"{HUB if on_hub else ''}{place}:{next(iter(by_name))}"
        msg = f"prompts of {source}: there {problem}; name one, such as {example}"
        raise PromptError(f"{msg}. {did_you_mean(str(split), by_name)}")
    return by_name[split]
