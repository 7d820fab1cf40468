"""What is recorded is computed again: equal where nothing was changed, and named where something was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from nemo_bench.benchmark.verify import verify
from nemo_bench.cli import main
from nemo_bench.errors import ConfigError, StoreError
from older_results import make_older, two_versions
from small_runs import small
from whole_folder import LIST


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run; not to be changed."""
    root = tmp_path_factory.mktemp("made") / "results"
    prompts = [f"prompts.files=[{LIST}]", "prompts.limit=1"]
    words = [*small(steps=1), *prompts, "method=none,nemo,random", "name=run", f"root={root}"]
    assert main(["run", *words]) == 0
    return root / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(made.parent, tmp_path / "results")) / "run"


def cell(run: Path, method: str) -> Path:
    (found,) = run.glob(f"*__{method}__*")
    return found


def change(folder: Path, stage: str, edit: Callable[[dict[str, Any]], object]) -> str:
    """Changes the first record of a stage, and gives its prompt."""
    path = folder / "records" / f"{stage}.0.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    record = json.loads(first)
    edit(record)
    path.write_text("".join([json.dumps(record) + "\n", *rest]))
    return str(record["prompt"])


def contents(folder: Path) -> dict[Path, tuple[int, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def test_a_run_is_computed_again_bit_by_bit(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(made.parent)
    capsys.readouterr()
    assert main(["verify", str(made), "trainer=cpu", "--json"]) == 0
    assert contents(made.parent) == before
    found = json.loads(capsys.readouterr().out)
    stages = [(row["cell"].split("__")[1], row["stage"]) for row in found]
    every = ["localize", "memorization", "generate", "score"]
    methods = {"none": every[1:], "nemo": every, "random": every}
    assert stages == [(method, stage) for method, those in methods.items() for stage in those]
    for row in found:
        assert row["recomputed"] == row["equal"] > 0
        assert row["difference"] == 0
        assert row["differing"] == []


def test_changed_records_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none, nemo = cell(run, "none"), cell(run, "nemo")

    def forge(record: dict[str, Any]) -> None:
        path = none / record["image"]
        ImageOps.mirror(Image.open(path)).save(path)
        content = path.read_bytes()
        record.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))

    def drop_a_neuron(record: dict[str, Any]) -> None:
        layers = record["localization"]["neurons"]
        next(ids for ids in layers.values() if ids).pop()

    prompt = change(none, "generate", forge)
    change(none, "memorization", lambda record: record.update(score=record["score"] - 0.1))
    change(none, "score", lambda record: record["scores"].update(alignment=0.9))
    change(nemo, "localize", drop_a_neuron)
    assert main(["verify", str(run), "trainer=cpu"]) == 1
    output, errors = capsys.readouterr()
    for folder, stage in ((none, "memorization"), (none, "generate"), (none, "score"), (nemo, "localize")):
        assert f"{folder.name}, {stage}: {prompt}" in errors
    assert "generate     2 recomputed, 1 equal bit by bit, largest difference 0." in output
    assert "localize     1 recomputed, 0 equal bit by bit, largest difference not of numbers;" in output


def test_an_image_that_is_not_the_recorded_one_is_named(run: Path) -> None:
    none = cell(run, "none")
    prompt = change(none, "generate", lambda record: record.update(sha256="0" * 64))
    found = {row.stage: row for row in verify(none, ["trainer=cpu"], progress=False)}
    assert found["generate"].differing == [f"{prompt}, image 0"]
    assert found["memorization"].differing == []


def test_what_localizing_started_from_may_be_gone(run: Path, said: list[str]) -> None:
    shutil.rmtree(cell(run, "nemo"))
    found = verify(cell(run, "random"), ["trainer=cpu"], records=1, progress=False)
    assert [row.stage for row in found] == ["memorization", "generate", "score"]
    assert not any(row.differing for row in found)
    assert "neurons can't be localized again" in "".join(said)


def test_a_run_of_an_older_version_is_verified_as_it_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_versions(monkeypatch)
    assert make_older(cell(run, "nemo")) > 0
    make_older(cell(run, "random"))
    before = contents(run)
    found = verify(run, ["trainer=cpu"], records=1, progress=False)
    assert [row.stage for row in found].count("localize") == 2
    assert all(row.recomputed == row.equal > 0 for row in found)
    assert contents(run) == before


def test_of_external_images_the_scores_are_computed_again(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted((cell(run, "none") / "images").glob("*.png"))):
        shutil.copy(path, images / f"img_{number // 2:04d}_{number % 2:02d}.png")
    words = ["model=planted", "prompts=planted", "prompts.limit=1", "method=theirs", "trainer=cpu"]
    assert main(["score", str(images), *words, "name=external", f"root={run.parent}"]) == 0
    (found,) = verify(run.parent / "external", ["trainer=cpu"], progress=False)
    assert found.stage == "score"
    assert found.recomputed == found.equal > 0


def test_what_can_not_be_verified_is_explained(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        verify(run, records=0)
    with pytest.raises(ConfigError, match=r"model.steps=9 can't be changed"):
        verify(run, ["model.steps=9"])
    with pytest.raises(StoreError, match="neither a run nor a cell"):
        verify(tmp_path)
    none = cell(run, "none")
    (none / "generate.done").unlink()
    with pytest.raises(StoreError, match="not finished"):
        verify(none, ["trainer=cpu"])
    (none / "generate.done").touch()


def test_other_files_than_the_run_had_are_refused(run: Path) -> None:
    none = cell(run, "none")
    path = none / "env.json"
    starts = json.loads(path.read_text())
    starts[-1]["settings"]["model"]["steps"] = 9
    path.write_text(json.dumps(starts))
    with pytest.raises(StoreError, match="were changed since"):
        verify(none, ["trainer=cpu"])
