"""The files of a report."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from fake_results import METHODS, METRICS, PROMPTS, SEEDS, write_fake_calibration, write_fake_results
from nemo_bench.errors import StoreError
from nemo_bench.report import html, leaderboard, load_results, terminal_table, write_report
from nemo_bench.report.plots import plots
from nemo_bench.report.tables import markdown

ATTACK = '<script>alert(1)</script> & "quotes" {{ 7 * 7 }}'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_results(tmp_path_factory.mktemp("results") / "two", ["planted", "sd14"])


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).html.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """All tags of a page, and the text outside of style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._raw else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_leaderboards_hold_the_numbers_of_the_cells(run: Path, page: str) -> None:
    wide = {(row["cell"], row["group"]): row for row in csv.DictReader((run / "leaderboard.csv").open())}
    content = json.loads((run / "leaderboard.json").read_text())
    rows = {(row["cell"], row["group"]): row for row in content["rows"]}
    assert len(wide) == len(rows) == 2 * 3 * 4
    assert content["metrics"]["ssim"]["higher_is_better"] is False
    for cell in json.loads((run / "run.json").read_text())["cells"]:
        metrics = json.loads((run / cell / "metrics.json").read_text())
        for group, scores in metrics["aggregates"].items():
            assert rows[cell, group]["metrics"] == scores
            assert rows[cell, group]["cost"] == metrics["cost"]
            for metric in METRICS:
                for name in ("mean", "low", "high", "median", "mad", "prompts"):
                    text = wide[cell, group][f"{metric}_{name}"]
                    assert (float(text) if text else None) == scores.get(metric, {}).get(name)


def test_the_page_shows_the_numbers_of_the_cells(run: Path, page: str) -> None:
    text = Tags(page).text
    for cell in load_results(run).cells:
        for group in ("VM", "all"):
            value = cell.aggregates[group]["ssim"]
            assert f"{value.mean:.3f}" in text
            assert f"{value.low:.3f} to {value.high:.3f}" in text
            assert f"median {value.median:.3f} ± {value.mad:.3f}" in text
        for prompt in cell.prompts:
            assert f"{cell.outcomes[prompt.id].scores['memorization']:.3f}" in text


def test_best_is_marked_within_a_model_and_only_where_a_direction_exists(run: Path) -> None:
    rows = leaderboard(load_results(run))
    for model in ("planted", "sd14"):
        group = [row for row in rows if row.cell.model == model and row.group == "VM"]
        for metric, info in METRICS.items():
            means = [row.values[metric].mean for row in group]
            marked = [row.values[metric].mean for row in group if metric in row.best]
            wanted = {True: max, False: min}.get(info["higher_is_better"])
            assert marked == ([wanted(means)] if wanted else [])


def test_markdown_has_a_table_for_each_group(run: Path) -> None:
    results = load_results(run)
    text = markdown(results)
    assert re.findall(r"^## (\w+)", text, re.MULTILINE) == ["VM", "TM", "general", "all"]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {len(METRICS) + 3}
    value = results.cells[2].aggregates["VM"]["ssim"]
    assert f"**{value.mean:.3f}** [{value.low:.3f}, {value.high:.3f}]" in text
    assert "| No mitigation · sd14 | – | – |" in text


def test_the_terminal_table_keeps_every_number_in_80_columns(tmp_path: Path) -> None:
    results = load_results(write_fake_results(tmp_path / "default"))
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(terminal_table(results))
    text = buffer.getvalue()
    for row in leaderboard(results):
        assert f"{row.cell.aggregates[row.group]['alignment'].mean:.3f}" in text
    assert "…" not in text


def test_the_same_records_give_the_same_bytes(run: Path, page: str) -> None:
    files = sorted(path for path in run.iterdir() if path.is_file() and path.name != "run.json")
    assert [path.name for path in files] == ["leaderboard.csv", "leaderboard.json", "leaderboard.md", "report.html"]
    before = [path.read_bytes() for path in files]
    write_report(run)
    assert [path.read_bytes() for path in files] == before


def test_a_report_cut_off_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_fake_results(tmp_path / "default")
    (run / "report.html").write_text("former")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_text() == "former"
    assert not [path for path in run.iterdir() if path.suffix == ".tmp"]


def test_texts_of_the_run_are_escaped(tmp_path: Path) -> None:
    prompts = [("vm-01", ATTACK, "VM"), *PROMPTS[1:]]
    run = write_fake_results(tmp_path / "<b>x", prompts=prompts)
    page = write_report(run).html.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<b>x" not in page
    tags = Tags(page)
    assert ATTACK in tags.text
    assert len(tags.all("script")) == 1
    assert f"vm-01 {ATTACK}" in [card["data-text"] for card in tags.all("article")]


def test_nothing_is_fetched(page: str) -> None:
    tags = Tags(page)
    targets = [a[key] for _, a in tags.tags for key in ("src", "href", "srcset", "data", "action") if key in a]
    assert targets
    assert all(target and target.startswith(("data:image/", "#")) for target in targets)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    policy = next(meta["content"] for meta in tags.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_ids_are_unique_and_every_anchor_leads_somewhere(page: str) -> None:
    tags = Tags(page)
    ids = Counter(attributes["id"] for _, attributes in tags.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    targets = {a["href"] for _, a in tags.tags if "href" in a} | set(re.findall(r"url\((#[^)]+)\)", page))
    assert {target[1:] for target in targets if target} <= set(ids)


def test_images_are_small_and_embedded_once(page: str) -> None:
    images = Tags(page).all("img")
    memorized = sum(kind is not None for _, _, kind in PROMPTS)
    strips = len(PROMPTS) * len(METHODS) * 2
    assert len(images) == memorized + strips * (SEEDS + 1)
    assert page.count("data:image/") == len(images)
    for image in images:
        source = image["src"]
        assert source
        assert image["loading"] == "lazy"
        assert image["alt"]
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert picture.size == (int(image["width"] or 0), int(image["height"] or 0))
        assert picture.height <= html.SIDE


def test_a_large_image_is_made_smaller_and_a_tiny_one_kept_as_it_is(tmp_path: Path) -> None:
    Image.effect_noise((512, 256), 40).save(tmp_path / "large.png")
    tiny = Image.effect_noise((32, 32), 40).convert("RGB")
    tiny.save(tmp_path / "tiny.png")
    large, kept = html.thumbnail(tmp_path / "large.png"), html.thumbnail(tmp_path / "tiny.png")
    assert large
    assert (large.width, large.height, large.tiny) == (96, 48, False)
    assert kept
    assert kept.tiny
    back = Image.open(io.BytesIO(base64.b64decode(kept.uri.partition(",")[2])))
    assert back.convert("RGB").tobytes() == tiny.tobytes()


def test_an_image_that_is_gone_leaves_a_named_gap(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    cell = json.loads((run / "run.json").read_text())["cells"][2]
    (run / cell / "images" / "vm-01_01.png").unlink()
    (run / "references" / "vm-02.png").write_text("no image")
    gaps = [a["aria-label"] for a in Tags(write_report(run).html.read_text()).all("span") if a.get("class") == "gap"]
    assert len(gaps) == 2
    assert "Training image of vm-02 (no image on disk)" in gaps
    assert any(gap and gap.startswith("NeMo, seed 1") for gap in gaps)


def test_a_large_run_shows_fewer_seeds_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = load_results(write_fake_results(tmp_path / "default"))
    monkeypatch.setattr(html, "IMAGES", 2 * len(PROMPTS) * len(METHODS))
    page = html.page(results)
    assert page.count("first 2 of 3 seeds") == len(PROMPTS)
    assert "NeMo, seed 1" in page
    assert "NeMo, seed 2" not in page


def test_the_page_says_how_to_reproduce(page: str) -> None:
    text = Tags(page).text
    for words in ("nemo-bench run prompts=planted", "torch 2.15.0", "5f3a9be1c0d24786", '"theta_min": 0.12', "@inproc"):
        assert words in text


def test_unfinished_cells_are_listed(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    cell = json.loads((run / "run.json").read_text())["cells"][1]
    (run / cell / "score.done").unlink()
    files = write_report(run)
    assert f"{cell}: score not finished" in Tags(files.html.read_text()).text
    assert f"- {cell}: score not finished" in files.markdown.read_text()
    assert json.loads(files.json.read_text())["unfinished"] == {cell: "score not finished"}


def test_figures_follow_the_page_and_stand_alone(run: Path) -> None:
    figures = plots(load_results(run))
    assert [figure.name for figure in figures] == ["tradeoff", "distribution", "layers-0", "layers-3"]
    for figure in figures:
        ET.fromstring(figure.svg)
        assert "currentColor" in figure.svg
        assert "var(--blue)" in figure.svg
        assert not re.search(r"#[0-9a-f]{6}\b|<metadata|<style", figure.svg)
    for cell in load_results(run).cells:
        assert f">{cell.label}</text>" in figures[0].svg
    assert "down.0.0" in figures[2].svg


def test_prompts_that_are_not_memorized_have_a_report_without_those_plots(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "general", prompts=[p for p in PROMPTS if p[2] is None])
    assert plots(load_results(run)) == []
    page = write_report(run).html.read_text()
    assert "figure" not in {tag for tag, _ in Tags(page).tags}
    assert "#plots" not in page


def test_the_threshold_is_shown_once_a_model_with_both_distributions(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default", ["planted", "sd14"])
    folders = [write_fake_calibration(run, model, pairs) for model, pairs in (("planted", 200), ("sd14", 9))]
    figures = [figure for figure in plots(load_results(run)) if figure.name.startswith("calibration")]
    assert [figure.title for figure in figures] == ["Threshold: planted", "Threshold: sd14"]
    for figure, folder in zip(figures, folders, strict=True):
        ET.fromstring(figure.svg)
        threshold = json.loads((folder / "threshold.json").read_text())["threshold"]
        assert f">threshold {threshold:.3f}</text>" in figure.svg
        assert ">VM</text>" in figure.svg
        assert ">TM</text>" in figure.svg
        assert not re.search(r"#[0-9a-f]{6}\b|<metadata|<style", figure.svg)
    assert figures[0].svg != figures[1].svg
    assert Tags(write_report(run).html.read_text()).text.count("Threshold: ") == 2


def test_the_threshold_is_shown_alone_where_nothing_without_mitigation_was_run(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    write_fake_calibration(run)
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**content, "cells": content["cells"][1:]}))
    (figure,) = (figure for figure in plots(load_results(run)) if figure.name.startswith("calibration"))
    assert ">VM</text>" not in figure.svg
    assert "Dots" not in figure.caption


def test_scores_of_another_number_of_seeds_are_not_held_against_the_threshold(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    write_fake_calibration(run)
    (path,) = run.glob("*__none__*/spec.json")
    spec = json.loads(path.read_text())
    path.write_text(json.dumps({**spec, "settings": {**spec["settings"], "localize_seeds": 3}}))
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
    assert "Threshold: " not in Tags(write_report(copy).html.read_text()).text


def test_a_calibration_that_does_not_hold_what_it_should_is_named(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    folder = write_fake_calibration(run)
    (folder / "threshold.json").write_text("{}")
    with pytest.raises(StoreError, match="does not hold a calibration") as error:
        write_report(run)
    assert folder.name in str(error.value)
