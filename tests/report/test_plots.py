"""The figures of a report."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
from matplotlib.figure import Figure

from fake_results import DETECTOR, change_file, write_fake_calibration, write_fake_results
from nemo_bench.errors import StoreError
from nemo_bench.records.io import read_file
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Failures, Run, Spec, Summary, Threshold
from nemo_bench.records.store import read_run
from nemo_bench.report import write_report
from nemo_bench.report.plots import _label, plots
from tags import Tags


def test_figures_follow_the_page_and_stand_alone(run: Path) -> None:
    results = load_results(run)
    figures = plots(results)
    assert [figure.name for figure in figures] == [
        f"{name}-{model}"
        for name in (
            "tradeoff-0", "tradeoff-1", "tradeoff-2", "distribution-ssim", "distribution-alignment",
            "distribution-diversity", "counts", "layers", "roc",
        )
        for model in range(2)
    ]  # fmt: skip
    for figure in figures:
        ET.fromstring(figure.svg)
        assert "currentColor" in figure.svg
        assert "var(--blue)" in figure.svg or figure.section == "detection"
        assert not re.search(r"#[0-9a-f]{6}\b|<metadata|<style", figure.svg)
    for figure in figures[:6]:
        assert re.findall(r">(No mitigation|Random neurons|NeMo)</text>", figure.svg)
    assert "down.0.0" in next(figure.svg for figure in figures if figure.name == "layers-0")
    auc = results.cells[0].summary.detection[DETECTOR].auc
    assert f"Noise similarity: AUC {auc:.3f}" in next(figure.svg for figure in figures if figure.name == "roc-0")


def test_labels_of_points_that_coincide_can_be_read() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.add_subplot()
    points = [(f"a method of number {i}", 0.5, 0.5 + i / 500) for i in range(5)]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.plot([0.5], [0.5], "o")
    _label(figure, axes, points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_prompts_memorized_in_an_unknown_way_are_in_the_figures(tmp_path: Path) -> None:
    prompts = [(f"p-{i}", f"prompt {i}", "memorized" if i < 4 else None) for i in range(6)]
    results = load_results(write_fake_results(tmp_path / "default", prompts=prompts))
    assert results.own_groups == ["memorized", "general"]
    figures = {figure.name: figure.svg for figure in plots(results)}
    assert {"tradeoff-0-0", "distribution-ssim-0", "counts-0"} <= set(figures)
    assert ">memorized</text>" in figures["distribution-ssim-0"]


def test_the_caption_of_a_trade_off_names_the_methods_that_no_other_betters(run: Path) -> None:
    results = load_results(run)
    figures = plots(results)
    for number, model in enumerate(results.models):
        figure = next(figure for figure in figures if figure.name == f"tradeoff-0-{number}")
        points = {
            cell.short: tuple(fmean(cell.prompt_means(key, ["VM", "TM"]).values()) for key in ("ssim", "alignment"))
            for cell in results.cells
            if cell.model == model
        }
        best = {
            name
            for name, (x, y) in points.items()
            if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points.values())
        }
        named = re.search(r"Pareto front: ([^.]*)\.", figure.caption)
        assert named
        assert set(named[1].split("; ")) == best


def test_the_threshold_is_shown_once_a_model_with_both_distributions(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default", ["planted", "sd14"])
    folders = [write_fake_calibration(run, model, pairs) for model, pairs in (("planted", 200), ("sd14", 9))]
    figures = [figure for figure in plots(load_results(run)) if figure.name.startswith("calibration")]
    assert [figure.title for figure in figures] == ["Threshold: planted", "Threshold: sd14"]
    for figure, folder in zip(figures, folders, strict=True):
        ET.fromstring(figure.svg)
        threshold = read_file(folder / "threshold.json", Threshold).threshold
        assert f">threshold {threshold:.3f}</text>" in figure.svg
        assert ">VM</text>" in figure.svg
        assert ">TM</text>" in figure.svg
        assert not re.search(r"#[0-9a-f]{6}\b|<metadata|<style", figure.svg)
    assert figures[0].svg != figures[1].svg
    assert Tags(write_report(load_results(run)).read_text()).text.count("Threshold: ") == 2


def test_the_threshold_is_shown_alone_where_nothing_without_mitigation_was_run(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    write_fake_calibration(run)
    change_file(run / "run.json", Run, cells=read_run(run).cells[1:])
    (figure,) = (figure for figure in plots(load_results(run)) if figure.name.startswith("calibration"))
    assert ">VM</text>" not in figure.svg
    assert "Dots" not in figure.caption


def test_scores_of_another_number_of_seeds_are_not_held_against_the_threshold(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    write_fake_calibration(run)
    (path,) = run.glob("*__none__*/spec.json")
    change_file(path, Spec, settings={**read_file(path, Spec).settings, "localize_seeds": 3})
    (figure,) = (figure for figure in plots(load_results(run)) if figure.name.startswith("calibration"))
    assert ">VM</text>" not in figure.svg


def test_scores_of_another_protocol_are_not_held_against_the_threshold(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    write_fake_calibration(run, protocol="reference")
    (figure,) = (figure for figure in plots(load_results(run)) if figure.name.startswith("calibration"))
    assert figure.title == "Threshold: planted, reference protocol"
    assert ">VM</text>" not in figure.svg


def test_a_run_copied_without_its_calibration_has_a_report_without_that_plot(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    folder = write_fake_calibration(run)
    assert load_results(run).cells[2].calibration == folder
    copy = shutil.copytree(run, tmp_path / "elsewhere" / "results" / "default")
    assert load_results(copy).cells[2].calibration is None
    assert "Threshold: " not in Tags(write_report(load_results(copy)).read_text()).text


def test_a_calibration_that_does_not_hold_what_it_should_is_named(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    folder = write_fake_calibration(run)
    (folder / "threshold.json").write_text("{}")
    with pytest.raises(StoreError, match=r"threshold\.json does not hold what it should") as error:
        write_report(load_results(run))
    assert folder.name in str(error.value)


def test_the_front_of_a_trade_off_leaves_out_what_failed(default: Path) -> None:
    def front() -> str:
        return next(plot.caption for plot in plots(load_results(default)) if plot.section == "tradeoffs")

    assert "Pareto front: " in front()
    assert "NeMo" in front()
    lost = Failures(images=4, metrics={"ssim": 4})
    change_file(next(default.glob("*__nemo__*/metrics.json")), Summary, failed={"VM": lost, "all": lost})
    assert "NeMo" not in front().partition(". ")[0]
    assert "since images or scores failed: NeMo." in front()


def test_numbers_of_others_that_are_not_finite_do_not_break_the_figures(default: Path) -> None:
    (path,) = default.glob("*__nemo__*/records/score.0.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["scores"] = dict.fromkeys(line["scores"], (float("nan"), float("inf"))[number % 2])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report(load_results(default)).is_file()
