"""Scoring existing images, of a run or external, as `nemo-bench score` does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nemo_bench import resolve
from nemo_bench.benchmark.dry_run import forecast
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.rescore import cells_of, score
from nemo_bench.benchmark.run import run
from nemo_bench.config import grid
from nemo_bench.errors import ConfigError, ModelError, NemoBenchError, StoreError
from nemo_bench.prompts import MANIFEST
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import ScoreRecord
from nemo_bench.records.store import Store
from nemo_bench.tracking import track
from on_disk import read_json, read_records

LIST = "package:planted/prompts/planted.jsonl"
SMALL = ["seeds=2", "localize_seeds=2", "model.steps=2", "trainer=cpu", "prompts.limit=2", f"prompts.files=[{LIST}]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two methods and two prompts with references; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    words = [
        *SMALL,
        "prompts.calibration=package:planted/prompts/calibration.txt",
        f"root={root}",
        "name=made",
        "method=none,random",
    ]
    return run(plan(grid(words)), "test", progress=False)


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    """A copy of the run that may be changed."""
    return shutil.copytree(made, tmp_path / "results" / "made")


@pytest.fixture(autouse=True)
def _no_diffusion_model(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a diffusion model is loaded")

    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", refuse)


def cell(folder: Path, method: str) -> Path:
    (path,) = folder.glob(f"*__{method}__*")
    return path


def scored(folder: Path, *words: str, **options: Any) -> Path:
    options = {"progress": False, **options}
    return score(cells_of(folder, words, **options), "test", progress=False)


def values(path: Path) -> dict[tuple[str, int | None], dict[str, float]]:
    return {(r["prompt"], r.get("seed")): r["scores"] for r in read_records(path, "score").values()}


def lines(path: Path) -> int:
    return sum(file.read_text().count("\n") for file in (path / "records").glob("score.*.jsonl"))


def export(source: Path, folder: Path, name: str = "img_{:04d}_{:02d}.png") -> Path:
    """Images of a cell as other scripts write them."""
    folder.mkdir()
    prompts = [json.loads(line)["id"] for line in (source / "prompts.jsonl").read_text().splitlines()]
    for record in read_records(source, "generate").values():
        shutil.copy(source / record["image"], folder / name.format(prompts.index(record["prompt"]), record["seed"]))
    return folder


def elsewhere(root: Path, method: str, *more: str) -> list[str]:
    of_list = [f"prompts.files=[{LIST}]", "prompts.limit=2"]
    return [*of_list, "model=planted", "trainer=cpu", f"root={root}", "name=outside", f"method={method}", *more]


def test_other_metrics_of_a_run(finished: Path) -> None:
    before = values(cell(finished, "random"))
    images = {path: path.stat().st_mtime_ns for path in finished.glob("*/images/*")}
    space = "{_target_: nemo_bench.metrics.PixelDistance}"
    added = f"+metrics.pixels={{_target_: nemo_bench.metrics.TrainingImage, space: {space}}}"
    assert scored(finished, added, "~metrics.neurons") == finished
    after = values(cell(finished, "random"))
    assert before.keys() == after.keys()
    for key, scores in after.items():
        assert "neurons" not in scores
        assert ("pixels" in scores) == (key[1] is not None)
        assert {k: v for k, v in scores.items() if k != "pixels"} == pytest.approx(
            {k: v for k, v in before[key].items() if k != "neurons"}, abs=1e-5
        )
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/images/*")} == images
    for method in ("none", "random"):
        metrics = read_json(cell(finished, method) / "metrics.json")
        assert "pixels" in metrics["metrics"]
        assert "generate_seconds_per_image" in metrics["cost"]
    assert "paired" in read_json(cell(finished, "random") / "metrics.json")["aggregates"]["VM"]["pixels"]
    assert len(load_results(finished).cells) == 2


def test_single_changes_are_those_of_the_metrics_of_the_run(finished: Path) -> None:
    scored(finished, "~metrics.neurons")
    scored(finished, "~metrics.diversity")
    names = set(read_json(cell(finished, "random") / "metrics.json")["metrics"])
    assert not names & {"neurons", "diversity"}
    assert "ssim" in names


def test_metrics_stay_where_none_are_named_and_nothing_is_computed_twice(finished: Path) -> None:
    scored(finished, "~metrics.neurons")
    counts = lines(cell(finished, "random"))
    scored(finished)
    assert "neurons" not in read_json(cell(finished, "random") / "metrics.json")["metrics"]
    assert lines(cell(finished, "random")) == counts


def test_scoring_goes_on_where_it_stopped(finished: Path) -> None:
    path = cell(finished, "none")
    before = values(path)
    (file,) = (path / "records").glob("score.*.jsonl")
    kept = file.read_text().splitlines(keepends=True)[:4]
    file.write_text("".join(kept)[:-10])  # the first prompt's three lines, and a torn one
    (path / "score.done").unlink()
    scored(finished)
    after = {(r.prompt, r.seed): r.scores for r in Store(path).records(ScoreRecord).values()}
    assert after.keys() == before.keys()
    for key, found in after.items():  # batches of another size round otherwise
        assert found == pytest.approx(before[key], abs=1e-5)
    assert file.read_text() == "".join(kept)[:-10]  # what was computed is not computed again
    assert lines(path) == 3 + 3


def test_one_cell_is_scored_like_the_one_without_mitigation(finished: Path) -> None:
    scored(cell(finished, "random"), "~metrics.neurons")
    assert all("neurons" not in read_json(path)["metrics"] for path in finished.glob("*/metrics.json"))
    scored(cell(finished, "none"), "metrics=default")
    assert "neurons" in read_json(cell(finished, "none") / "metrics.json")["metrics"]
    assert "neurons" not in read_json(cell(finished, "random") / "metrics.json")["metrics"]


def test_images_are_read_in_other_processes_too(finished: Path) -> None:
    before = values(cell(finished, "random"))
    (cell(finished, "random") / "scoring.json").unlink()
    scored(finished, "workers=2", "batch_size=1")
    after = values(cell(finished, "random"))
    assert before.keys() == after.keys()
    assert all(after[key] == pytest.approx(before[key], abs=1e-5) for key in before)


def test_an_image_that_is_not_the_recorded_one_is_named_by_every_process(finished: Path) -> None:
    image = next((cell(finished, "random") / "images").iterdir())
    content = image.read_bytes()
    image.write_bytes(content[:100] + bytes(len(content) - 100))
    (cell(finished, "random") / "scoring.json").unlink()
    for workers in (0, 1):
        with pytest.raises(StoreError) as caught:
            scored(finished, f"workers={workers}")
        assert str(caught.value).startswith(f"{image} is not the image that was recorded")
        assert "Traceback" not in str(caught.value)


def manifest(folder: Path, list_file: Path, prompts: list[dict[str, Any]]) -> None:
    """One fetched image, one dead link."""
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    entries = [{"url": "http://a/1", "status": "ok", "file": "a.png"}, {"url": "http://a/2", "status": "dead"}]
    (folder / MANIFEST).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    rows = [{**prompt, "urls": [entry["url"]]} for prompt, entry in zip(prompts, entries, strict=True)]
    list_file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_references_may_come_later(tmp_path: Path) -> None:
    listed = tmp_path / "list.jsonl"
    prompts = [{"id": "a", "text": "a red sun", "kind": "VM"}, {"id": "b", "text": "a big map", "kind": "VM"}]
    listed.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), "red").save(folder / f"img_000{number}_00.png")
    words = [f"prompts.files=[{listed}]", "model=planted", "trainer=cpu", f"root={tmp_path}", "method=x"]
    run_folder = scored(folder, *words)
    assert "ssim" not in values(cell(run_folder, "x"))["a", 0]
    manifest(tmp_path / "fetched", listed, prompts)
    scored(run_folder, f"prompts.references={tmp_path / 'fetched'}")
    assert values(cell(run_folder, "x"))["a", 0]["ssim"] == pytest.approx(1, abs=1e-5)
    assert "ssim" not in values(cell(run_folder, "x"))["b", 0]
    counts = read_json(cell(run_folder, "x") / "metrics.json")["counts"]
    assert (counts["dead_references"], counts["without_reference"]) == (1, 1)
    scored(run_folder)
    assert read_json(cell(run_folder, "x") / "metrics.json")["counts"] == counts


def test_a_damaged_reference_costs_its_prompt_the_similarity_and_is_counted(tmp_path: Path, said: list[str]) -> None:
    prompts, images = [], tmp_path / "images"
    images.mkdir()
    for number, name in enumerate("abc"):
        for path in (tmp_path / f"{name}.png", images / f"img_000{number}_00.png"):
            Image.effect_noise((64, 64), 90).convert("RGB").save(path)
        prompts.append({"id": name, "text": f"a {name}", "kind": "VM", "references": [f"{name}.png"]})
    prompts[2]["references"].append("b.png")
    listed, damaged = tmp_path / "list.jsonl", tmp_path / "b.png"
    listed.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    words = [f"prompts.files=[{listed}]", "model=planted", "trainer=cpu", f"root={tmp_path}", "method=x"]
    run_folder = scored(images, *words)
    assert said[0].startswith(f"1 of 3 training images can't be decoded and are left out: {damaged} (image file is tru")
    assert said[0].endswith("no similarity to training images: 1")
    having = {name for (name, _), scores in values(cell(run_folder, "x")).items() if "ssim" in scores}
    assert having == {"a", "c"}
    counts = read_json(cell(run_folder, "x") / "metrics.json")["counts"]
    assert (counts["damaged_references"], counts["without_reference"]) == (1, 1)
    assert "Files of training images that can&#39;t be decoded" in (run_folder / "report.html").read_text()
    needs = forecast(grid([*words[:-1], "method=none"]))["needs"]
    (need, *_) = [need for need in needs if need["kind"] == "training images"]
    assert need["state"] == "partly"
    assert str(damaged) in need["note"]
    damaged.write_bytes(whole)  # mended, it counts again
    scored(run_folder)
    assert all("ssim" in scores for (_, seed), scores in values(cell(run_folder, "x")).items() if seed is not None)
    assert read_json(cell(run_folder, "x") / "metrics.json")["counts"]["damaged_references"] == 0


def test_images_made_elsewhere_get_the_scores_of_those_made_here(made: Path, tmp_path: Path) -> None:
    for method, label in (("none", "none"), ("random", "theirs")):
        images = export(cell(made, method), tmp_path / method)
        folder = scored(images, *elsewhere(tmp_path / "results", label))
        found, native = values(cell(folder, label)), values(cell(made, method))
        assert found.keys() == native.keys()
        for key, scores in found.items():
            expected = {k: v for k, v in native[key].items() if k not in ("memorization", "neurons")}
            assert scores == pytest.approx(expected, abs=1e-5)
        assert not list(cell(folder, label).glob("images/*"))
    theirs = read_json(cell(folder, "theirs") / "metrics.json")
    assert theirs["aggregates"]["VM"]["ssim"]["paired"]["prompts"] == 2
    assert theirs["cost"] == {}
    results = load_results(folder)
    assert [c.spec.title for c in results.cells] == ["No mitigation", "theirs"]
    assert (folder / "report.html").is_file()
    # Asked for again, everything is there; scoring the run as a whole works too.
    count = lines(cell(folder, "theirs"))
    scored(tmp_path / "random", *elsewhere(tmp_path / "results", "theirs"))
    scored(folder)
    assert lines(cell(folder, "theirs")) == count
    assert len(list(folder.glob("*__theirs__*"))) == 1


def test_a_mapping_names_images_anywhere(made: Path, tmp_path: Path) -> None:
    source = cell(made, "random")
    rows = [
        {"file": r["image"], "id": r["prompt"], "seed": r["seed"]} for r in read_records(source, "generate").values()
    ]
    mapping = tmp_path / "map.jsonl"
    mapping.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = scored(source, *elsewhere(tmp_path / "results", "mapped"), mapping=mapping)
    found, native = values(cell(folder, "mapped")), values(source)
    assert found.keys() == native.keys()
    assert all(found[key].get("ssim") == pytest.approx(native[key].get("ssim")) for key in found)


def test_images_that_moved_are_found_again_and_changed_ones_are_others(
    made: Path, tmp_path: Path, said: list[str]
) -> None:
    images = export(cell(made, "random"), tmp_path / "before")
    folder = scored(images, *elsewhere(tmp_path / "results", "x"))
    images = images.rename(tmp_path / "after")
    with pytest.raises(StoreError, match="4 images gone"):
        scored(folder)
    scored(images, *elsewhere(tmp_path / "results", "x"))
    records = read_records(cell(folder, "x"), "generate").values()
    assert all(Path(record["image"]).parent == images for record in records)
    with Image.open(images / "img_0000_00.png") as image:
        Image.new("RGB", image.size).save(images / "img_0000_00.png")
    scored(images, *elsewhere(tmp_path / "results", "x"))
    assert len(list(folder.glob("*__x__*"))) == 2
    # The former ones are no longer there: their scores stay, and are not made from other images.
    before = {path: path.read_text() for path in folder.glob("*/metrics.json")}
    score(cells_of(folder, ["~metrics.neurons"], progress=False), "test")
    (line,) = (line for line in said if "left out" in line)
    former = folder / line.split(":")[0]
    assert "1 image not as scored" in line
    assert [path.parent for path in before if path.read_text() == before[path]] == [former]
    with pytest.raises(StoreError, match="1 image not as scored"):
        scored(former)


def test_images_made_elsewhere_can_be_tracked(made: Path, tmp_path: Path, said: list[str]) -> None:
    folder = scored(export(cell(made, "random"), tmp_path / "images"), *elsewhere(tmp_path / "results", "x"))
    settings = grid(["method=none", "logger=all"])[0].settings.logger
    track(load_results(folder), settings)
    assert list(cell(folder, "x").glob("wandb/offline-run-*/*.wandb")), said
    assert list(cell(folder, "x").glob("csv/metrics.csv"))


def spoil_reference(folder: Path) -> None:
    path = cell(folder, "none") / "prompts.jsonl"
    path.write_text(path.read_text().replace("vm-01.png", "gone.png"))


def drop_image(folder: Path) -> None:
    next((cell(folder, "none") / "images").iterdir()).unlink()


def reopen(folder: Path) -> None:
    for path in folder.glob("*/generate.done"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "words", "error", "message"),
    [
        (
            None,
            ["seeds=3"],
            ConfigError,
            "seeds can't be changed for existing images; settings of scoring: metrics",
        ),
        (None, ["method=nemo"], ConfigError, "method can't be changed"),
        (None, ["prompts.limit=1"], ConfigError, r"prompts\.limit can't be changed"),
        (None, ["metrics=fool"], ConfigError, "unknown metrics 'fool'.*Choices"),
        (None, ["metrics.ssim=3"], ConfigError, r"metrics\.ssim: expected _target_"),
        (None, ["weights=w"], ConfigError, "name those too, such as metrics=default"),
        (None, ["metrics=full"], ModelError, "no weights for .*Download"),
        (None, ["batch_size=1,2"], ConfigError, "2 sets of settings are asked for"),
        (None, [f"prompts.references={LIST}"], NemoBenchError, "2 reference files of 2 prompts are missing"),
        (spoil_reference, [], StoreError, r"1 reference image gone, such as .*gone\.png"),
        (drop_image, [], StoreError, "1 image gone, such as images/.*the command of the run makes them again"),
        (reopen, [], StoreError, "no cell has all its images"),
    ],
)
def test_what_can_be_wrong_with_a_run(
    finished: Path, spoil: Callable[[Path], None] | None, words: list[str], error: type[Exception], message: str
) -> None:
    if spoil:
        spoil(finished)
    before = {path: path.read_bytes() for path in finished.glob("*/*.json*")}
    with pytest.raises(error, match=message):
        scored(finished, *words)
    assert {path: path.read_bytes() for path in finished.glob("*/*.json*")} == before


def test_an_unfinished_cell_is_left_out_and_named(finished: Path, said: list[str]) -> None:
    (cell(finished, "random") / "generate.done").unlink()
    cells = cells_of(finished, progress=False)
    assert [c.spec.method for c in cells] == ["none"]
    why = "not all images are there; give the command of the run again to go on"
    assert said == [f"{cell(finished, 'random').name}: left out, {why}"]
    with pytest.raises(StoreError, match="not all images are there; give the command of the run"):
        cells_of(cell(finished, "random"), progress=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"name their model.*and their prompts: model=sd14 prompts\.files="),
        (["model=planted"], "and their prompts"),
        (["model=fool", "prompts=planted"], "unknown model 'fool'"),
        (["model=planted", "prompts=planted", "method=a/b"], "method=a/b: expected letters"),
        (["model=planted", "prompts=planted"], r"2 of 4 images are missing: img_0000_01, img_0001_00"),
        (
            ["model.clip=ViT-B-32", "prompts=planted"],
            r"Of another model name CLIP alone: model\.clip=",
        ),
        (["model=planted,sd14", "prompts=planted"], "2 sets of settings"),
        (["model=planted", "prompts=planted", "metrics=full"], "no weights"),
    ],
)
def test_what_can_be_wrong_with_images_made_elsewhere(tmp_path: Path, words: list[str], message: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("img_0000_00", "img_0001_01"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    with pytest.raises(NemoBenchError, match=message):
        scored(folder, *words, f"root={tmp_path / 'results'}")
    assert not (tmp_path / "results").exists()


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "nemo_bench.cli", "score", str(folder), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_find_the_same_for_images_made_elsewhere(made: Path, tmp_path: Path) -> None:
    images = export(cell(made, "random"), tmp_path / "images")
    one = scored(images, *elsewhere(tmp_path / "one", "x"))
    done = command(images, *elsewhere(tmp_path / "two", "x", "trainer.devices=2", "workers=1"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"records: {tmp_path / 'two' / 'outside'}" in done.stdout
    path = cell(tmp_path / "two" / "outside", "x")
    assert path.name == cell(one, "x").name
    found, expected = values(path), values(cell(one, "x"))
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key], abs=1e-5) for key in found)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = command(tmp_path / "nothing", "model=planted", f"prompts.files=[{resolve(LIST)}]")
    assert done.returncode == 1
    assert "nothing does not exist; give a run, a cell, or a folder of images" in done.stderr
    (tmp_path / "nothings").mkdir()
    done = command(tmp_path / "nothing")
    assert "Did you mean 'nothings'?" in done.stderr


def test_a_part_of_the_prompts_and_images_of_any_size_are_scored_and_counted(
    made: Path, tmp_path: Path, said: list[str]
) -> None:
    """CLIP is named by itself: no diffusion model of conf/ made these."""
    native = values(cell(made, "random"))
    images = export(cell(made, "random"), tmp_path / "images")
    for path in images.glob("img_0001_*"):
        path.unlink()
    with Image.open(images / "img_0000_01.png") as image:
        double = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    Image.new("RGB", double.size).save(images / "img_0000_01.png")
    made_with = read_json(cell(made, "random") / "env.json")[-1]["settings"]["model"]
    clip = [f"model.clip={made_with['clip']}", f"model.clip_pretrained={made_with['clip_pretrained']}"]
    words = [word for word in elsewhere(tmp_path / "results", "x", *clip) if not word.startswith("model=")]
    cells = cells_of(images, words, progress=False)
    folder = score(cells, "test", progress=False)
    assert said[0] == "1 prompt without an image: counted, but without a part in any number"
    assert said[1].startswith("images of 2 sizes (1 of ")
    path = cell(folder, "x")
    assert path.name.startswith("unnamed__x__")
    counts = read_json(path / "metrics.json")["counts"]
    assert (counts["images"], counts["prompts"], counts["without_images"], counts["resized"]) == (2, 2, 1, 1)
    found = values(path)
    first = next(iter(found))[0]
    assert {prompt for prompt, _ in found} == {first}
    assert found[first, 0]["ssim"] == pytest.approx(native[first, 0]["ssim"], abs=1e-5)
    assert found[first, 0]["alignment"] == pytest.approx(native[first, 0]["alignment"], abs=1e-5)
    (shown,) = load_results(folder).cells
    assert shown.summary.aggregates["VM"]["ssim"].prompts == 1
