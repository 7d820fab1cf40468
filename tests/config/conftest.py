"""Folders for --conf."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

MINE = """
from __future__ import annotations
from contextlib import nullcontext
from nemo_bench.methods import Method

class Mine(Method):
    title = "Mine"
    summary = "a method of one's own"
    citation = "me"

    def __init__(self, strength: float, words: list[str] | None = None):
        self.strength, self.words = strength, words

    def apply(self, model, batch):
        return nullcontext(batch)
"""
STUDY = """# @package _global_
name: study
seeds: 2
grid:
  - method=none
  - method=nemo method.theta=3,4 'seeds=7'
  - model.steps=5,6
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for --conf with a method whose class is on the path."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine_of_test_config.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "mine_of_test_config", raising=False)
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("_target_: mine_of_test_config.Mine\nstrength: 1.5\n")
    return tmp_path / "conf"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder for --conf with an experiment that has a grid."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "study.yaml").write_text(STUDY)
    return tmp_path
