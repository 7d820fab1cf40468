"""A method some of whose images failed is no best one because of it, and the report says what failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fake_results import write_fake_results
from nemo_bench.report import leaderboard, load_results, terminal_table, write_report
from nemo_bench.report.plots import plots


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_fake_results(tmp_path / "default")


def change(run: Path, method: str, **content: Any) -> None:
    """Gives metrics.json of a method other content."""
    (path,) = run.glob(f"*__{method}__*/metrics.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))


def best(run: Path) -> dict[str, set[str]]:
    return {r.cell.method: set(r.best) for r in leaderboard(load_results(run)) if r.group == "VM"}


def test_a_mean_that_lacks_values_is_neither_best_nor_starred(run: Path) -> None:
    assert "ssim" in best(run)["nemo"]
    assert any(r.stars("ssim") for r in leaderboard(load_results(run)) if (r.cell.method, r.group) == ("nemo", "VM"))
    lost = {"images": 4, "localizations": 0, "scores": 0, "metrics": {"ssim": 4}}
    change(run, "nemo", failed={"VM": lost, "all": lost})
    found = best(run)
    assert "ssim" not in found["nemo"]
    assert "ssim" in found["none"] | found["random"]  # the better one of those that lack nothing
    (row,) = (r for r in leaderboard(load_results(run)) if (r.cell.method, r.group) == ("nemo", "VM"))
    assert (row.stars("ssim"), row.failed) == ("", "4 images")
    assert row.corrected["ssim"] < 0.05  # the test itself is still told, with the prompts that it rests on


def test_the_front_of_a_trade_off_leaves_out_what_failed(run: Path) -> None:
    def front() -> str:
        return next(plot.caption for plot in plots(load_results(run)) if plot.section == "tradeoffs")

    assert "Pareto front: " in front()
    assert "NeMo" in front()
    lost = {"images": 4, "localizations": 0, "scores": 0, "metrics": {"ssim": 4}}
    change(run, "nemo", failed={"VM": lost, "all": lost})
    assert "NeMo" not in front().partition(". ")[0]
    assert "since images or scores failed: NeMo." in front()


def test_a_method_all_of_whose_images_failed_is_still_in_every_table(run: Path) -> None:
    groups = ("VM", "TM", "general", "all")
    lost = {"images": 6, "localizations": 2, "scores": 1, "metrics": {"ssim": 6}}
    change(run, "nemo", aggregates={g: {} for g in groups}, presets={}, failed=dict.fromkeys(groups, lost))
    files = write_report(run)
    for file in (files.html, files.markdown, files.latex):
        assert "6 images, 2 localizations, 1 score" in file.read_text(encoding="utf-8")
    table = terminal_table(load_results(run))
    assert any("failed: 6 images" in str(text) for text in table.columns[0].cells)


def test_numbers_of_others_that_are_not_finite_do_not_break_the_figures(run: Path) -> None:
    (path,) = run.glob("*__nemo__*/records/score.0.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["scores"] = dict.fromkeys(line["scores"], (float("nan"), float("inf"))[number % 2])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report(run).html.is_file()
