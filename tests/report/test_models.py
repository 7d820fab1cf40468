"""Models side by side: shares above their own thresholds, and operations of an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_results import change_file, write_fake_calibration, write_fake_results
from nemo_bench.records.io import read_file
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Summary, Threshold
from nemo_bench.report import write_report
from nemo_bench.report.models import model_rows
from nemo_bench.report.selection import COST, info_of, measured
from tags import Tags


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two models, of which one has a threshold; an image of the other costs ten times as much."""
    run = write_fake_results(tmp_path / "two", ["planted", "sd14"])
    write_fake_calibration(run, "sd14")
    for path in run.glob("*/metrics.json"):
        each = 4.0 if path.parent.name.startswith("sd14") else 0.4
        change_file(path, Summary, cost={**read_file(path, Summary).cost, "teraflops_per_image": each})
    return run


def test_prompts_are_held_against_the_own_threshold(run: Path) -> None:
    results = load_results(run)
    rows = {(row.cell.model, row.group): row for row in model_rows(results)}
    assert {model for model, _ in rows} == {"planted", "sd14"}
    assert {cell.method for cell in (row.cell for row in rows.values())} == {"none"}
    tau = read_file(next(run.parent.glob("calibration/*/threshold.json")), Threshold).threshold
    memorized = rows["sd14", "VM"]
    assert memorized.threshold == tau
    assert (memorized.above, len(memorized.scores)) == (2, 2)
    assert (rows["sd14", "general"].above, len(rows["sd14", "general"].scores)) == (0, 2)
    assert rows["planted", "VM"].threshold is None
    page = Tags(write_report(results).read_text()).text
    assert "100%2 of 2" in page.replace(" ", "").replace("2of2", "2 of 2")
    assert "Each model against its own threshold" in page


def test_a_threshold_measured_otherwise_is_not_taken(run: Path) -> None:
    change_file(next(run.parent.glob("calibration/*/threshold.json")), Threshold, similarity="published")
    assert {row.threshold for row in model_rows(load_results(run))} == {None}


def test_costs_of_several_models_are_operations(run: Path, tmp_path: Path) -> None:
    results = load_results(run)
    assert info_of(results, COST).title == "TFLOPs per prompt"
    costs = {cell.model: measured(results, cell, COST) for cell in results.cells}
    assert costs == {"planted": [pytest.approx(1.2)], "sd14": [pytest.approx(12.0)]}
    alone = load_results(write_fake_results(tmp_path / "one"))
    assert info_of(alone, COST).title == COST
    assert model_rows(alone) == []
