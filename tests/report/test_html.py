"""The page as text: numbers, escaping, anchors, pictures."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fake_results import DETECTOR, METHODS, PROMPTS, SEEDS, write_fake_results
from nemo_bench.records.io import read_file
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Leaderboard
from nemo_bench.records.store import read_run
from nemo_bench.report import html, write_report
from nemo_bench.report.plots import plots
from nemo_bench.report.tables import leaderboard
from nemo_bench.report.terminal import terminal_table
from tags import Tags

ATTACK = '<script>alert(1)</script> & "quotes" {{ 7 * 7 }}'


def test_the_page_shows_the_numbers_of_the_cells(run: Path, page: str) -> None:
    text = Tags(page).text
    for cell in load_results(run).cells:
        for group in ("VM", "all"):
            value = cell.summary.aggregates[group]["ssim"]
            assert f"{value.mean:.3f}" in text
            assert f"{value.low:.3f} to {value.high:.3f}" in text
            assert f"{cell.summary.aggregates[group]['fid'].mean:.1f}" in text
            assert f"median {value.median:.3f} ± {value.mad:.3f}" in text
        for prompt in cell.prompts:
            assert f"{cell.outcomes[prompt.id].scores['memorization']:.3f}" in text


def test_texts_of_the_run_are_escaped(tmp_path: Path) -> None:
    prompts = [("vm-01", ATTACK, "VM"), *PROMPTS[1:]]
    run = write_fake_results(tmp_path / "<b>x", prompts=prompts)
    page = write_report(load_results(run)).read_text(encoding="utf-8")
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


def test_an_image_that_is_gone_leaves_a_named_gap(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    cell = read_run(run).cells[2]
    (run / cell / "images" / "vm-01_01.png").unlink()
    (run / "references" / "vm-02.png").write_text("no image")
    page = write_report(load_results(run)).read_text()
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
    assert "Not comparable with the paper" not in write_report(load_results(other)).read_text()


def test_the_page_says_how_to_reproduce(page: str) -> None:
    text = Tags(page).text
    for words in ("nemo-bench run prompts=planted", "torch 2.15.0", "5f3a9be1c0d24786", '"theta_min": 0.12', "@inproc"):
        assert words in text


def test_unfinished_cells_are_listed(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    cell = read_run(run).cells[1]
    (run / cell / "score.done").unlink()
    page = write_report(load_results(run))
    assert f"{cell}: score not finished" in Tags(page.read_text()).text
    assert f"- {cell}: score not finished" in (run / "leaderboard.md").read_text()
    assert read_file(run / "leaderboard.json", Leaderboard).unfinished == {cell: "score not finished"}


def test_what_may_be_chance_is_called_neither_better_nor_worse(run: Path) -> None:
    results, seen = load_results(run), set()
    for row in leaderboard(results):
        for metric, value in row.metrics.items():
            if value.paired and results.metrics[metric].higher_is_better is not None:
                is_said = html.change(results, row, metric).endswith(("better", "worse"))
                assert is_said == (value.paired.p < 0.05)
                seen.add(is_said)
    assert seen == {True, False}


def test_one_model_has_no_side_by_side(tmp_path: Path) -> None:
    tags = Tags(write_report(load_results(write_fake_results(tmp_path / "default"))).read_text())
    ids = {a["id"] for _, a in tags.tags if "id" in a}
    assert {"leaderboard", "presets", "tradeoffs", "detection", "prompts"} <= ids
    assert "models" not in ids


def test_the_page_shows_presets_detection_and_counts(run: Path, page: str) -> None:
    text = Tags(page).text
    cell = load_results(run).cells[3]
    value = cell.summary.presets["nemo"].rows["VM"]["ssim"]
    assert f"{value.value:.3f} ± {value.spread:.3f}" in text
    assert cell.summary.presets["nemo"].definition in text
    assert f"{cell.summary.detection[DETECTOR].auc:.3f}" in text
    assert "Captions longer than the text encoder takes, and so truncated: 1" in text
    assert "Dead links" in text


def test_many_prompts_and_methods_stay_within_bounds(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    prompts = [(f"p-{i:03d}", f"prompt {i}", ("VM", "TM", None)[i % 3]) for i in range(60)]
    methods = {**METHODS, **{f"other{i}": f"Other {i}" for i in range(6)}}
    run = write_fake_results(tmp_path / "large", ["planted"], prompts, methods, [tmp_path / "black.png"])
    results = load_results(run)
    for figure in plots(results):
        assert len(figure.svg) < 150_000, figure.name
    text = write_report(load_results(run)).read_text()
    shown = re.sub(r"<noscript>.*?</noscript>", "", text, flags=re.DOTALL)
    assert text.count("<img") > 60 * 9
    assert shown.count("<img") == 3 * 2 * len(("training image", "no mitigation", "mitigation"))
    assert shown.count("<") < 15_000


def test_prompts_that_are_not_memorized_have_a_report_without_those_plots(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "general", prompts=[p for p in PROMPTS if p[2] is None])
    assert plots(load_results(run)) == []
    page = write_report(load_results(run)).read_text()
    assert "figure" not in {tag for tag, _ in Tags(page).tags}
    assert "#plots" not in page
