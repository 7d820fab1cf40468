"""How far a stage is, as lines and for those who listen."""

from __future__ import annotations

import re

import pytest

from nemo_bench.benchmark.progress import ProgressReport, line
from nemo_bench.benchmark.runner import Runner
from nemo_bench.benchmark.stages.base import Stage
from nemo_bench.config import TrainerSettings
from nemo_bench.prompts.data import Counters
from nemo_bench.records.schema import Cost, ImageRecord, Progress, Record


def record(failed: str | None = None) -> ImageRecord:
    image = None if failed else "images/a.png"
    return ImageRecord(id="a", prompt="a", seed=0, image=image, failed=failed, cost=Cost(row_passes=8.0))


def test_records_of_all_processes_are_counted_and_only_the_first_one_tells(said: list[str]) -> None:
    counters = Counters()
    first, second = ProgressReport(counters, show=False), ProgressReport(counters, show=False)
    heard: list[Progress] = []
    first.listeners.append(heard.append)
    second.listeners.append(heard.append)
    for report in (first, second):
        report.begin("stage 0", "generate", "none", done=4, total=10)
    first.add([record()], 1, is_main=True)
    second.add([record(), record()], 2, is_main=False)
    first.add([record("not finite")], 1, is_main=True)
    assert [(p.done, p.computed, p.failed, p.row_passes) for p in heard] == [(5, 1, 0, 8.0), (8, 4, 1, 16.0)]
    assert said == []


def test_what_another_run_did_meanwhile_counts_as_done_but_not_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    counters = Counters()
    first, second = ProgressReport(counters, show=False), ProgressReport(counters, show=False)
    heard: list[Progress] = []
    first.listeners.append(heard.append)
    for report in (first, second):
        report.begin("stage 0", "generate", "none", done=4, total=20)
    now[0] = 2.0
    first.add([record()], 1, is_main=True)
    first.skip(3)
    second.skip(2)
    now[0] = 4.0
    first.add([record()], 1, is_main=True)
    assert [(p.done, p.rate, p.left) for p in heard] == [(5, 0.5, 30.0), (11, 0.5, 18.0)]


def test_a_stage_counts_batches_that_it_leaves_out() -> None:
    runner = Runner(TrainerSettings(accelerator="cpu", devices=1), progress=False)
    heard: list[Progress] = []
    runner.progress.listeners.append(heard.append)
    stage = Stage(lambda *_: [], Record, None)
    runner.predict(stage, [["a"], ["b", "c"], ["d"]], "none", done=5, is_pending=lambda batch: batch != ["b", "c"])
    assert [(p.done, p.computed, p.total) for p in heard] == [(6, 1, 9), (9, 2, 9)]


def test_lines_come_at_growing_distance_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    report = ProgressReport(Counters())
    report.begin("stage 0", "generate", "none", done=0, total=10_000)
    moments = []
    for second in range(1, 4001):
        now[0] = float(second)
        report.add([record()], 1, is_main=True)
        if len(said) > len(moments):
            moments.append(second)
    assert moments == [10, 20, 40, 80, 160, 320, 640, 1240, 1840, 2440, 3040, 3640]
    assert re.fullmatch(r"\d\d:\d\d:\d\d generate none: 10 of 10,000, 1\.0 a second, 2:46:30 left", said[0])


def test_slow_stages_say_how_long_each_takes() -> None:
    progress = Progress(stage="localize", label="nemo", done=2, total=4, seconds=30, computed=2)
    assert line(progress) == "localize nemo: 2 of 4, 15.0 s each, 0:00:30 left"


def test_a_terminal_gets_one_bar_over_all_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    report = ProgressReport(Counters())
    report.begin("stage 0", "generate", "none", done=4, total=10)
    report.add([record()] * 6, 6, is_main=True)
    report.end()
    assert "generate none" in capsys.readouterr().err
    assert said == []
