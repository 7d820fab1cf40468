"""A run that is asked for again: what counts as finished."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from nemo_bench.benchmark.pending import is_complete
from nemo_bench.benchmark.plan import plan
from nemo_bench.cli import main
from nemo_bench.config import grid
from nemo_bench.report import REPORT_FILES
from small_runs import small

WORDS = [*small(seeds=1, steps=2), "prompts.limit=1", "method=none,random_numbers", "name=run"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    assert main(["run", *WORDS, f"root={root}"]) == 0
    return root / "run"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", copy_function=shutil.copy2))


def complete(folder: Path) -> bool:
    return is_complete(plan(grid([*WORDS, f"root={folder.parent}"])))


def cell(folder: Path, method: str) -> Path:
    (path,) = folder.glob(f"*__{method}__*")
    return path


def test_finished_run_is_complete_and_writes_nothing(folder: Path) -> None:
    assert complete(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert main(["run", *WORDS, f"root={folder.parent}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", REPORT_FILES)
def test_run_without_a_file_of_its_report_writes_it_again(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert not complete(folder)


def test_table_older_than_its_scores_is_made_again(folder: Path) -> None:
    place = cell(folder, "random_numbers")
    later = (place / "metrics.json").stat().st_mtime_ns + 1
    os.utime(place / "score.done", ns=(later, later))
    assert not complete(folder)


def test_after_the_clock_was_set_back_a_table_is_made_again_once(folder: Path) -> None:
    later = time.time_ns() + 10**12
    for path in folder.glob("*/score.done"):
        os.utime(path, ns=(later, later))
    assert not complete(folder)
    assert main(["run", *WORDS, f"root={folder.parent}"]) == 0
    assert complete(folder)


def test_table_older_than_the_unmitigated_scores_is_made_again(folder: Path) -> None:
    later = max(path.stat().st_mtime_ns for path in folder.glob("*/metrics.json")) + 1
    os.utime(cell(folder, "none") / "score.done", ns=(later, later))
    assert not complete(folder)


def test_cell_whose_folder_was_deleted_leaves_the_report(folder: Path) -> None:
    shutil.rmtree(cell(folder, "random_numbers"))
    words = [*(word for word in WORDS if not word.startswith("method=")), "method=none", f"root={folder.parent}"]
    assert not is_complete(plan(grid(words)))
    assert main(["run", *words]) == 0
    assert {row["method"] for row in json.loads((folder / "leaderboard.json").read_text())["rows"]} == {"none"}
    assert is_complete(plan(grid(words)))
