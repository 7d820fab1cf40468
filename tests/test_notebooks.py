"""The notebooks run as they are, and what is committed of them is small and says nothing of a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LARGEST = 300_000
"""Bytes of a notebook with its outputs."""


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: Any) -> int:
    return sum("image/jpeg" in output.get("data", {}) for output in outputs(notebook))


def test_the_four_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["compare_versions", "fine_tuning", "leaderboard", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_executed_quietly_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert pictures(notebook)
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert path.stat().st_size < LARGEST
    assert not [home for home in ("/tmp/", "/home/", "/root/", "site-packages") if home in path.read_text("utf-8")]


def test_a_newcomer_needs_less_than_ten_cells() -> None:
    (path,) = (path for path in NOTEBOOKS if path.stem == "quickstart")
    assert len(nbformat.read(path, as_version=4).cells) < 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_is_committed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": tmp_path}}).execute()
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert pictures(notebook) == pictures(committed)
