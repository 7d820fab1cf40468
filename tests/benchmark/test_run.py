"""The main job, in this process, on the embedded model with few prompts."""

from __future__ import annotations

import csv
import io
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from nemo_bench import Neurons, Prompt, StoreError
from nemo_bench.benchmark.pending import pending_work
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run
from nemo_bench.benchmark.summary import _detection
from nemo_bench.config import grid
from nemo_bench.diffusion import flops
from nemo_bench.records.io import read_file
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Leaderboard, MemorizationRecord, Roc
from nemo_bench.report.terminal import terminal_table
from on_disk import read_records
from small_runs import small

SMALL = small()


def words(root: Path, prompts: Path, *more: str) -> list[str]:
    return [*SMALL, f"root={root}", f"prompts.files=[{prompts}]", *more]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """All records of a run without what may differ between runs."""
    found = {}
    for cell in sorted(p for p in folder.iterdir() if p.is_dir()):
        for stage in ("localize", "memorization", "generate", "score"):
            for name, record in read_records(cell, stage).items():
                found[f"{cell.name}/{stage}/{name}"] = {k: v for k, v in record.items() if k != "cost"}
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of the default methods, and its prompt file."""
    root = tmp_path_factory.mktemp("finished")
    from nemo_bench import read_prompts, resolve

    planted = read_prompts(resolve("package:planted/prompts/planted.jsonl"))
    general = read_prompts(resolve("package:planted/prompts/general.jsonl"))
    prompts = root / "three.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"id": p.id, "text": p.text, "kind": p.kind, "references": [str(r) for r in p.references]})
            + "\n"
            for p in (planted[0], planted[-1], general[0])
        )
    )

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a connection was attempted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return run(plan(grid(words(root, prompts))), "test"), prompts


def test_every_cell_is_complete(finished: tuple[Path, Path]) -> None:
    folder, _ = finished
    cells = [p for p in folder.iterdir() if p.is_dir()]
    assert sorted(p.name.split("__")[1] for p in cells) == [
        "nemo", "none", "one_edit", "other_prompt", "random"
    ]  # fmt: skip
    for cell in cells:
        assert len(read_records(cell, "localize")) == (0 if "__none__" in cell.name else 3)
        assert len(read_records(cell, "memorization")) == 3
        assert len(read_records(cell, "generate")) == 6
        assert len(read_records(cell, "score")) == 6 + 3
        assert len(list((cell / "images").glob("*.png"))) == 6
        metrics = json.loads((cell / "metrics.json").read_text())
        assert {"VM", "TM", "general", "all"} == set(metrics["aggregates"])
        assert "ssim" not in metrics["aggregates"]["general"]
        assert metrics["aggregates"]["VM"]["ssim"]["prompts"] == 1
    for name in ("report.html", "leaderboard.md", "leaderboard.csv", "leaderboard.json"):
        assert (folder / name).stat().st_size > 100


def found_by(folder: Path, method: str) -> dict[str, dict[str, Any]]:
    (cell,) = folder.glob(f"*__{method}__*")
    return {record["prompt"]: record["localization"] for record in read_records(cell, "localize").values()}


def test_general_prompts_are_reported_with_the_neurons_of_memorized_ones_off(finished: tuple[Path, Path]) -> None:
    """An edited model has no neurons of general prompts off, only those of the prompts that it was edited for."""
    folder, _ = finished
    own = {name: Neurons(record["neurons"]) for name, record in found_by(folder, "nemo").items()}
    memorized = {name: neurons for name, neurons in own.items() if name != "general-01"}
    assert len(set(memorized.values())) == len(memorized) == 2
    everything = {Neurons(record["neurons"]) for record in found_by(folder, "one_edit").values()}
    assert everything == {memorized["vm-01"] | memorized["tm-26"]}
    another = {name: Neurons(record["neurons"]) for name, record in found_by(folder, "other_prompt").items()}
    assert another["vm-01"] == memorized["tm-26"]
    assert another["tm-26"] == memorized["vm-01"]
    assert another["general-01"] in memorized.values()


def test_every_row_of_a_search_says_who_passed_the_gate_and_where_it_ran_out(finished: tuple[Path, Path]) -> None:
    folder, _ = finished
    records = found_by(folder, "nemo")
    for record in records.values():
        assert record["passed_gate"] == (record["gate_score"] > 0 and bool(record["initial"]))
        ran_out = record["passed_gate"] and record["initial_score"] == record["threshold"]
        assert record["exhausted"] == ran_out
    of = {"VM": ["vm-01"], "TM": ["tm-26"], "general": ["general-01"], "all": list(records)}
    expected = {
        group: {
            "prompts": len(members),
            **{key: sum(records[name][key] for name in members) for key in ("passed_gate", "exhausted")},
        }
        for group, members in of.items()
    }
    lines = json.loads((folder / "leaderboard.json").read_text())["rows"]
    with (folder / "leaderboard.csv").open(encoding="utf-8") as file:
        cells = {(row["method"], row["group"]): row for row in csv.DictReader(file)}
    for method in ("nemo", "random"):
        (path,) = folder.glob(f"*__{method}__*/metrics.json")
        assert json.loads(path.read_text())["localization"] == expected
        for line in (line for line in lines if line["method"] == method):
            want = expected[line["group"]]
            assert (line["passed_gate"], line["exhausted"]) == (want["passed_gate"], want["exhausted"])
            row = cells[method, line["group"]]
            assert (row["passed_gate"], row["exhausted"]) == (str(want["passed_gate"]), str(want["exhausted"]))
    for method in ("none", "one_edit", "other_prompt"):
        (path,) = folder.glob(f"*__{method}__*/metrics.json")
        assert json.loads(path.read_text())["localization"] == {}
    general = expected["general"]
    words = f"{general['passed_gate']} of 1 passed the gate, {general['exhausted']} ran out"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal_table(load_results(folder)))
    texts = [(folder / f"leaderboard.{kind}").read_text(encoding="utf-8") for kind in ("md", "tex")]
    for text in (*texts, (folder / "report.html").read_text(encoding="utf-8"), console.export_text()):
        assert words in text


def test_random_neurons_are_as_many_and_elsewhere(finished: tuple[Path, Path]) -> None:
    folder, _ = finished
    by_method = {p.name.split("__")[1]: p for p in folder.iterdir() if p.is_dir()}
    nemo, random = (read_records(by_method[name], "localize") for name in ("nemo", "random"))
    for name, record in nemo.items():
        found, drawn = (Neurons(each["localization"]["neurons"]) for each in (record, random[name]))
        assert found.count == drawn.count
        assert (drawn - found).count == drawn.count
    assert not read_records(by_method["none"], "localize")


def test_again_nothing_is_open_and_nothing_is_loaded(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompts = finished
    before = results(folder)
    cells = plan(grid(words(folder.parent, prompts)))
    assert all(not any(records.values()) for _, records in pending_work(cells))

    def refuse(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", refuse)
    run(cells, "test")
    assert results(folder) == before


def test_lost_images_are_made_again_and_equal(finished: tuple[Path, Path], tmp_path: Path) -> None:
    folder, prompts = finished
    again = run(plan(grid(words(tmp_path, prompts, "method=none"))), "test")
    (cell,) = (p for p in again.iterdir() if p.is_dir())
    lost = sorted((cell / "images").glob("*.png"))[1]
    content = lost.read_bytes()
    lost.unlink()
    (cell / "generate.done").unlink()
    (cell / "score.done").unlink()
    run(plan(grid(words(tmp_path, prompts, "method=none"))), "test")
    assert lost.read_bytes() == content
    assert results(again).items() <= results(folder).items()


def test_a_method_is_run_at_every_strength_and_one_is_chosen(tmp_path: Path) -> None:
    planted = ["prompts.files=package:planted/prompts/planted.jsonl", "prompts.limit=4"]
    asked = [*SMALL, *planted, f"root={tmp_path}", "method=none,embedding_noise", "seeds=1", "localize_seeds=2"]
    folder = run(plan(grid([*asked, "strengths=true"])), "test")
    board = read_file(folder / "leaderboard.json", Leaderboard)
    assert board.strengths
    (curve,) = [curve for curve in board.strengths.curves if curve.setting]
    assert (curve.setting, [point.value for point in curve.points]) == ("scale", [1.6, 3.2, 6.4])
    assert (curve.choosing_prompts, curve.prompts_reported) == (1, 3)
    assert curve.chosen in [point.cell for point in curve.points]
    assert '<section id="strengths"' in (folder / "report.html").read_text(encoding="utf-8")
    # Without strengths=true it is the cell in the middle, whose folder is there; the curve stays.
    assert plan(grid(asked))[1].id == curve.points[1].cell
    run(plan(grid(asked)), "test")
    assert read_file(folder / "leaderboard.json", Leaderboard).strengths == board.strengths


def test_a_network_whose_operations_cannot_be_counted_makes_its_images(
    prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def count(*args: object) -> int:
        torch.bincount(torch.zeros(3, device="meta").long())  # an operator that torch has no meta kernel of
        return 0

    monkeypatch.setattr(flops, "count_flops", count)
    folder = run(plan(grid(words(tmp_path, prompt_file, "method=none", "prompts.limit=1", "seeds=1"))), "test")
    (cell,) = (p for p in folder.iterdir() if (p / "spec.json").exists())
    assert len(list((cell / "images").glob("*.png"))) == 1
    assert not (cell / "network.json").exists()
    (line,) = (line for line in said if "can't be counted: " in line)
    assert "aten::bincount" in line
    assert "\n" not in line


def test_other_metrics_score_again_and_keep_the_images(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, prompts = finished
    folder = run(plan(grid(words(tmp_path, prompts, "method=none"))), "test")
    (cell,) = (p for p in folder.iterdir() if p.is_dir())
    times = {p: p.stat().st_mtime_ns for p in (cell / "images").iterdir()}
    run(plan(grid(words(tmp_path, prompts, "method=none", "~metrics.ssim_nearest"))), "test")
    assert {p: p.stat().st_mtime_ns for p in (cell / "images").iterdir()} == times
    assert not any("ssim_nearest" in r["scores"] for r in read_records(cell, "score").values())


def test_settings_that_change_the_result_have_another_folder(finished: tuple[Path, Path]) -> None:
    folder, prompts = finished

    def cell_of(*more: str) -> str:
        return plan(grid(words(folder.parent, prompts, "method=nemo", *more)))[0].id

    assert cell_of("batch_size=1") == cell_of("trainer.devices=2") == cell_of("logger=wandb") == cell_of()
    changes = ["seeds=3", "localize_seeds=4", "model.steps=4", "model.guidance=2", "method.theta=4"]
    assert len({cell_of(), *map(cell_of, changes)}) == len(changes) + 1


def test_a_folder_of_something_else_is_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, prompts = finished
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds no run of nemo_bench"):
        run(plan(grid(words(tmp_path, prompts, "method=none"))), "test")
    assert [p.name for p in (tmp_path / "default").iterdir()] == ["thesis.txt"]


def test_a_cell_written_by_another_configuration_is_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, prompts = finished
    cells = plan(grid(words(tmp_path, prompts, "method=none")))
    folder = run(cells, "test")
    path = folder / cells[0].id / "spec.json"
    path.write_text(path.read_text().replace('"seeds": 2', '"seeds": 5'))
    before = results(folder)
    with pytest.raises(StoreError, match=r"spec\.json .*not what its folder is named by: settings.seeds"):
        run(plan(grid(words(tmp_path, prompts, "method=none"))), "test")
    assert results(folder) == before


def test_the_same_id_in_two_files_is_an_error(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, prompts = finished
    with pytest.raises(Exception, match="two files have a prompt with id"):
        plan(grid([*SMALL, f"root={tmp_path}", f"prompts.files=[{prompts},{prompts}]"]))


def test_prompts_without_a_finite_memorization_score_are_counted_and_left_out_of_detection() -> None:
    cell = SimpleNamespace(is_mitigated=False, originals=[Prompt("a", "a", "VM"), Prompt("b", "b")])
    measured = [MemorizationRecord(id=name, prompt=name, score=score) for name, score in (("a", 0.9), ("b", 0.1))]

    def detected(*more: MemorizationRecord) -> Roc:
        return _detection(cell, [*measured, *more])["memorization"]  # type: ignore[arg-type]

    assert detected().auc == 1
    assert detected().failed == 0
    cell.originals.append(Prompt("c", "c", "VM"))
    lost = detected(MemorizationRecord(id="c", prompt="c", failed="noise differences are not finite"))
    assert (lost.auc, lost.failed) == (1, 1)
