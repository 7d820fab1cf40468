"""How the work of a command grows with its cells, in calls of functions: those are as many on every machine."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_results import PROMPTS, change_file, write_fake_results
from nemo_bench.benchmark.pending import pending_work
from nemo_bench.benchmark.plan import plan
from nemo_bench.config import composition, grid
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import ImageRecord, Spec
from nemo_bench.records.store import Store, read_records
from nemo_bench.report.tables import leaderboard

FEW = ["method=none,random", "prompts.limit=1", "prompts.calibration_limit=4", "seeds=1"]


def _calls(act: Callable[[], object]) -> int:
    """Number of function calls that something makes the second time, when everything is imported and cached."""
    act()
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def _growth(small: int, middle: int, large: int) -> float:
    """Growth from a size to the double and to four times of it, as a share of linear growth."""
    return (large - small) / (middle - small) / 3


def _words(cells: int, root: Path) -> list[str]:
    return [*FEW, f"root={root}", f"method.seed={','.join(map(str, range(cells - 1)))}"]


def test_work_of_a_plan_and_of_what_is_pending_grows_linearly_with_cells(tmp_path: Path) -> None:
    counts = [_calls(lambda n=n: pending_work(plan(grid(_words(n, tmp_path))))) for n in (6, 11, 21)]  # type: ignore[misc]
    assert _growth(*counts) < 1.1, counts


def test_settings_of_a_group_are_composed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed: Counter[str] = Counter()
    compose = composition.compose

    def count(name: str, words: list[str], **options: Any) -> Any:
        composed[" ".join(words)] += 1
        return compose(name, words, **options)

    monkeypatch.setattr(composition, "compose", count)
    configs = grid(_words(21, tmp_path))
    assert len(configs) == 21
    assert composed.total() == len(composed) == 2


def test_a_cell_leaves_no_setting_to_the_next_one() -> None:
    words = ["method=none", "seeds=2,3", "~metrics.ssim", "model.guidance=1,2"]
    (first, *_), alone = grid(words), grid(["method=none", "seeds=2", "~metrics.ssim", "model.guidance=1"])
    assert [first] == alone
    both = grid(["method=random", "method.seed=1,2", "+metrics.own={_target_: nemo_bench.metrics.NeuronCount}"])
    assert [config.settings.method["seed"] for config in both] == [1, 2]
    assert all("own" in config.settings.metrics for config in both)
    assert "own" not in grid(["method=random"])[0].settings.metrics


def _run_of(cells: int, folder: Path) -> Path:
    """A finished run of cells that differ by a setting of their method alone."""
    run = write_fake_results(folder, prompts=PROMPTS[:2], methods={f"m{i}": "Method" for i in range(cells)})
    for number, path in enumerate(sorted(run.glob("*/spec.json"))):
        settings = {"seeds": 3, "method": {"name": "m", "seed": number, "factor": 0.0}}
        change_file(path, Spec, method="m", settings=settings)
    return run


def test_work_of_reading_a_run_and_of_its_table_grows_linearly_with_cells(tmp_path: Path) -> None:
    runs = {cells: _run_of(cells, tmp_path / str(cells)) for cells in (6, 12, 24)}
    results = {cells: load_results(run) for cells, run in runs.items()}
    reads = [_calls(lambda run=run: load_results(run)) for run in runs.values()]  # type: ignore[misc]
    assert _growth(*reads) < 1.1, reads
    tables = [_calls(lambda found=found: leaderboard(found)) for found in results.values()]  # type: ignore[misc]
    assert _growth(*tables) < 1.2, tables


def test_an_image_is_looked_at_once_to_see_what_is_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_fake_results(tmp_path / "run", methods={"none": "No mitigation"})
    store = Store(next(run.glob("*__none__*")))
    ids = list(store.records(ImageRecord))
    looks: Counter[str] = Counter()
    stat = os.stat

    def count(path: Any, **options: Any) -> Any:
        looks[str(path)] += 1
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", count)
    assert store.pending_ids(ImageRecord, ids) == []
    images = {path: number for path, number in looks.items() if path.endswith(".png")}
    assert len(images) == len(ids)
    assert set(images.values()) == {1}


def test_records_of_a_stage_share_the_names_of_their_fields(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "run", methods={"none": "No mitigation"})
    first, *others = read_records(next(run.glob("*__none__*")), ImageRecord).values()
    assert all(record.model_fields_set is first.model_fields_set for record in others)
    changed = first.model_copy(update={"failed": "made up"})
    assert "failed" in changed.model_fields_set
    assert "failed" not in first.model_fields_set
