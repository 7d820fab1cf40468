"""Prompts from Hugging Face ``datasets``, on the hub or saved to disk."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bench import hub
from nemo_bench.errors import ModelError, PromptError, did_you_mean

HUB = "hf://"
_ON_HUB = re.compile(r"hf://([^/:]+/[^/:]+)(?:/([^/:]+))?(?::([^:]*))?(?::([^:]*))?")
_SAVED = re.compile(r"([^:]+)(?::([^:]*))?(?::([^:]*))?")


class DatasetAddress(NamedTuple):
    """Address of a column of prompts in a data set.

    Written ``hf://user/name``, ``hf://user/name/config`` or as the folder that ``save_to_disk`` made, with ``:split``
    or ``:split:column`` after it if needed.

    Attributes:
        source: The address as written.
        place: Hub id or folder.
        config: Configuration of a data set of the hub, or None.
        split: Name of the split, or None for the only one.
        column: Column of prompts, or None for the usual names.
    """

    source: str
    place: str
    config: str | None
    split: str | None
    column: str | None

    @classmethod
    def parse(cls, source: Path | str) -> DatasetAddress | None:
        """Parses a source of prompts; returns None if it is a file.

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
            return cls(text, parts[1], parts[2], parts[3] or None, parts[4] or None)
        parts = _SAVED.fullmatch(text)
        if parts and any((Path(parts[1]) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            return cls(text, parts[1], None, parts[2] or None, parts[3] or None)
        return None

    def read(self, texts: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
        """Reads all rows of the split.

        Args:
            texts: Accepted names of the column of prompts, in lower case; unused if the address names a column.
            others: Names of further columns to read; all others are skipped, since they may hold images.

        Returns:
            Cells by column name; the column that the address names is called ``text``.

        Raises:
            PromptError: The library or the data set is missing, or has no such split or column.
        """
        data = self._load()
        names = data.column_names
        if self.column is not None and self.column not in names:
            msg = f"prompts of {self.source}: there is no column '{self.column}'."
            raise PromptError(f"{msg} {did_you_mean(self.column, names)}")
        if self.column is None and not any(name.lower() in texts for name in names):
            msg = f"prompts of {self.source}: no column of prompts. Columns found: {', '.join(names)}. "
            raise PromptError(f"{msg}Accepted names: {', '.join(texts)}; or name one: {self.source}:split:column")
        wanted = {*others, *(() if self.column else texts)}
        cells = data.select_columns([name for name in names if name == self.column or name.lower() in wanted]).to_list()
        return [{"text" if name == self.column else name: value for name, value in row.items()} for row in cells]

    def _load(self) -> Any:
        try:
            library = importlib.import_module("datasets")
        except ImportError as error:
            msg = f"prompts of {self.source}: reading them needs datasets; pip install 'nemo-bench[datasets]'"
            raise PromptError(msg) from error
        try:
            if self.source.startswith(HUB):
                hub.check_data_set(self.place)
                loaded = library.load_dataset(self.place, self.config)
            else:
                loaded = library.load_from_disk(self.place)
        except ModelError as error:
            raise PromptError(f"prompts of {self.source}: {error}") from error
        except Exception as error:  # the library raises many kinds, its own and those of whichever client it uses
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PromptError(f"prompts of {self.source}: the data set can't be loaded ({first})") from error
        splits = loaded if isinstance(loaded, dict) else {loaded.split or "train": loaded}
        by_name = {str(name): data for name, data in splits.items()}
        if self.split is None and len(by_name) == 1:
            return next(iter(by_name.values()))
        if self.split not in by_name:
            problem = f"is no split '{self.split}'" if self.split else f"are {len(by_name)} splits"
            place = HUB + self.place if self.source.startswith(HUB) else self.place
            msg = f"prompts of {self.source}: there {problem}; name one, such as {place}:{next(iter(by_name))}"
            raise PromptError(f"{msg}. {did_you_mean(str(self.split), by_name)}")
        return by_name[self.split]
