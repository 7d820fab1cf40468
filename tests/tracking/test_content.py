"""What is told of a cell, and of which cells."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import StoreError
from nemo_bench.records.io import read_json, write_json
from nemo_bench.tracking import track
from nemo_bench.tracking.content import Entry, load_entries


def nemo_of(run: Path) -> Entry:
    (entry,) = (e for e in load_entries(run)[0] if e.cell.method == "nemo")
    return entry


def test_the_row_takes_every_number_of_the_contract(run: Path) -> None:
    detection = {
        "auc": 0.9, "auc_low": 0.8, "auc_high": 1.0, "average_precision": 0.9, "tpr_at_1_fpr_below": 0.5,
        "tpr_at_1_fpr_nearest": 0.6, "best_accuracy": 0.8, "memorized": 2, "other": 1,
    }  # fmt: skip
    numbers = {"mean": 0.5, "low": 0.4, "high": 0.6, "median": 0.5, "mad": None, "prompts": 9}
    paired = {"difference": -0.2, "low": -0.3, "high": -0.1, "p": 0.01, "prompts": 9}
    preset = {"value": 0.5, "low": math.nan, "high": None, "spread": 0.1, "prompts": 9}
    metrics = {
        "aggregates": {"VM": {"ssim": {**numbers, "paired": paired}}},
        "presets": {"nemo": {"title": "NeMo", "definition": "", "citation": "", "rows": {"VM": {"ssim": preset}}}},
        "detection": {"memorization": {"title": "Score", **detection}},
        "counts": {"images": 6, "dead_references": 0},
        "cost": {"peak_memory_mb": None, "row_passes_per_image": 40.0},
    }
    entry = replace(nemo_of(run), metrics=metrics)
    # What sweeps minimize is computed of the records, see test_sweeps.py.
    bounded = {f"bounded/{metric}/mean": entry.bounded[metric]["mean"] for metric in ("ssim", "memorization")}
    assert entry.row == {
        "VM/ssim/mean": 0.5, "VM/ssim/low": 0.4, "VM/ssim/high": 0.6, "VM/ssim/median": 0.5, "VM/ssim/prompts": 9,
        "VM/ssim/paired/difference": -0.2, "VM/ssim/paired/low": -0.3, "VM/ssim/paired/high": -0.1,
        "VM/ssim/paired/p": 0.01, "VM/ssim/paired/prompts": 9,
        "presets/nemo/VM/ssim/value": 0.5, "presets/nemo/VM/ssim/spread": 0.1, "presets/nemo/VM/ssim/prompts": 9,
        **{f"detection/memorization/{key}": value for key, value in detection.items()},
        "counts/images": 6, "counts/dead_references": 0, "cost/row_passes_per_image": 40.0, **bounded,
    }  # fmt: skip
    assert entry.means == {"VM/ssim/mean": 0.5, **bounded}


def test_families_decide_what_is_traded_off(run: Path) -> None:
    entry = nemo_of(run)

    def axes(**families: str) -> tuple[str, str] | None:
        return replace(entry, metrics={"metrics": {k: {"family": f} for k, f in families.items()}}).tradeoff

    assert axes(fid="quality", sscd="memorization", ssim="memorization", clip="alignment") == ("sscd", "clip")
    assert axes(sscd="memorization", fid="quality") is None


def test_time_is_no_result_and_a_score_is_one(run: Path) -> None:
    (cell,) = run.glob("*__nemo__*")
    before, metrics = nemo_of(run).digest, read_json(cell / "metrics.json")
    write_json(cell / "metrics.json", {**metrics, "cost": {"generate_seconds_per_image": 99.0}})
    assert nemo_of(run).digest == before
    metrics["aggregates"]["VM"]["ssim"]["mean"] += 0.25
    write_json(cell / "metrics.json", metrics)
    assert nemo_of(run).digest != before


def test_pictures_that_are_gone_are_left_out(run: Path) -> None:
    entry = nemo_of(run)
    prompt = entry.cell.prompts[0]
    assert list(entry.pictures(prompt)) == ["training image", "unmitigated", "mitigated", "noise differences"]
    (entry.folder / "noise" / "vm-01.png").unlink()
    assert list(entry.pictures(prompt)) == ["training image", "unmitigated", "mitigated"]


def test_unfinished_cells_are_named_and_others_told(run: Path) -> None:
    said: list[str] = []
    (none,), (nemo,) = run.glob("*__none__*"), run.glob("*__nemo__*")
    (none / "score.done").unlink()
    track(run, LoggerSettings(csv=True), say=said.append)
    assert said[0] == f"not tracked, score not finished: {none.name}"
    assert [path.parent for path in run.glob("*/csv")] == [nemo]
    with pytest.raises(StoreError, match=r"no finished cell to track.*score not finished"):
        track(none, LoggerSettings(csv=True))


def test_one_cell_can_be_told(run: Path) -> None:
    (nemo,) = run.glob("*__nemo__*")
    track(nemo, LoggerSettings(csv=True))
    assert [path.parent for path in run.glob("*/csv")] == [nemo]


def test_no_logger_does_nothing_and_no_run_is_an_error(run: Path, tmp_path: Path) -> None:
    track(tmp_path / "nowhere", LoggerSettings())
    with pytest.raises(StoreError, match="holds no run"):
        track(tmp_path, LoggerSettings(csv=True))
