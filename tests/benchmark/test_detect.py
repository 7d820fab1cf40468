"""nemo-bench detect: interrupted, over several processes, to table and page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.benchmark import detect as detection
from nemo_bench.benchmark.stages import detect as detect_stage
from nemo_bench.cli import main
from nemo_bench.config import detector_grid
from nemo_bench.errors import ConfigError, StoreError
from nemo_bench.records import schema
from nemo_bench.records.results import load_detections
from on_disk import read_json, read_records
from tiny import tiny_sdxl

SMALL = ["trainer=cpu", "model.steps=3", "batch_size=2"]
SOME = "detector=noise_difference,magnitude_first,bright_ending,token_significance"


def command(root: Path, prompts: Path, *more: str) -> list[str]:
    return ["detect", *SMALL, SOME, "detector.seeds=2", f"root={root}", f"prompts.files=[{prompts}]", *more]


def scores(folder: Path) -> dict[str, dict[str, float]]:
    return {
        read_json(path)["detector"]: {r["prompt"]: r["score"] for r in read_records(path.parent, "detect").values()}
        for path in folder.glob("*/spec.json")
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, three_prompts: Path) -> Path:
    """A run of four detectors over two memorized prompts and one other."""
    root = tmp_path_factory.mktemp("detected")
    assert main(command(root, three_prompts)) == 0
    return root / "default"


@pytest.fixture(scope="module")
def three_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nemo_bench import read_prompts, resolve

    planted, general = (
        read_prompts(resolve(f"package:planted/prompts/{name}.jsonl")) for name in ("planted", "general")
    )
    path = tmp_path_factory.mktemp("prompts") / "three.jsonl"
    lines = [{"id": p.id, "text": p.text, "kind": p.kind} for p in (planted[0], planted[-1], general[0])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_detector_has_a_cell_with_its_records(done: Path) -> None:
    cells = {read_json(path)["detector"]: path.parent for path in done.glob("*/spec.json")}
    assert sorted(cells) == ["bright_ending", "magnitude_first", "noise_difference", "token_significance"]
    for name, cell in cells.items():
        assert cell.name.startswith(f"planted__{name}__three__")
        records = read_records(cell, "detect")
        assert len(records) == 3
        assert (cell / "detect.done").is_file()
        assert all(record["cost"]["row_passes"] > 0 for record in records.values())
        about = read_json(cell / "metrics.json")
        measured = about["detection"][name]
        assert (measured["memorized"], measured["other"]) == (2, 1)
        (other,) = (r["score"] for r in records.values() if r["prompt"].startswith("general"))
        for kind in ("VM", "TM"):
            (own,) = (r["score"] for r in records.values() if r["prompt"].startswith(kind.lower()))
            assert measured["kinds"][kind] == (own > other) + 0.5 * (own == other)
        assert set(measured["kinds"]) == {"VM", "TM"}
    masks = read_records(cells["bright_ending"], "detect").values()
    assert all((cells["bright_ending"] / record["image"]).is_file() for record in masks)
    tokens = next(iter(read_records(cells["token_significance"], "detect").values()))["details"]["tokens"]
    assert [word for word, _ in tokens][:2] == ["the</w>", "golden</w>"]


def test_table_json_and_page_say_the_same(done: Path) -> None:
    rows = {row["detector"]: row for row in read_json(done / "detection.json")["detectors"]}
    found = load_detections(done)
    assert {d.spec.detector for d in found} == set(rows)
    for d in found:
        memorized, other = d.scores(memorized=True), d.scores(memorized=False)
        right = [(m > o) + 0.5 * (m == o) for m in memorized for o in other]
        assert rows[d.spec.detector]["roc"]["auc"] == pytest.approx(sum(right) / len(right))
    page = (done / "detection.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert page.count("data:image/webp") == 3
    assert "golden" in page
    for text in (page, (done / "detection.md").read_text(encoding="utf-8")):
        assert all(d.label in text for d in found)
    assert not re.search(r'(src|href)="(?!data:|#|detection\.(json|md)"|report\.html")', page)  # it stands alone


def test_what_is_done_is_not_sampled_again(done: Path, three_prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scores(done)
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", None)
    monkeypatch.setattr(detect_stage, "watch", None)
    assert main(command(done.parent, three_prompts)) == 0
    assert scores(done) == before


def test_records_of_an_older_version_outlive_the_loss_of_their_spec(
    done: Path, three_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(name: str, content: Any) -> Any:
        is_old = name == "detect" and isinstance(content, dict) and "value" in content
        return {"score" if key == "value" else key: value for key, value in content.items()} if is_old else content

    before = scores(done)
    shutil.copytree(done, tmp_path / "default")
    for path in tmp_path.glob("default/*/records/detect.*.jsonl"):
        path.write_text(path.read_text().replace('"score":', '"value":'))
        (path.parents[1] / "spec.json").unlink()
    monkeypatch.setattr(schema, "VERSION", 2)
    monkeypatch.setattr(schema, "UPGRADES", {1: rename})
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", None)
    assert main(command(tmp_path, three_prompts)) == 0
    assert scores(tmp_path / "default") == before
    assert not list(tmp_path.rglob("*.damaged"))


def test_a_picture_that_is_gone_is_made_again_and_nothing_else(
    done: Path, three_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = done.glob("*bright_ending*")
    picture = cell / next(iter(read_records(cell, "detect").values()))["image"]
    content = picture.read_bytes()
    picture.unlink()
    asked = []
    watch = detect_stage.watch

    def spy(model, detectors, prompts, batch_size):  # type: ignore[no-untyped-def]
        asked.append((sorted(detectors), len(prompts)))
        return watch(model, detectors, prompts, batch_size)

    monkeypatch.setattr(detect_stage, "watch", spy)
    assert main(command(done.parent, three_prompts)) == 0
    assert asked == [([cell.name], 1)]
    assert picture.read_bytes() == content


def test_interrupted_it_goes_on_and_another_detector_joins_later(
    done: Path, three_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, batches = detect_stage.watch, []

    def stop_at_the_second(model, detectors, prompts, batch_size):  # type: ignore[no-untyped-def]
        if batches:
            raise KeyboardInterrupt
        batches.append(len(prompts))
        return watch(model, detectors, prompts, batch_size)

    few = [word for word in command(tmp_path, three_prompts) if not word.startswith("detector=")]
    first = [*few, "detector=magnitude_first,noise_difference"]
    monkeypatch.setattr(detect_stage, "watch", stop_at_the_second)
    assert main(first) == 130
    assert batches == [1]
    asked: list[tuple[list[str], list[str]]] = []

    def spy(model, detectors, prompts, batch_size):  # type: ignore[no-untyped-def]
        asked.append((sorted(name.split("__")[1] for name in detectors), [p.id for p in prompts]))
        return watch(model, detectors, prompts, batch_size)

    monkeypatch.setattr(detect_stage, "watch", spy)
    # The one that is done for the first prompt does not see it again; the one that joins does.
    assert main([*few, "detector=magnitude_first,noise_difference,bright_ending"]) == 0
    ids = [json.loads(line)["id"] for line in three_prompts.read_text().splitlines()]
    assert asked[0] == (["bright_ending"], [ids[0]])
    assert asked[1:] == [(["bright_ending", "magnitude_first", "noise_difference"], [i]) for i in ids[1:]]
    for name, found in scores(tmp_path / "default").items():
        assert found == pytest.approx(scores(done)[name], rel=1e-3)


def test_two_ranks_find_the_same(done: Path, three_prompts: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "nemo_bench.cli", *command(tmp_path, three_prompts, "trainer.devices=2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found, expected = scores(tmp_path / "default"), scores(done)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    assert all(len(list(cell.glob("records/detect.*.jsonl"))) == 2 for cell in (tmp_path / "default").glob("planted*"))


def test_detectors_of_other_settings_are_told_apart(tmp_path: Path, three_prompts: Path) -> None:
    words = [w for w in command(tmp_path, three_prompts) if not w.startswith("detector")]
    assert main([*words, "detector=magnitude", "detector.seeds=1", "detector.steps=1,2"]) == 0
    assert {d.label for d in load_detections(tmp_path / "default")} == {
        "Noise magnitude, steps 1",
        "Noise magnitude, steps 2",
    }


def test_memorized_prompts_of_no_kind_count_as_memorized(tmp_path: Path, three_prompts: Path) -> None:
    lines = [json.loads(line) for line in three_prompts.read_text().splitlines()]
    known, other = tmp_path / "known.txt", tmp_path / "other.txt"
    known.write_text(f"{lines[0]['text']}\n{lines[1]['text']}\n")
    other.write_text(f"{lines[2]['text']}\n")
    files = [f"prompts.files=[{known},{other}]", f"prompts.memorized=[{known}]"]
    assert main(["detect", *SMALL, "detector=magnitude_first", f"root={tmp_path}", *files]) == 0
    (found,) = load_detections(tmp_path / "default")
    assert found.roc
    assert (found.roc.memorized, found.roc.other, found.roc.kinds) == (2, 1, {})
    assert len(found.scores(memorized=True)) == 2


def test_prompts_of_one_sort_are_scored_without_measures(
    tmp_path: Path, three_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = tmp_path / "memorized.jsonl"
    only.write_text("".join(three_prompts.read_text().splitlines(keepends=True)[:2]))
    words = [w for w in command(tmp_path, only) if not w.startswith("detector")]
    assert main([*words, "detector=magnitude_first", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["detectors"]
    assert "roc" not in row
    assert row["prompts"] == 2
    assert "No ROC curves" in (tmp_path / "default" / "detection.html").read_text(encoding="utf-8")


def test_mistakes_are_explained_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", None)

    def said(*words: str) -> str:
        assert main(["detect", f"root={tmp_path / 'results'}", *words]) == 1
        return capsys.readouterr().err

    assert "unknown detector 'sharpnes'. Did you mean 'sharpness'" in said("detector=sharpnes")
    assert "unknown key 'detector.tile'" in said("detector=tiled_l2", "detector.tile=2")
    assert "detector.seeds=... in place of seeds=" in said("seeds=3")
    assert "method does not matter to detection" in said("method=nemo")
    assert "TiledL2: seeds=1; expected greater than or equal to 2" in said("detector=tiled_l2", "detector.seeds=1")
    assert "expected one of mean, max" in said("detector=noise_difference", "detector.pairs=median")
    assert "give model.guidance above 1" in said("detector=magnitude", "model.guidance=1")
    tiny_sdxl().save_pretrained(tmp_path / "sdxl")
    sdxl = f"model.source={tmp_path / 'sdxl'}"
    assert "Bright Ending is made for StableDiffusionPipeline" in said(sdxl, "detector=magnitude,bright_ending")
    (tmp_path / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "unet" in said(sdxl, "detector=magnitude")
    assert main(["run", "detector=magnitude", f"root={tmp_path / 'results'}"]) == 1
    assert "nemo-bench detect" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_common_setting_goes_to_those_that_have_it() -> None:
    choices = detector_grid(["detector=magnitude,tiled_l2", "detector.seeds=3", "detector.tiles=2"])
    assert [c.settings.detector["seeds"] for c in choices] == [3, 3]
    assert [c.settings.detector.get("tiles") for c in choices] == [None, 2]
    with pytest.raises(ConfigError, match=r"unknown key 'detector\.gamma'"):
        detector_grid(["detector=magnitude,tiled_l2", "detector.gamma=2"])


def test_the_page_is_made_again_and_loggers_say_that_there_is_no_run(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = done / "detection.html"
    content = page.read_text(encoding="utf-8")
    page.write_text("gone")
    assert main(["report", str(done)]) == 0
    assert page.read_text(encoding="utf-8") == content
    assert "Bright Ending" in capsys.readouterr().out
    assert main(["track", str(done), "logger=csv"]) == 1
    assert "holds detectors and no run of methods" in capsys.readouterr().err


def test_a_run_of_methods_has_its_report_in_the_same_folder(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, f"root={tmp_path}", f"prompts.files=[{prompt_file}]"]
    assert main(["detect", *words, "detector=magnitude_first"]) == 0
    assert main(["run", *words, "method=none", "seeds=1", "localize_seeds=2"]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "default")]) == 0
    said = capsys.readouterr().out
    assert "detection.html" in said
    assert "report.html" in said


def test_a_folder_without_detectors_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="run nemo-bench detect"):
        load_detections(tmp_path)


def test_fewer_prompts_of_one_list_stand_apart(tmp_path: Path, three_prompts: Path) -> None:
    words = ["detect", *SMALL, f"root={tmp_path}", f"prompts.files=[{three_prompts}]", "detector.seeds=1"]
    assert main([*words, "detector=magnitude_first"]) == 0
    assert main([*words, "detector=one_step", "prompts.limit=2"]) == 0
    tables = (tmp_path / "default" / "detection.md").read_text()
    assert sorted(re.findall(r": (\d memorized and \d other) prompts", tables)) == [
        "2 memorized and 0 other",
        "2 memorized and 1 other",
    ]


def test_other_models_of_one_name_stand_apart(tmp_path: Path, three_prompts: Path) -> None:
    words = ["detect", "trainer=cpu", f"root={tmp_path}", f"prompts.files=[{three_prompts}]", "detector.seeds=2"]
    assert main([*words, "detector=magnitude_first,noise_difference", "model.steps=3"]) == 0
    assert main([*words, "detector=magnitude_first", "model.steps=3", "model.similarity.sigma=0.5"]) == 0
    assert main([*words, "detector=magnitude_first", "model.steps=4"]) == 0
    folder = tmp_path / "default"
    table = (folder / "detection.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## planted · three · (.*?): 2 memorized.*?\n\n(.*?)\n\n", table, re.MULTILINE | re.DOTALL)
    rows = {title: sorted(re.findall(r"^\| (\w.*?) \|", lines, re.MULTILINE)[1:]) for title, lines in sections}
    sigma = read_json(next(folder.glob("*noise*/spec.json")))["settings"]["model"]["similarity"]["sigma"]
    assert rows == {
        f"similarity.sigma {sigma} · steps 3": ["Noise difference", "Noise magnitude"],
        "similarity.sigma 0.5 · steps 3": ["Noise magnitude"],
        f"similarity.sigma {sigma} · steps 4": ["Noise magnitude"],
    }
    found = read_json(folder / "detection.json")["detectors"]
    assert sorted(row["model_settings"]["steps"] for row in found) == [3, 3, 3, 4]
    assert {row["model_settings"]["similarity"]["sigma"] for row in found} == {sigma, 0.5}
    page = (folder / "detection.html").read_text(encoding="utf-8")
    assert all(f"planted · three · {title}" in page for title in rows)


def test_a_folder_of_detectors_alone_has_nothing_to_audit(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(done)]) == 1
    assert "holds no run of methods, so there is nothing to audit" in capsys.readouterr().err


def test_more_steps_than_the_model_makes_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"watch 500 steps.*model\.steps=3; give detector\.steps at most that"):
        detection.plan(detector_grid(["detector=magnitude", "detector.steps=500", "model.steps=3"]))


def test_a_detector_that_does_not_fit_is_refused_before_anything_is_watched(
    tmp_path: Path, three_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["detect", *SMALL, "detector=tiled_l2", "detector.tiles=7", f"root={tmp_path}"]
    assert main([*words, f"prompts.files=[{three_prompts}]"]) == 1
    said = capsys.readouterr().err
    assert "detector.tiles=7 does not divide images of 64x64 pixels" in said
    assert "0/" not in said
