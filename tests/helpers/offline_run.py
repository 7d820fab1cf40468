"""Reads offline runs by W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class OfflineRun:
    """What ``wandb leet inspect`` prints of an offline run.

    Args:
        cell: A cell that was tracked offline; its last run is read.
    """

    def __init__(self, cell: Path) -> None:
        self.folder = sorted((cell / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)[-1]
        wandb = str(Path(sys.executable).with_name("wandb"))
        words = [wandb, "leet", "inspect", "--json", str(self.folder)]
        shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        self.records = [json.loads(line) for line in shown.stdout.splitlines()]

    def contents(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind."""
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def summary(self) -> dict[str, Any]:
        """Summary as it is at the end."""
        return {key: value for update in self.contents("summary") for key, value in update["update"].items()}

    @property
    def history(self) -> dict[str, Any]:
        """The one step."""
        (step,) = self.contents("history")
        return step["item"]

    @property
    def config(self) -> dict[str, Any]:
        """Config, without W&B's own part, as it is at the end."""
        (start,) = self.contents("run")
        return {key: value for key, value in start["config"]["update"].items() if key != "_wandb"}

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """Settings of the custom charts by key."""
        mark = "_wandb.visualize."
        updates = {key: value for update in self.contents("config") for key, value in update["update"].items()}
        return {key.removeprefix(mark): v["panel_config"] for key, v in updates.items() if key.startswith(mark)}

    def table(self, key: str) -> dict[str, Any]:
        """Columns and data of a table that was logged."""
        return json.loads((self.folder / "files" / self.history[f"{key}.path"]).read_text())

    def artifacts(self, kind: str) -> list[dict[str, Any]]:
        """Artifacts of a type, each with its files by name."""
        found = [artifact for artifact in self.contents("artifact") if artifact["type"] == kind]
        return [{**a, "files": {entry["path"]: entry for entry in a["manifest"]["contents"]}} for a in found]
