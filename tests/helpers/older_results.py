"""A change of the form of results, as this project once made it, and a run in the form before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.records import schema
from nemo_bench.records.data import Localization

FIELDS = {*Localization.__dataclass_fields__}


def unfold(name: str, content: Any) -> Any:
    """From the form before commits 5ca334e and 4619ed5, which had a class around a list, and none in a line."""
    if name == "env.json" and isinstance(content, dict):
        return content.get("starts", content)
    if name == "localize" and isinstance(content, dict) and "localization" not in content:
        found = {key: value for key, value in content.items() if key in FIELDS}
        others = {key: value for key, value in content.items() if key not in FIELDS}
        return {**others, "localization": found} if "neurons" in found else others
    return content


def two_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the form of today version 2, and the one before that change version 1."""
    monkeypatch.setattr(schema, "VERSION", 2)
    monkeypatch.setattr(schema, "UPGRADES", {1: unfold})


def make_older(folder: Path) -> int:
    """Brings a cell back to the form of version 1; returns how many localizations it has."""
    count = 0
    for path in folder.glob("records/localize.*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        count += len(records)
        for record in records:
            record |= record.pop("localization", {})
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    env = folder / "env.json"
    env.write_text(json.dumps({"starts": json.loads(env.read_text())}))
    return count
