"""The logged content of a cell, and the choice of cells."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fake_results import change_file, write_fake_results
from nemo_bench.config import LoggerSettings
from nemo_bench.errors import StoreError
from nemo_bench.records.results import load_cell, load_results
from nemo_bench.records.schema import Aggregate, MetricInfo, Paired, Preset, Roc, Statistic, Summary
from nemo_bench.tracking import logged, track
from nemo_bench.tracking.logged import LoggedCell, logged_cells


@pytest.fixture
def default(tmp_path: Path) -> Path:
    """A made-up run of three methods."""
    return write_fake_results(tmp_path / "default")


def nemo_of(run: Path) -> LoggedCell:
    (cell,) = (cell for cell in logged_cells(load_results(run)) if cell.results.method == "nemo")
    return cell


def with_summary(cell: LoggedCell, summary: Summary) -> LoggedCell:
    return replace(cell, results=replace(cell.results, summary=summary))


def test_a_cell_is_read_with_the_one_without_mitigation_and_no_other(
    default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = nemo_of(default)
    loaded: list[Path] = []
    monkeypatch.setattr(logged, "load_cell", lambda folder: loaded.append(folder) or load_cell(folder))
    cell = LoggedCell.read(expected.folder)
    assert cell.unmitigated is not None
    assert expected.unmitigated is not None
    assert loaded == [expected.folder, expected.unmitigated.folder]
    assert (cell.row, cell.digest, cell.begun) == (expected.row, expected.digest, expected.begun)


def test_a_cell_is_read_alone_where_the_one_without_mitigation_is_not_finished(default: Path) -> None:
    (plain,) = default.glob("*__none__*")
    (plain / "score.done").unlink()
    assert LoggedCell.read(nemo_of(default).folder).unmitigated is None


def test_the_row_takes_every_number_of_the_summary(default: Path) -> None:
    change = Paired(difference=-0.2, low=-0.3, high=-0.1, p=0.01, prompts=9)
    mean = Aggregate(mean=0.5, low=0.4, high=0.6, median=0.5, prompts=9, paired=change)
    statistic = Statistic(value=0.5, low=math.nan, spread=0.1, prompts=9)
    numbers = {
        "auc": 0.9, "auc_low": 0.8, "auc_high": 1.0, "average_precision": 0.9, "tpr_at_1_fpr_below": 0.5,
        "tpr_at_1_fpr_nearest": 0.6, "tpr_at_1_fpr_first": 0.4, "best_accuracy": 0.8, "memorized": 2, "other": 1,
        "failed": 0,
    }  # fmt: skip
    cell = nemo_of(default)
    summary = Summary(
        metrics=cell.results.summary.metrics,
        aggregates={"VM": {"ssim": mean}},
        presets={"nemo": Preset(title="NeMo", definition="", citation="", rows={"VM": {"ssim": statistic}})},
        detection={"memorization": Roc(title="Score", **numbers)},
        counts={"images": 6, "dead_references": 0},
        cost={"row_passes_per_image": 40.0},
    )
    cell = with_summary(cell, summary)
    # The numbers that sweeps minimize are computed from the records, see test_sweeps.py.
    bounded = {f"bounded/{metric}/mean": cell.bounded[metric]["mean"] for metric in ("ssim", "memorization")}
    assert cell.row == {
        "VM/ssim/mean": 0.5, "VM/ssim/low": 0.4, "VM/ssim/high": 0.6, "VM/ssim/median": 0.5, "VM/ssim/prompts": 9,
        "VM/ssim/paired/difference": -0.2, "VM/ssim/paired/low": -0.3, "VM/ssim/paired/high": -0.1,
        "VM/ssim/paired/p": 0.01, "VM/ssim/paired/prompts": 9,
        "presets/nemo/VM/ssim/value": 0.5, "presets/nemo/VM/ssim/spread": 0.1, "presets/nemo/VM/ssim/prompts": 9,
        **{f"detection/memorization/{key}": value for key, value in numbers.items()},
        "counts/images": 6, "counts/dead_references": 0, "cost/row_passes_per_image": 40.0, **bounded,
    }  # fmt: skip
    assert cell.means == {"VM/ssim/mean": 0.5, **bounded}


def test_families_decide_the_trade_off(default: Path) -> None:
    cell = nemo_of(default)

    def axes(**families: str) -> tuple[str, str] | None:
        return with_summary(
            cell, Summary(counts={}, metrics={k: MetricInfo(title=k, family=f) for k, f in families.items()})
        ).tradeoff

    assert axes(fid="quality", sscd="memorization", ssim="memorization", clip="alignment") == ("sscd", "clip")
    assert axes(sscd="memorization", fid="quality") is None


def test_time_is_no_result_and_a_score_is_one(default: Path) -> None:
    cell = nemo_of(default)
    file = cell.folder / "metrics.json"
    change_file(file, Summary, cost={"generate_seconds_per_image": 99.0})
    assert nemo_of(default).digest == cell.digest
    aggregates = cell.results.summary.aggregates
    changed = aggregates["VM"]["ssim"].model_copy(update={"mean": aggregates["VM"]["ssim"].mean + 0.25})
    change_file(file, Summary, aggregates={**aggregates, "VM": {**aggregates["VM"], "ssim": changed}})
    assert nemo_of(default).digest != cell.digest


def test_pictures_that_are_gone_are_left_out(default: Path) -> None:
    cell = nemo_of(default)
    prompt = cell.results.prompts[0]
    assert list(cell.pictures(prompt)) == ["training image", "unmitigated", "mitigated", "noise differences"]
    (cell.folder / "noise" / "vm-01.png").unlink()
    assert list(cell.pictures(prompt)) == ["training image", "unmitigated", "mitigated"]


def test_unfinished_cells_are_named_and_the_others_logged(default: Path, said: list[str]) -> None:
    (none,) = default.glob("*__none__*")
    (none / "score.done").unlink()
    results = load_results(default)
    track(results, LoggerSettings(csv=True))
    assert said[0] == f"not tracked, score not finished: {none.name}"
    assert {path.parent.name for path in default.glob("*/csv")} == {cell.name for cell in results.cells}
    with pytest.raises(StoreError, match=r"no finished cell to track.*score not finished"):
        track(results, LoggerSettings(csv=True), cells=[none.name])


def test_one_cell_can_be_logged(default: Path) -> None:
    (nemo,) = default.glob("*__nemo__*")
    track(load_results(default), LoggerSettings(csv=True), cells=[nemo.name])
    assert [path.parent for path in default.glob("*/csv")] == [nemo]


def test_no_logger_does_nothing(default: Path) -> None:
    track(load_results(default), LoggerSettings(), cells=["no such cell"])
    assert not list(default.glob("*/csv"))
