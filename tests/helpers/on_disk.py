"""Results as they lie on disk: plain JSON, read without the package's own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def read_records(folder: Path, stage: str) -> dict[str, dict[str, Any]]:
    """Records of a cell by id, over the files of all processes; the first of each id."""
    records: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "records").glob(f"{stage}.*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            records.setdefault(record["id"], record)
    return records
