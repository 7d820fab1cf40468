"""Which cell comes next, what happens to those that fail, and several runs on one folder."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_bench import ModelError, resolve
from nemo_bench.benchmark.pending import is_complete
from nemo_bench.benchmark.plan import Cell, plan
from nemo_bench.benchmark.run import log_file, run
from nemo_bench.benchmark.runner import Runner
from nemo_bench.benchmark.status import read_status
from nemo_bench.benchmark.work import Work, in_order
from nemo_bench.cli import main
from nemo_bench.config import grid
from nemo_bench.errors import NemoBenchError
from nemo_bench.records import lease, schema
from nemo_bench.records.lease import Leases, read_lease
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import ImageRecord, MemorizationRecord, Progress
from on_disk import read_json, read_records
from owned_writes import watch_writes
from small_runs import small

METHODS = "method=random_tokens,none,embedding_noise"
WORDS = [
    *small(seeds=2, steps=2),
    f"prompts.files=[{resolve('package:planted/prompts/planted.jsonl')}]",
    "prompts.limit=2",
]


def words(root: Path, *more: str) -> list[str]:
    return [*WORDS, f"root={root}", *more]


def cells_of(root: Path, *more: str) -> list[Cell]:
    return plan(grid(words(root, *more)))


def names(cells: list[Cell]) -> list[str]:
    return [str(cell.spec.method) for cell in cells]


def images(folder: Path) -> dict[str, Any]:
    cells = sorted(folder.glob("*__*"))
    return {
        f"{cell.name}/{name}": record["sha256"]
        for cell in cells
        for name, record in read_records(cell, "generate").items()
    }


def test_cells_come_after_those_that_they_start_from_or_are_compared_with(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "method=random,one_edit,nemo,none")
    assert names(in_order(cells)) == ["nemo", "none", "random", "one_edit"]
    # A source that nobody asked for is localized before all others.
    assert names(in_order(cells_of(tmp_path, "method=random,none"))) == ["nemo", "none", "random"]


def test_a_shard_has_every_nth_cell_and_what_these_start_from(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "method=random,one_edit,nemo,none")
    parts = [names(Work(cells, Leases(), (number, 2)).pending) for number in (1, 2)]
    assert parts == [["nemo", "none", "random"], ["nemo", "none", "one_edit"]]


def test_what_another_run_holds_is_left_to_it_and_what_waits_for_that_too(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, METHODS)
    (none,) = (cell for cell in cells if cell.spec.method == "none")
    first, second = Work(cells, Leases()), Work(cells, Leases())
    assert first.take() is none
    assert second.take() is None  # the others are compared with it
    assert set(second.pending) == set(cells)
    assert set(second._needs(cells[0])) == {none}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(cells_of(tmp_path_factory.mktemp("work"), METHODS), "test", progress=False)


def test_a_finished_run_has_no_open_cells_no_leases_and_a_log(finished: Path) -> None:
    cells = cells_of(finished.parent, METHODS)
    assert Work(cells, Leases()).pending == []
    assert is_complete(cells)
    assert not list(finished.glob("**/.lease*"))
    assert (finished / "run.log").is_file()


def test_the_status_of_a_run_says_how_far_each_cell_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "default"
    shutil.copytree(finished, folder)
    first, second, third = (cell.name for cell in load_results(folder).cells)
    records = next((folder / first / "records").glob("generate.*"))
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:-1]))
    (folder / first / "score.done").unlink()
    leases = Leases()
    assert leases.claim(folder / first)
    (folder / second / "score.done").unlink()
    failure = {"time": "", "host": "a", "pid": 1, "error": "no memory", "log": "run.log"}
    (folder / second / "failure.json").write_text(json.dumps(failure))
    found = {status.cell: status for status in read_status(folder)}
    leases.release_all()
    assert (found[first].state, found[second].state, found[third].state) == ("running", "failed", "finished")
    assert (found[first].done, found[first].total) == (7, 8)
    assert "since" in found[first].owner
    assert found[second].failure == "no memory"
    assert found[third].done == found[third].total
    assert main(["status", str(folder)]) == 0
    assert "1 failed" in capsys.readouterr().out
    assert main(["status", str(folder), "--json"]) == 0


def test_a_cell_that_fails_does_not_stop_the_others_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Runner.generate

    def fail(self: Runner, cell: Cell) -> None:
        if cell.spec.method == "random_tokens":
            raise ModelError("no such layer")
        generate(self, cell)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "generate", fail)
        assert main(["run", *words(tmp_path, METHODS), "--verbose"]) == 1
    shown = capsys.readouterr()
    assert shown.err.endswith("\nnemo-bench: no such layer\n")
    assert "Traceback" in shown.out
    folder = tmp_path / "default"
    results = load_results(folder)
    assert sorted(cell.method for cell in results.cells) == ["embedding_noise", "none"]
    (failed,) = folder.glob("*__random_tokens__*")
    assert read_json(failed / "failure.json")["error"] == "no such layer"
    assert "no such layer" in (folder / "run.log").read_text()
    assert "no such layer" in {status.failure for status in read_status(folder)}
    assert main(["run", *words(tmp_path, METHODS)]) == 0
    assert not (failed / "failure.json").exists()
    assert len(load_results(folder).cells) == 3


def test_cells_that_start_from_a_failed_one_fail_as_well_and_all_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Runner, cell: Cell) -> None:
        raise ModelError(f"{cell.spec.method} does not load")

    monkeypatch.setattr(Runner, "generate", fail)
    cells = cells_of(tmp_path, METHODS)
    caplog.set_level(logging.WARNING, "nemo_bench")
    with pytest.raises(NemoBenchError, match=r"3 cells failed, see .*run\.log") as error:
        run(cells, "test", progress=False)
    assert str(error.value).count("it needs ") == 2
    assert str(error.value).count("none does not load") == 1
    written = (tmp_path / "default" / "run.log").read_text()
    assert "Traceback" in written
    assert "ModelError: none does not load" in written


def test_what_another_run_gave_up_meanwhile_is_not_tried_again(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "method=none")
    first, second = Work(cells, Leases()), Work(cells, Leases())
    (cell,) = cells
    assert first.take() is cell
    first.give_up(cell, ModelError("no memory"))
    assert second.take() is None
    with pytest.raises(NemoBenchError, match="another run gave it up: no memory"):
        second.check()
    # But by a run that begins later; that it succeeds is no failure to those that began as well.
    third, fourth = Work(cells, Leases()), Work(cells, Leases())
    assert third.take() is cell
    third.finish(cell)
    assert fourth.take() is cell


def test_a_run_writes_into_its_folder_only_as_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, others = watch_writes(monkeypatch, tmp_path / "default")
    run(cells_of(tmp_path, "method=none", "prompts.limit=1"), "test", progress=False)
    assert {"run.json", "report.html", "leaderboard.json"} <= held
    assert not others


def test_two_runs_at_once_share_the_cells_and_end_with_the_records_of_one(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemo_bench.cli", "run", *words(tmp_path, METHODS)]
    shared: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: with others numbers round otherwise
    runs = [subprocess.Popen(command, env=one_thread, **shared) for _ in range(2)]
    said = [process.communicate(timeout=280)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], said
    folder = tmp_path / "default"
    assert images(folder) == images(finished)
    for cell in folder.glob("*__*"):
        for stage in ("memorization", "generate", "score"):
            lines = [line for path in cell.glob(f"records/{stage}.*") for line in path.read_text().splitlines()]
            assert len(lines) == len(read_records(cell, stage))
    assert not list(folder.glob("**/.lease*"))


def test_a_run_without_work_assists_one_that_has_long_to_go(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells_of(tmp_path, "method=none")
    cell.store.open(cell.spec)
    (cell.store.folder / "layers.json").write_text("{}")
    owner, runner = Leases(), Runner(cell.config.settings.trainer, progress=False)
    assert owner.claim(cell.store.folder)
    work = Work([cell], Leases())
    assert work.assist() is None
    runner.make(MemorizationRecord, cell)
    monkeypatch.setattr(lease, "BEAT", 0.01)
    for left, expected in ((60.0, None), (600.0, (cell, ImageRecord))):
        owner.note(Progress(stage="generate", label="none", done=0, total=2, computed=1, seconds=left / 2))
        assert work.take() is None
        deadline = time.monotonic() + 60
        while work.assist() != expected:
            assert time.monotonic() < deadline
    runner.make(ImageRecord, cell, assisting=True)
    assert not cell.store.is_done(ImageRecord)  # which is for the owner to count
    owner.release_all()
    assert main(["run", *words(tmp_path, "method=none")]) == 0
    of_none = {name: sha for name, sha in images(finished).items() if "__none__" in name}
    assert images(tmp_path / "default") == of_none


def test_a_cell_in_the_form_of_an_older_program_is_not_assisted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells_of(tmp_path, "method=none")
    cell.store.open(cell.spec)
    owner = Leases()
    assert owner.claim(cell.store.folder)
    monkeypatch.setattr(lease, "BEAT", 0.01)
    owner.note(Progress(stage="generate", label="none", done=0, total=2, computed=1, seconds=300))
    deadline = time.monotonic() + 60
    while (held := read_lease(cell.store.folder)) is None or held.progress is None:
        assert time.monotonic() < deadline
    with monkeypatch.context() as patch:
        patch.setattr(schema, "VERSION", 2)
        patch.setattr(schema, "UPGRADES", {1: lambda name, content: content})
        assert Work([cell], Leases()).assist() is None
    assert Work([cell], Leases()).assist() == (cell, ImageRecord)
    owner.release_all()


def test_messages_for_debugging_go_to_the_file_of_a_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = io.StringIO()
    console = logging.StreamHandler(shown)
    monkeypatch.setattr(logging.getLogger(), "handlers", [console])
    monkeypatch.setattr(logging.getLogger("nemo_bench"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("nemo_bench"), "propagate", True)
    caplog.set_level(logging.NOTSET, "nemo_bench")
    caplog.set_level(logging.DEBUG, "nemo_benchmark")  # another package
    with log_file(tmp_path):
        for name in ("nemo_bench.benchmark", "nemo_benchmark"):
            logging.getLogger(name).debug("details of %s", name)
            logging.getLogger(name).warning("news of %s", name)
    assert shown.getvalue().splitlines() == [
        "news of nemo_bench.benchmark", "details of nemo_benchmark", "news of nemo_benchmark"
    ]  # fmt: skip
    assert console.filters == []
    written = [line.split(maxsplit=5)[-1] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert written == ["details of nemo_bench.benchmark", "news of nemo_bench.benchmark"]


def test_the_cell_of_a_killed_run_is_continued_at_once(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemo_bench.cli", "run", *words(tmp_path, "method=none", "batch_size=1")]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "default"
    while killed.poll() is None and not list(folder.glob("*/records/generate.*")):
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert list(folder.glob("*__none__*/.lease.0.json"))
    assert main(command[3:]) == 0
    assert not list(folder.glob("**/.lease*"))
    assert load_results(folder).cells[0].summary.counts["images"] == 4
