"""How often records are read from disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.cli import main


def test_run_reads_each_set_of_records_at_most_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[Path] = Counter()
    opened = Path.open

    def count(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if path.parent.name == "records" and "r" in mode:
            reads[path] += 1
        return opened(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", count)
    words = ["method=none,random,nemo", "prompts.limit=1", "prompts.calibration_limit=4", "model.steps=2", "seeds=1"]
    assert main(["run", "experiment=smoke", *words, f"root={tmp_path}"]) == 0
    assert {path.name.split(".")[0] for path in reads} >= {"localize", "memorization", "generate", "score", "calibrate"}
    assert max(reads.values()) <= 3, reads.most_common(5)
