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
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser
from PIL import Image
from rich.console import Console

from fake_results import DETECTOR, METHODS, METRICS, PROMPTS, SEEDS, write_fake_calibration, write_fake_results
from nemo_bench.errors import StoreError
from nemo_bench.records.statistics import paired
from nemo_bench.records.store import thumbnail
from nemo_bench.report import Row, html, leaderboard, load_results, terminal_table, write_report
from nemo_bench.report.plots import front, plots
from nemo_bench.report.tables import holm, latex, markdown, tex
from nemo_bench.report.thumbnails import Thumbnails

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
            row, line = rows[cell, group], wide[cell, group]
            assert row["cost"] == metrics["cost"]
            assert row["counts"] == metrics["counts"]
            own = [p for p, _, kind in PROMPTS if group in ("all", kind or "general")]
            assert row["n_prompts"] == int(line["n_prompts"]) == len(own)
            assert list(row["metrics"]) == list(scores)
            for metric in METRICS:
                value = scores.get(metric, {})
                for name in ("mean", "low", "high", "median", "mad", "prompts"):
                    text = line[f"{metric}_{name}"]
                    assert (float(text) if text else None) == value.get(name)
                    assert row["metrics"].get(metric, {}).get(name) == value.get(name)
                for name in ("difference", "low", "high", "p", "prompts"):
                    text = line[f"{metric}_paired_{name}"]
                    assert (float(text) if text else None) == value.get("paired", {}).get(name)
                corrected = line[f"{metric}_paired_p_holm"]
                assert ("paired" in value) == bool(corrected)
                if corrected:
                    assert float(corrected) == row["metrics"][metric]["paired"]["p_holm"] >= value["paired"]["p"]


def test_no_two_columns_of_the_csv_share_a_name(run: Path, page: str) -> None:
    names = next(csv.reader((run / "leaderboard.csv").open()))
    assert len(set(names)) == len(names)


def test_the_page_shows_the_numbers_of_the_cells(run: Path, page: str) -> None:
    text = Tags(page).text
    for cell in load_results(run).cells:
        for group in ("VM", "all"):
            value = cell.aggregates[group]["ssim"]
            assert f"{value.mean:.3f}" in text
            assert f"{value.low:.3f} to {value.high:.3f}" in text
            assert f"{cell.aggregates[group]['fid'].mean:.1f}" in text
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


def test_best_is_clear_only_where_prompts_tell_it_from_the_runner_up(tmp_path: Path) -> None:
    few = load_results(write_fake_results(tmp_path / "few"))
    # Two prompts have four patterns of signs: no p below a half.
    assert min(p for row in leaderboard(few) if row.group == "VM" for p in row.best.values()) >= 0.5
    assert not any(row.is_clear(key) for row in leaderboard(few) for key in METRICS)
    prompts = [(f"vm-{i:02d}", f"prompt {i}", "VM") for i in range(12)]
    many = load_results(write_fake_results(tmp_path / "many", prompts=prompts))
    rows = {row.cell.method: row for row in leaderboard(many) if row.group == "VM"}
    # NeMo copies nothing, and the other two copy alike: one is the best in alignment by chance.
    assert rows["nemo"].is_clear("ssim")
    for metric in ("ssim", "diversity"):
        row, second, _ = sorted(rows.values(), key=lambda row: row.values[metric].mean * (-1) ** (metric != "ssim"))
        own, its = (np.array(list(r.cell.prompt_means(metric, ["VM"]).values())) for r in (row, second))
        assert row.best[metric] == paired(own - its)["p"]
    assert not any(row.is_clear("fid") for row in rows.values())
    page = Tags(html.page(many, leaderboard(many)))
    marks = {cell["data-key"]: cell["class"] for cell in page.all("td") if cell.get("class") in ("best", "unclear")}
    assert (marks["ssim"], marks["fid"]) == ("best", "unclear")
    text = markdown(many, leaderboard(many))
    assert f"| **{rows['nemo'].values['ssim'].mean:.3f}**" in text
    (best,) = (row for row in rows.values() if "fid" in row.best)
    assert f"| *{best.values['fid'].mean:.1f}* |" in text


def test_one_method_is_best_of_nothing(tmp_path: Path) -> None:
    results = load_results(write_fake_results(tmp_path / "one", methods={"none": "No mitigation"}))
    rows = leaderboard(results)
    assert not any(row.best for row in rows)
    assert "best" not in markdown(results, rows)
    page = Tags(html.page(results, rows))
    assert "“Best" not in page.text
    assert not [cell for cell in page.all("td") if cell.get("class") in ("best", "unclear")]


def test_counts_have_no_needless_decimals(tmp_path: Path) -> None:
    results = load_results(write_fake_results(tmp_path / "default"))
    rows = leaderboard(results)
    assert results.counted == {"neurons"}
    text = markdown(results, rows)
    for row in rows:
        if row.group != "all":
            mean = row.values["neurons"].mean
            shown = f"{mean:.0f}" if mean == int(mean) else f"{mean:.1f}"
            assert re.search(rf"\| {shown}(\\\*)* \[", text)
    assert "| 0 [0, 0] |" in text


def test_a_value_of_fewer_prompts_than_its_group_says_so(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    path = next(run.glob("*__nemo__*/metrics.json"))
    content = json.loads(path.read_text())
    content["aggregates"]["VM"]["ssim"]["prompts"] = 1
    path.write_text(json.dumps(content))
    results = load_results(run)
    rows = leaderboard(results)
    assert markdown(results, rows).count("], 1 prompt |") == 1
    assert latex(results, rows).count(r"],\,\mathrm{1~prompt}}") == 1
    assert Tags(html.page(results, rows)).text.count(", 1 prompt") == 1


def test_markdown_has_a_table_for_each_group(run: Path) -> None:
    results = load_results(run)
    text = markdown(results, leaderboard(results))
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "VM, 2 prompts (verbatim)", "TM, 2 prompts (template)", "general, 2 prompts (not memorized)"
    ]  # fmt: skip
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {len(METRICS) + 3}
    value = results.cells[2].aggregates["VM"]["ssim"]
    (row,) = (row for row in leaderboard(results) if row.cell == results.cells[2] and row.group == "VM")
    stars = r"\*" * len(row.stars("ssim"))
    assert stars
    assert f"*{value.mean:.3f}*{stars} [{value.low:.3f}, {value.high:.3f}]" in text
    assert "| No mitigation · sd14 | – | – |" in text


def test_the_terminal_table_keeps_every_number_in_80_columns(tmp_path: Path) -> None:
    results = load_results(write_fake_results(tmp_path / "default"))
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(terminal_table(results))
    text = buffer.getvalue()
    for row in (row for row in leaderboard(results) if row.group != "all"):
        assert f"{row.cell.aggregates[row.group]['alignment'].mean:.3f}" in text
        assert f"{row.cell.aggregates[row.group]['fid'].mean:.1f}" in text
    assert "2 more metrics in leaderboard.md" in text
    assert "…" not in text


def test_the_same_records_give_the_same_bytes(run: Path, page: str) -> None:
    files = sorted(path for path in run.iterdir() if path.is_file() and path.name != "run.json")
    assert [path.name for path in files] == [
        "leaderboard.csv",
        "leaderboard.json",
        "leaderboard.md",
        "leaderboard.tex",
        "report.html",
    ]
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
    beside = {f"leaderboard.{ending}" for ending in ("csv", "json", "tex", "md")}
    assert all(target and (target in beside or target.startswith(("data:image/", "#"))) for target in targets)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    policy = next(meta["content"] for meta in tags.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")


def test_ids_are_unique_and_every_anchor_leads_somewhere(page: str) -> None:
    tags = Tags(page)
    ids = Counter(attributes["id"] for _, attributes in tags.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    links = {a["href"] for _, a in tags.tags if "href" in a and "download" not in a}
    targets = {target[1:] for target in links | set(re.findall(r"url\((#[^)]+)\)", page)) if target}
    prompts = {f"prompt={a['data-address']}" for _, a in tags.tags if "data-address" in a}
    assert targets <= {*ids, *prompts}
    assert prompts <= targets


def test_images_are_small_and_embedded_once(page: str) -> None:
    images = Tags(page).all("img")
    memorized = sum(kind is not None for _, _, kind in PROMPTS)
    strips = len(PROMPTS) * len(METHODS) * 2
    examples = 2 * memorized * len(("training image", "no mitigation", "mitigation"))
    assert len(images) == memorized + strips * (SEEDS + 1) + examples
    assert page.count("data:image/") == len(images)
    for image in images:
        source = image["src"]
        assert source
        assert image["loading"] == "lazy"
        assert image["alt"]
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert picture.size == (int(image["width"] or 0), int(image["height"] or 0))
        assert picture.height <= html.SIZES[0].side


def test_a_large_image_is_made_smaller_and_a_tiny_one_kept_as_it_is(tmp_path: Path) -> None:
    Image.effect_noise((512, 256), 40).save(tmp_path / "large.png")
    tiny = Image.effect_noise((32, 32), 40).convert("RGB")
    tiny.save(tmp_path / "tiny.png")
    make = Thumbnails(tmp_path)
    large, kept = (make(tmp_path / f"{name}.png", (96, 96)) for name in ("large", "tiny"))
    assert large
    assert (large.width, large.height, large.tiny) == (96, 48, False)
    assert kept
    assert kept.tiny
    back = Image.open(io.BytesIO(base64.b64decode(kept.uri.partition(",")[2])))
    assert back.convert("RGB").tobytes() == tiny.tobytes()


def test_thumbnails_are_made_once_for_the_same_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_fake_results(tmp_path / "default")
    before = write_report(run).html.read_bytes()
    made: list[Path] = []
    monkeypatch.setattr(
        "nemo_bench.report.thumbnails.thumbnail", lambda path, box: made.append(path) or thumbnail(path, box)
    )
    assert write_report(run).html.read_bytes() == before
    assert made == []
    image = next(run.glob("*__nemo__*/images/vm-01_01.png"))
    Image.effect_noise((80, 80), 40).convert("RGB").save(image)
    assert write_report(run).html.read_bytes() != before
    assert made == [image]
    moved = run.rename(tmp_path / "moved")
    made.clear()
    write_report(moved)
    assert {path.parent.name for path in made} <= {"references"}


def test_thumbnails_that_cannot_be_read_are_made_again(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    before = write_report(run).html.read_bytes()
    for path, text in zip(run.glob("*/thumbnails.json"), ("{", "[]", '{"a": [1]}'), strict=True):
        path.write_text(text)
    assert write_report(run).html.read_bytes() == before


def test_an_image_that_is_gone_leaves_a_named_gap(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    cell = json.loads((run / "run.json").read_text())["cells"][2]
    (run / cell / "images" / "vm-01_01.png").unlink()
    (run / "references" / "vm-02.png").write_text("no image")
    page = write_report(run).html.read_text()
    gaps = [a["aria-label"] for a in Tags(page).all("span") if a.get("class") == "gap"]
    assert len(gaps) == 3
    assert "Images that are gone or cut since they were scored; the command of the run makes them again: 1" in page
    assert "NeMo: images that are gone or cut since they were scored: 1" in str(
        terminal_table(load_results(run)).caption
    )
    assert {"Training image of vm-02 (no image on disk)", "Training image, vm-02 (no image on disk)"} < set(gaps)
    assert any(gap and gap.startswith("NeMo, seed 1") for gap in gaps)


def test_a_large_run_shows_fewer_and_smaller_images_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = load_results(write_fake_results(tmp_path / "default"))
    strips = len(PROMPTS) * len(METHODS)
    monkeypatch.setattr(html, "SIZES", (html.Size(strips - 1, 64, 8, 32), html.Size(strips, 40, 2, 16)))
    page = html.page(results, leaderboard(results))
    assert page.count("first 2 of 3 seeds") == len(PROMPTS)
    assert "NeMo, seed 1" in page
    assert "NeMo, seed 2" not in page
    gallery = page[page.index('id="cards"') :]
    assert {image["width"] for image in Tags(gallery).all("img")} == {"40", str(SEEDS * 16)}


def test_presets_without_sscd_say_that_they_are_not_those_of_the_paper(run: Path, page: str, tmp_path: Path) -> None:
    assert "Not comparable with the paper" in page
    other = write_fake_results(tmp_path / "default")
    for path in other.glob("*/metrics.json"):
        path.write_text(path.read_text().replace("SSIM to training image", "SSCD disc mixup to training image"))
    assert "Not comparable with the paper" not in write_report(other).html.read_text()


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
    auc = results.cells[0].detection[DETECTOR].auc
    assert f"Noise similarity: AUC {auc:.3f}" in next(figure.svg for figure in figures if figure.name == "roc-0")


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


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_betters(points: list[tuple[int, int]]) -> None:
    found = front(points)
    assert [points[i] for i in found] == sorted(points[i] for i in found)
    for i, (x, y) in enumerate(points):
        bettered = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        assert (i in found) == (not bettered)


def test_holm_agrees_with_a_case_worked_out_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_what_may_be_chance_is_called_neither_better_nor_worse(run: Path) -> None:
    results, seen = load_results(run), set()
    for row in leaderboard(results):
        for metric, value in row.values.items():
            if value.paired and results.metrics[metric].higher_is_better is not None:
                is_said = html._change(results, row, metric, value).endswith(("better", "worse"))
                assert is_said == (value.paired.p < 0.05)
                seen.add(is_said)
    assert seen == {True, False}


def test_stars_are_of_the_corrected_p_over_the_rows_of_a_group(run: Path) -> None:
    rows = leaderboard(load_results(run))
    seen = set()
    for row in rows:
        for metric in METRICS:
            family = [r.values[metric].paired.p for r in rows if r.group == row.group and has_test(r, metric)]
            if has_test(row, metric):
                own = row.values[metric].paired.p
                smaller = [p for p in family if p <= own]
                bound = max(min(1.0, p * (len(family) - sorted(family).index(p))) for p in smaller)
                assert row.corrected[metric] == pytest.approx(bound)
            p = row.corrected.get(metric, 1)
            assert row.stars(metric) == ("***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else "")
            seen.add(row.stars(metric))
    assert {"", "***"} <= seen


def has_test(row: Row, metric: str) -> bool:
    return metric in row.values and row.values[metric].paired is not None


def test_latex_has_a_table_for_each_group_with_the_best_marked(run: Path) -> None:
    results = load_results(run)
    text = latex(results, leaderboard(results))
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\toprule") == 3
    assert re.findall(r"caption\{two, (\w+, 2 prompts)", text) == [
        "VM, 2 prompts",
        "TM, 2 prompts",
        "general, 2 prompts",
    ]
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    bodies = re.findall(r"\\begin\{tabular\}\{(l(r+))\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert [len(columns) for columns, _, _ in bodies] == [1 + len(METRICS)] * 3
    for columns, _, body in bodies:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) == 7
        assert {line.count("&") for line in lines} == {len(columns) - 1}
        for part in re.findall(r"\$[^$]*\$", body):
            MathTextParser("path").parse(part)
    value = results.cells[2].aggregates["VM"]["ssim"]
    bold = rf"\mathit{{{value.mean:.3f}}}^{{***}}_{{[{value.low:.3f},\,{value.high:.3f}]}}"
    assert f"${bold}$" in text
    fid = results.cells[0].aggregates["VM"]["fid"].mean
    assert re.search(rf"\$(\\mathit{{)?{fid:.1f}}}?\$", text)
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == len(labels) == len(bodies)


def test_latex_shows_any_text() -> None:
    assert tex("a_b & 50% {x} #1 $2 ~ ^ \\ \n<|>") == (
        r"a\_b \& 50\% \{x\} \#1 \$2 \textasciitilde{} \textasciicircum{} \textbackslash{} "
        r"\textless{}\textbar{}\textgreater{}"
    )


def test_one_model_has_no_side_by_side(tmp_path: Path) -> None:
    tags = Tags(write_report(write_fake_results(tmp_path / "default")).html.read_text())
    ids = {a["id"] for _, a in tags.tags if "id" in a}
    assert {"leaderboard", "presets", "tradeoffs", "detection", "prompts"} <= ids
    assert "models" not in ids


def test_the_page_shows_presets_detection_and_counts(run: Path, page: str) -> None:
    text = Tags(page).text
    cell = load_results(run).cells[3]
    value = cell.presets["nemo"].rows["VM"]["ssim"]
    assert f"{value.value:.3f} ± {value.spread:.3f}" in text
    assert cell.presets["nemo"].definition in text
    assert f"{cell.detection[DETECTOR].auc:.3f}" in text
    assert "Captions longer than the text encoder takes, and so truncated: 1" in text
    assert "Dead links" in text


def test_many_prompts_and_methods_stay_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_results._picture", lambda *_: np.zeros((8, 8, 3)))
    prompts = [(f"p-{i:03d}", f"prompt {i}", ("VM", "TM", None)[i % 3]) for i in range(60)]
    methods = {**METHODS, **{f"other{i}": f"Other {i}" for i in range(6)}}
    run = write_fake_results(tmp_path / "large", prompts=prompts, methods=methods)
    results = load_results(run)
    for figure in plots(results):
        assert len(figure.svg) < 150_000, figure.name
    text = write_report(run).html.read_text()
    shown = re.sub(r"<noscript>.*?</noscript>", "", text, flags=re.DOTALL)
    assert text.count("<img") > 60 * 9
    assert shown.count("<img") == 3 * 2 * len(("training image", "no mitigation", "mitigation"))
    assert shown.count("<") < 15_000


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
    with pytest.raises(StoreError, match=r"threshold\.json does not hold what it should") as error:
        write_report(run)
    assert folder.name in str(error.value)
