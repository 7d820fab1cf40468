"""Images and noise differences that are not finite: recorded, counted, and no reason to be the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_bench.cli import main
from on_disk import read_json, read_records
from strict import read_strictly

SMALL = ["seeds=2", "localize_seeds=2", "model.steps=2", "trainer=cpu", "logger.csv=true"]


def command(root: Path, prompts: Path, *method: str) -> list[str]:
    """Words of a run, of no mitigation and of one that breaks images where no method is named."""
    folder = root / "conf" / "method"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spoils.yaml").write_text("_target_: spoiling.Spoils\nprompts: [vm-01]\nevery: 2\n")
    words = [*SMALL, f"root={root}", f"prompts.files=[{prompts}]", *(method or ["method=none,spoils"])]
    return ["run", "--conf", str(root / "conf"), *words]


def cell(root: Path, method: str) -> Path:
    (path,) = (root / "default").glob(f"*__{method}__*")
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verbatim, a template and a general prompt."""
    from nemo_bench import read_prompts, resolve

    source = [read_prompts(resolve(f"package:planted/prompts/{name}.jsonl")) for name in ("planted", "general")]
    path = tmp_path_factory.mktemp("prompts") / "three.jsonl"
    chosen = (source[0][0], source[0][-1], source[1][0])
    lines = [{"id": p.id, "text": p.text, "kind": p.kind, "references": [str(r) for r in p.references]} for p in chosen]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory, three: Path) -> Path:
    """A run in which one of two images of the verbatim prompt, and its noise differences, fail under one method."""
    root = tmp_path_factory.mktemp("partly")
    assert main(command(root, three)) == 0
    return root


def test_a_failed_image_has_its_reason_and_no_file_and_spoils_no_other(partly: Path) -> None:
    none, spoils = cell(partly, "none"), cell(partly, "spoils")
    records = read_records(spoils, "generate")
    (failed,) = (r for r in records.values() if "failed" in r)
    assert (failed["prompt"], failed["seed"]) == ("vm-01", 1)
    assert failed["failed"] == "latents are not finite after step 1 of 2, in float32"
    assert "image" not in failed
    made = {p.name: p.read_bytes() for p in (spoils / "images").iterdir()}
    assert len(made) == 5
    assert made == {p.name: p.read_bytes() for p in (none / "images").iterdir() if p.name in made}


def test_failed_images_and_prompts_have_no_score_and_are_counted(partly: Path) -> None:
    none, spoils = (read_json(cell(partly, name) / "metrics.json") for name in ("none", "spoils"))
    assert none["failed"] == {}
    assert none["counts"]["failed_images"] == 0
    assert spoils["counts"]["images"] == 5
    assert (spoils["counts"]["failed_images"], spoils["counts"]["failed_localizations"]) == (1, 1)
    assert set(spoils["failed"]) == {"VM", "all"}
    assert spoils["failed"]["VM"]["metrics"]["ssim"] == 1
    assert spoils["failed"]["VM"]["metrics"]["memorization"] == 1
    assert "memorization" not in spoils["aggregates"]["VM"]
    measured = read_records(cell(partly, "spoils"), "memorization").values()
    assert [(r["prompt"], "score" in r) for r in measured if "failed" in r] == [("vm-01", False)]
    scores = read_records(cell(partly, "spoils"), "score").values()
    own = [r["scores"]["ssim"] for r in scores if r["prompt"] == "vm-01" and "seed" in r]
    assert len(own) == 1
    assert spoils["aggregates"]["VM"]["ssim"]["mean"] == own[0]
    # Pairs are those that both have: the image that is there is the one of no mitigation.
    assert spoils["aggregates"]["VM"]["ssim"]["paired"]["difference"] == 0
    assert not any(r["scores"].get("diversity") for r in scores if r["prompt"] == "vm-01")


def test_every_table_counts_failures_and_every_file_is_strict_json(partly: Path) -> None:
    folder = partly / "default"
    assert read_strictly(partly) > 20
    board = read_json(folder / "leaderboard.json")
    (row,) = (r for r in board["rows"] if r["method"] == "spoils" and r["group"] == "VM")
    assert row["failed"]["images"] == 1
    assert not set(row["best"]) & set(row["failed"]["metrics"])
    for name in ("leaderboard.md", "leaderboard.tex", "report.html"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "1 image, 1 localization" in text, name
        assert "Failed" in text
    assert "latents are not finite after step 1 of 2" in (folder / "report.html").read_text(encoding="utf-8")
    assert "ssim_failed" in (folder / "leaderboard.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "counts/failed_images" in (cell(partly, "spoils") / "csv" / "metrics.csv").read_text(encoding="utf-8")


def test_a_failed_image_is_done_until_its_line_is_deleted_and_fails_again(
    partly: Path, three: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("nemo_bench.benchmark.runner.load_model", None)
        assert main(command(partly, three)) == 0
    capsys.readouterr()
    (file,) = (cell(partly, "spoils") / "records").glob("generate.*.jsonl")
    kept = [line for line in file.read_text().splitlines(keepends=True) if "failed" not in json.loads(line)]
    assert len(kept) == 5
    file.write_text("".join(kept))
    assert main(command(partly, three)) == 0
    # It is computed in the batch that it was in, so with the same result.
    (again,) = set(file.parent.glob("generate.*.jsonl")) - {file}
    (record,) = map(json.loads, again.read_text().splitlines())
    assert record["failed"]
    assert read_json(cell(partly, "spoils") / "metrics.json")["counts"]["failed_images"] == 1


def test_a_run_most_of_whose_images_fail_is_finished_and_ends_with_an_error(
    tmp_path: Path, three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = ["method=spoils", "method.every=1", "method.prompts=[vm-01,tm-26,general-01]"]
    assert main(command(tmp_path, three, "method=none")) == 0
    assert main(command(tmp_path, three, *spoilt)) == 1
    printed = capsys.readouterr()
    name = cell(tmp_path, "spoils").name
    reason = "latents are not finite after step 1 of 2, in float32"
    assert f"{name}: 6 of 6 images failed: {reason}" in printed.err
    assert "model.dtype=float32 or bfloat16" in printed.err
    assert "failed: 2 images" in printed.out
    assert read_strictly(tmp_path) > 10
    assert (tmp_path / "default" / "report.html").is_file()
    rows = [r for r in read_json(tmp_path / "default" / "leaderboard.json")["rows"] if r["method"] == "spoils"]
    assert [(r["group"], r["failed"]["images"]) for r in rows] == [("VM", 2), ("TM", 2), ("general", 2), ("all", 6)]
    assert not any(row["best"] for row in rows)
