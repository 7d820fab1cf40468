"""nemo-bench regions: from prompts and masks to table and page."""

from __future__ import annotations

import csv
import json
import re
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from nemo_bench import read_prompts, resolve
from nemo_bench.benchmark import regions
from nemo_bench.benchmark.stages import detect as detect_stage
from nemo_bench.cli import main
from nemo_bench.config import region_grid
from nemo_bench.errors import ConfigError, PromptError
from nemo_bench.records.lease import Leases
from nemo_bench.records.masks import read_masks
from nemo_bench.records.results import load_detections
from nemo_bench.records.schema import RegionTable
from nemo_bench.report.regions import gaps
from on_disk import read_json, read_records

GRID = np.linspace(0, 1, 101)
SMALL = ["trainer=cpu", "model.steps=4", "region=score_difference,curvature_difference", "region.seeds=2"]


def best_threshold(maps: list[tuple[NDArray[np.float64], NDArray[np.bool_]]]) -> float:
    """The first of the thresholds with the largest overlap of marked and memorized pixels."""
    overlaps = []
    for threshold in GRID:
        both = sum(int((own > threshold)[truth].sum()) for own, truth in maps)
        either = sum(int(((own > threshold) | truth).sum()) for own, truth in maps)
        overlaps.append(both / either if either else 1.0)
    return float(GRID[int(np.argmax(overlaps))])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a small run over two templates, of which one has no mask, a verbatim prompt and a general one."""
    root = tmp_path_factory.mktemp("regions")
    planted, (general, *_) = (
        read_prompts(resolve(f"package:planted/prompts/{name}.jsonl")) for name in ("planted", "general")
    )
    chosen = [planted[19], planted[18], planted[0], general]
    lines = [
        {"id": p.id, "text": p.text, "kind": p.kind, "references": [str(path) for path in p.references]} for p in chosen
    ]
    (root / "four.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "masks").mkdir()
    (root / "masks" / "tm-20.png").write_bytes(Path(resolve("package:planted/masks/tm-20.png")).read_bytes())
    return [*SMALL, f"root={root}", f"prompts.files=[{root}/four.jsonl]", f"prompts.masks={root}/masks"]


@pytest.fixture(scope="module")
def done(words: list[str]) -> Path:
    assert main(["regions", *words, "region.probes=1"]) == 0
    root = next(word for word in words if word.startswith("root=")).partition("=")[2]
    return Path(root) / "default"


def test_numbers_are_those_of_maps_and_masks_on_disk(done: Path) -> None:
    rows = {row["localizer"]: row for row in read_json(done / "regions.json")["rows"]}
    assert sorted(rows) == ["curvature_difference", "score_difference"]
    truth = np.array(Image.open(resolve("package:planted/masks/tm-20.png")))
    whole = {"tm-20": truth, "vm-01": np.ones_like(truth), "general-01": np.zeros_like(truth)}
    for row in rows.values():
        assert (row["unknown"], row["failed"]) == (1, 0)
        results = {result["prompt"]: result for result in row["results"]}
        assert {name: result["share"] for name, result in results.items()} == {n: m.mean() for n, m in whole.items()}
        maps = {}
        for record in read_records(done / row["cell"], "detect").values():
            heat = load_file(done / row["cell"] / record["file"])["heat"]
            assert heat.shape == (2, 16, 16)
            assert record["score"] == pytest.approx(float(heat.mean()), rel=1e-4)
            if record["prompt"] in whole:
                pictures = [Image.fromarray(each).resize((64, 64), Image.Resampling.BILINEAR) for each in heat]
                maps[record["prompt"]] = np.log1p(np.array([np.array(picture) for picture in pictures]))
        low, high = min(own.min() for own in maps.values()), max(own.max() for own in maps.values())
        scaled = {name: (own - low) / (high - low) for name, own in maps.items()}
        assert row["threshold"] == row["sets"]["all"]["threshold"]
        # Each is marked at the threshold that is best for those of the other half: places 0 and 2, and place 1.
        counting = [r for r in row["results"] if any(image["counts"] for image in r["images"])]
        assert len(counting) == 3
        for half, others in ((counting[::2], counting[1::2]), (counting[1::2], counting[::2])):
            best = best_threshold([
                (scaled[r["prompt"]][i["seed"]], whole[r["prompt"]]) for r in others for i in r["images"] if i["counts"]
            ])  # fmt: skip
            assert [r["threshold"] for r in half] == pytest.approx([best] * len(half), abs=0.011)
        marked = {name: own > results[name]["threshold"] for name, own in scaled.items()}
        for name, result in results.items():
            for image in result["images"]:
                both, either = (marked[name][image["seed"]] & whole[name], marked[name][image["seed"]] | whole[name])
                if image["counts"]:
                    assert image["iou"] == pytest.approx(both.sum() / either.sum() if either.any() else 1, abs=0.01)
                assert image["counts"] == (name == "general-01" or image["distance"] < 0.15)
                assert ("average_precision" in image) == (name == "tm-20" and image["counts"])
        partial = row["sets"]["partial"]
        own = [scaled["tm-20"][image["seed"]] for image in results["tm-20"]["images"] if image["counts"]]
        overlaps = [sum((m > t)[truth].sum() for m in own) / sum(((m > t) | truth).sum() for m in own) for t in GRID]
        assert partial["best_iou"] == pytest.approx(max(overlaps), abs=0.01)
        assert row["sets"]["all"]["prompts"] == 3
        assert row["left_out"] == sum(not image["counts"] for result in results.values() for image in result["images"])
    assert rows["curvature_difference"]["sets"]["partial"]["average_precision"] > truth.mean() + 0.05


def test_table_lines_and_page_show_them(done: Path) -> None:
    row = read_json(done / "regions.json")["rows"][0]
    with (done / "regions.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["cell"] == row["cell"] and line["prompt"] == "tm-20"]
    (own,) = (result for result in row["results"] if result["prompt"] == "tm-20")
    assert [float(line["distance"]) for line in lines] == [image["distance"] for image in own["images"]]
    page, text = ((done / f"regions.{ending}").read_text() for ending in ("html", "md"))
    for shown in (page, text):
        for name in (
            "Score difference",
            "Curvature difference",
            "Everything marked",
            "1 memorized prompt without a mask",
        ):
            assert name in shown
        assert f"{row['sets']['partial']['best_iou']:.3f}" in shown
    assert page.count("data:image/webp") == 2 * 3
    assert not re.search(r'(src|href)="(?!data:|#|regions\.(json|csv|md)"|detection\.html")', page)  # it stands alone
    sheet = np.array(Image.open(done / row["cell"] / "sheets" / "tm-20.png"))
    assert sheet.shape == (4 * 66 + 2, 2 * 66 + 2, 3)
    mask = np.array(Image.open(resolve("package:planted/masks/tm-20.png")))
    assert np.array_equal(sheet[3 * 66 + 2 : 4 * 66, 2:66, 0] > 127, mask)
    first = np.array(Image.open(done / row["cell"] / "images" / "tm-20.png"))[:, :64]
    assert np.array_equal(sheet[2:66, 2:66], first)


def test_what_is_done_is_only_scored_again(done: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_json(done / "regions.json")
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", None)
    monkeypatch.setattr(detect_stage, "watch", None)
    (done / "regions.json").unlink()
    assert main(["regions", *words, "region.probes=1"]) == 0
    assert read_json(done / "regions.json") == before
    (done / "regions.html").unlink()
    assert main(["report", str(done)]) == 0
    assert "tm-20" in (done / "regions.html").read_text()


def test_a_dry_run_counts_the_passes_that_records_then_have(
    done: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = [word for word in words if not word.startswith("root=")]
    assert main(["regions", "--dry-run", "--json", *fresh, f"root={tmp_path}", "region.probes=1"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert not any(tmp_path.iterdir())
    costs = [row["cost"] for row in read_json(done / "regions.json")["rows"]]
    assert [row["passes"] for row in expected["cells"]] == [4 * c["detect_extra_row_passes_per_prompt"] for c in costs]
    assert expected["sampling"] == 4 * 2 * 4 * 2
    assert [(row["masks"], row["without_mask"], row["pending"]) for row in expected["cells"]] == [(1, 1, 4)] * 2
    assert main(["regions", "--dry-run", *words, "region.probes=1"]) == 0
    assert "passes of one sample: 0, 0 of these for sampling" in capsys.readouterr().out


def test_another_command_adds_to_the_table_and_other_masks_are_told(
    done: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = read_json(done / "regions.json")["rows"]
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", None)  # all maps are there
    held = []
    owning = Leases.owning

    def noted(self: Leases, folder: Path) -> AbstractContextManager[None]:
        held.append(folder)
        return owning(self, folder)

    monkeypatch.setattr(Leases, "owning", noted)
    mask = np.array(Image.open(resolve("package:planted/masks/tm-20.png")))
    Image.fromarray(~mask).save(tmp_path / "tm-20.png")
    others = [*(word for word in words if not word.startswith("prompts.masks")), f"prompts.masks={tmp_path}"]
    assert main(["regions", *others, "region=score_difference"]) == 0
    score, curvature = sorted(read_json(done / "regions.json")["rows"], key=lambda row: row["localizer"])[::-1]
    assert curvature == next(row for row in before if row["localizer"] == "curvature_difference")
    assert score["masks"] != curvature["masks"]
    assert held[-2:] == [done / score["cell"], done]  # for sheets, then for the table
    text = (done / "regions.md").read_text()
    assert f"planted · four · masks {score['masks'][:8]}, all prompts whose regions are known" in text
    assert "Rows of the same model and prompts were compared with different masks" in text
    assert main(["regions", *words, "region.probes=1"]) == 0
    assert sorted(read_json(done / "regions.json")["rows"], key=str) == sorted(before, key=str)


def test_images_without_training_images_count_unchecked_and_are_counted(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {row["label"]: row for row in read_json(done / "regions.json")["rows"]}
    cell = next(found for found in load_detections(done) if found.label == "Score difference")
    bare = replace(cell, prompts=[prompt._replace(references=()) for prompt in cell.prompts])
    monkeypatch.setattr(regions, "_sheet", lambda *_: None)
    masks = read_masks(Path(resolve("package:planted/masks")), [p for p in cell.prompts if p.id == "tm-20"])
    row = regions.score(bare, masks)
    assert (row.left_out, row.unchecked, rows["Score difference"]["unchecked"]) == (0, 2 * 2, 0)
    (line,) = gaps(RegionTable(name="default", rows=[row]))
    assert "4 images without training images, all of which count" in line


def test_what_is_wrong_is_said_before_weights_load(words: list[str], tmp_path: Path) -> None:
    no_masks = [word for word in words if not word.startswith("prompts.masks")]
    with pytest.raises(ConfigError, match=r"four.jsonl: which regions are memorized is not known; give prompts.masks"):
        regions.plan(region_grid(no_masks))
    with pytest.raises(ConfigError, match=r"prompts.masks=one,two: a run compares heat maps with one folder of masks"):
        regions.plan(region_grid([*no_masks, "prompts.masks=one,two"]))
    Image.new("L", (32, 32), 255).save(tmp_path / "tm-20.png")
    with pytest.raises(PromptError, match=r"tm-20.png is 32x32, images are 64x64"):
        regions.plan(region_grid([*no_masks, f"prompts.masks={tmp_path}"]))
    with pytest.raises(ConfigError, match=r"seeds of its own; give region.seeds"):
        region_grid(["seeds=2"])
    with pytest.raises(ConfigError, match="detector does not matter to regions"):
        region_grid(["detector=magnitude"])
    with pytest.raises(ConfigError, match="unknown localizer of regions 'score'"):
        region_grid(["region=score"])
