"""Lists of prompts from Hugging Face ``datasets``: of the hub, or saved to disk."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bench import hub
from nemo_bench.errors import PromptError, did_you_mean

HUB = "hf://"
_SAVED = ("dataset_info.json", "dataset_dict.json")


class DatasetPlace(NamedTuple):
    """Where prompts of ``datasets`` are.

    Written ``hf://user/name``, ``hf://user/name/config`` or as the folder that ``save_to_disk`` made, each with
    ``:split`` or ``:split:column`` after it where need be.

    Attributes:
        source: As it was given.
        place: Hub id or folder.
        config: Configuration of a hub id, or None.
        split: Name of the split, or None.
        column: Column of prompts, or None for the usual names.
    """

    source: str
    place: str
    config: str | None
    split: str | None
    column: str | None

    @classmethod
    def from_source(cls, source: Path | str) -> DatasetPlace | None:
        """What a source of prompts names, None where it is a file.

        Raises:
            PromptError: It begins with ``hf://`` and goes on wrongly.
        """
        text = str(source)
        place, *rest = text.removeprefix(HUB).split(":")
        split, column = ([part or None for part in rest] + [None, None])[:2]
        if text.startswith(HUB):
            parts = place.split("/")
            if not 2 <= len(parts) <= 3 or not all(parts) or len(rest) > 2:
                raise PromptError(
                    f"prompts of {text}: expected hf://user/name or hf://user/name/config, and after it :split or "
                    ":split:column where need be, such as hf://user/name:train:prompt"
                )
            return cls(text, "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split, column)
        if len(rest) <= 2 and any((Path(place) / name).is_file() for name in _SAVED):
            return cls(text, place, None, split, column)
        return None

    @property
    def name(self) -> str:
        """What numbered ids start with."""
        return Path(self.place).name

    def rows(self, texts: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
        """All rows of the split.

        Args:
            texts: Names of the column of prompts, in lower case, where none was named.
            others: Further columns that are read if they are there; yet others may hold pictures.

        Returns:
            Cells by column name; the column that was named is called ``text``.

        Raises:
            PromptError: The library or the data set is missing, or has no such split or column.
        """
        try:
            library = importlib.import_module("datasets")
        except ImportError as error:
            msg = f"prompts of {self.source}: reading them needs datasets; pip install 'nemo-bench[datasets]'"
            raise PromptError(msg) from error
        try:
            if self.source.startswith(HUB):
                hub.check_data_set(self.place)
                found = library.load_dataset(self.place, self.config)
            else:
                found = library.load_from_disk(self.place)
        except PromptError as error:
            raise PromptError(f"prompts of {self.source}: {error}") from error
        except Exception as error:  # the library raises many kinds, its own and those of whichever client it uses
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PromptError(f"prompts of {self.source}: the data set can't be loaded ({first})") from error
        data = self._split_of(found)
        if self.column is not None and self.column not in data.column_names:
            msg = f"prompts of {self.source}: there is no column '{self.column}'."
            raise PromptError(f"{msg} {did_you_mean(self.column, data.column_names)}")
        if self.column is None and not any(name.lower() in texts for name in data.column_names):
            msg = f"prompts of {self.source}: no column of prompts. Columns found: {', '.join(data.column_names)}. "
            raise PromptError(f"{msg}Accepted names: {', '.join(texts)}; or name one: {self.source}:split:column")
        read = {*others, *(() if self.column else texts)}
        wanted = [name for name in data.column_names if name == self.column or name.lower() in read]
        cells = data.select_columns(wanted).to_list()
        return [{"text" if name == self.column else name: value for name, value in row.items()} for row in cells]

    def _split_of(self, found: Any) -> Any:
        """The split that was named, or the only one."""
        splits = dict(found) if isinstance(found, dict) else {found.split or "train": found}
        names = [str(name) for name in splits]
        if self.split is None and len(names) == 1:
            return splits[next(iter(splits))]
        if self.split not in names:
            given = f"is no split '{self.split}'" if self.split else f"are {len(names)} splits"
            place = HUB + self.place if self.source.startswith(HUB) else self.place
            hint = did_you_mean(str(self.split), names)
            msg = f"prompts of {self.source}: there {given}; name one, such as {place}:{names[0]}"
            raise PromptError(f"{msg}. {hint}")
        return next(data for name, data in splits.items() if str(name) == self.split)
