"""Live tracking: W&B's own reader, Lightning's files, and loggers that fail or hang, while a run goes on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_bench.cli import main
from nemo_bench.config import LoggerSettings
from nemo_bench.errors import ConfigError
from nemo_bench.metrics import detection
from nemo_bench.records.io import read_file
from nemo_bench.records.schema import DetectionRecord, ImageRecord, Progress, ScoreRecord, Summary, Tracked
from nemo_bench.records.store import read_records, read_starts
from nemo_bench.tracking import lightning_logs, live, wandb_runs
from nemo_bench.tracking.live import Live
from offline_run import OfflineRun
from small_runs import small
from wandb_server import WandbServer

KEY = "0123456789" * 4
METHODS = {"a": "nemo"}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_runs, "FLUSH", 0.2)


@pytest.fixture
def early(nemo: Path) -> Path:
    """The cell before it has any image; what it lacks is in a folder beside its records."""
    (nemo / "later").mkdir()
    for path in [*(nemo / "records").glob("generate.*"), *(nemo / "records").glob("score.*")]:
        path.rename(nemo / "later" / path.name)
    return nemo


def catch_up(cell: Path, stage: str) -> None:
    """Puts the records of a stage where they belong."""
    for path in (cell / "later").glob(f"{stage}.*"):
        path.rename(cell / "records" / path.name)


def progress(stage: str, done: int, total: int, **more: Any) -> Progress:
    return Progress(stage=stage, label="nemo", done=done, total=total, **{"seconds": 2.0, "computed": done, **more})


def history(run: OfflineRun) -> list[dict[str, Any]]:
    return [step["item"] for step in run.contents("history")]


def rows(cell: Path) -> list[dict[str, str]]:
    with (cell / "csv" / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def read_until(cell: Path, key: str) -> OfflineRun:
    """Reads a W&B run that is under way, once it shows a key."""
    while True:
        if list(cell.glob("wandb/offline-run-*/*.wandb")):
            run = OfflineRun(cell)
            if any(key in item for item in history(run)):
                return run
        time.sleep(0.2)


@pytest.mark.timeout(240)
def test_a_wandb_run_holds_what_is_known_in_the_middle_and_everything_at_the_end(early: Path) -> None:
    count = sum(path.read_text().count("\n") for path in (early / "records").iterdir())
    with Live(LoggerSettings(wandb=True, mode="offline"), METHODS) as tracker:
        tracker.begin(early)
        tracker.note(progress("memorization", 3, 3, row_passes=30.0))
        catch_up(early, "generate")
        tracker.note(progress("generate", 4, 6))
        catch_up(early, "score")
        tracker.note(progress("score", 2, 3))
        middle = read_until(early, "live/mean/ssim")
        assert not middle.contents("exit")
        (start,) = middle.contents("run")
        assert start["notes"] == read_starts(early)[-1].command
        assert middle.config.items() >= json.loads((early / "spec.json").read_text()).items()
        assert read_file(early / "tracked.json", Tracked).results == ""
        begun, *figures = (item for item in history(middle) if "live/stage" in item)
        assert begun["live/stage"] == "begin"
        assert [item["live/stage"] for item in figures] == ["memorization", "generate", "score"]
        images, scores = read_records(early, ImageRecord).values(), read_records(early, ScoreRecord).values()
        assert [item["live/records"] for item in figures] == [
            count, count + len(images), count + len(images) + len(scores),
        ]  # fmt: skip
        assert figures[0]["live/row_passes_per_second"] == 15
        assert (figures[1]["live/images_per_second"], figures[1]["live/seconds_left"]) == (2, 1)
        assert figures[1]["live/failed_images"] == 0
        ssim = fmean(record.scores["ssim"] for record in scores if "ssim" in record.scores)
        assert figures[2]["live/mean/ssim"] == pytest.approx(ssim)
        (sheet,) = (item for item in history(middle) if "live/samples.captions" in item)
        assert sheet["live/samples.captions"] == [f"{record.prompt}, seed {record.seed}" for record in images]
        assert all((middle.folder / "files" / name).is_file() for name in sheet["live/samples.filenames"])
        tracker.end()
    end = OfflineRun(early)
    assert end.folder == middle.folder
    assert end.contents("exit")[0]["exit_code"] == 0
    assert end.contents("stats")  # W&B's own figures of the machine
    assert history(end)[: len(history(middle))] == history(middle)
    assert "prompts.path" in history(end)[-1]
    aggregates = read_file(early / "metrics.json", Summary).aggregates
    assert end.summary["VM/ssim/mean"] == aggregates["VM"]["ssim"].mean
    assert len(end.artifacts("records")) == 1
    steps = [item["_step"] for item in history(end)]
    assert steps == sorted(set(steps))
    tracked = read_file(early / "tracked.json", Tracked)
    assert tracked.results
    assert tracked.id == start["run_id"]


def test_scoring_again_is_logged_as_it_goes_and_the_rest_at_the_end(run: Path) -> None:
    (nemo,), (plain,) = run.glob("*__nemo__*"), run.glob("*__none__*")
    (nemo / "scoring.json").unlink()  # by which its scores are stale
    assert main(["score", str(run), "logger=csv", "trainer=cpu"]) == 0
    begun, *figures, last = rows(nemo)
    assert begun["live/stage"] == "begin"
    assert {row["live/stage"] for row in figures} == {"score"}
    assert last["VM/ssim/mean"]
    (row,) = rows(plain)
    assert row["VM/ssim/mean"]


@pytest.mark.timeout(240)
def test_detectors_that_share_passes_are_logged_as_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(live, "SHORTEST", 0.0)
    monkeypatch.setattr(live, "LONGEST", 0.0)
    prompts = [
        {"id": "a", "text": "a red fox", "kind": "VM"}, {"id": "b", "text": "a map"}, {"id": "c", "text": "an oak"},
    ]  # fmt: skip
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    words = [
        "detector=magnitude_first,bright_ending", "detector.seeds=1", "model.steps=2", "batch_size=1", "trainer=cpu",
        f"prompts.files=[{tmp_path / 'three.jsonl'}]", f"root={tmp_path}", "logger=all", "logger.mode=offline",
    ]  # fmt: skip
    assert main(["detect", "--quiet", *words]) == 0
    cells = sorted(tmp_path.glob("default/planted__*"))
    assert len(cells) == 2
    for cell in cells:
        begun, *figures, last = rows(cell)
        assert begun["live/stage"] == "begin"
        assert [(row["live/stage"], row["live/done"], row["live/total"]) for row in figures] == [
            ("detect", str(done), "3") for done in (1, 2, 3)
        ]
        assert all(float(row["live/records_per_second"]) > 0 for row in figures)
        assert figures[0].keys() >= {"live/seconds_left", "live/row_passes_per_second"}
        records = read_records(cell, DetectionRecord).values()
        scores = [record.score for record in records if record.score is not None]
        assert float(figures[-1]["live/mean/score"]) == pytest.approx(fmean(scores))
        assert "live/auc" not in figures[0]
        (name, roc), *_ = read_file(cell / "metrics.json", Summary).detection.items()
        assert float(figures[-1]["live/auc"]) == pytest.approx(roc.auc) == float(last[f"detection/{name}/auc"])
        tracked = OfflineRun(cell)
        assert tracked.contents("exit")[0]["exit_code"] == 0
        logged = history(tracked)
        assert [item["live/done"] for item in logged if "live/done" in item] == [1, 2, 3]
        assert tracked.summary[f"detection/{name}/auc"] == pytest.approx(roc.auc)
        assert any("live/samples.captions" in item for item in logged) == (name == "bright_ending")
        steps = [item["_step"] for item in logged]
        assert steps == sorted(set(steps))
        events = EventAccumulator(str(cell / "tensorboard")).Reload()
        assert [event.value for event in events.Scalars("live/done")] == [1, 2, 3]
        assert events.Scalars(f"detection/{name}/auc")[0].value == pytest.approx(roc.auc)
    assert not [line for line in said if "failed" in line]


@given(*[st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6)] * 2)
def test_the_running_auc_is_that_of_the_table(memorized: list[float], other: list[float]) -> None:
    assert live.auc(memorized, other) == pytest.approx(detection(memorized, other)["auc"])


@pytest.mark.timeout(240)
def test_stopped_and_resumed_elsewhere_it_stays_one_run_whose_steps_grow(early: Path, tmp_path: Path) -> None:
    settings = LoggerSettings(wandb=True, csv=True, tensorboard=True, mode="offline")
    with suppress(KeyboardInterrupt), Live(settings, METHODS) as tracker:
        tracker.begin(early)
        catch_up(early, "generate")
        tracker.note(progress("generate", 6, 6))
        raise KeyboardInterrupt
    stopped = OfflineRun(early)
    assert stopped.contents("exit")[0]["exit_code"] == 1
    before = rows(early)
    moved = Path(shutil.copytree(early.parent, tmp_path / "elsewhere" / "default")) / early.name
    shutil.rmtree(early.parent)
    catch_up(moved, "score")
    with Live(settings, METHODS) as tracker:
        tracker.begin(moved)
        tracker.note(progress("score", 3, 3))
        tracker.end()
    first, second = sorted(moved.glob("wandb/offline-run-*"), key=lambda path: path.name)
    resumed = OfflineRun(moved)
    assert resumed.folder == max((first, second), key=lambda path: path.stat().st_mtime_ns)
    (one,), (two,) = (run.contents("run") for run in (stopped, resumed))
    assert one["run_id"] == two["run_id"]
    steps = [item["_step"] for run in (stopped, resumed) for item in history(run)]
    assert steps == sorted(set(steps))
    after = rows(moved)
    assert after[: len(before)] == before
    assert [int(row["step"]) for row in after] == sorted({int(row["step"]) for row in after})
    assert after[-1]["VM/ssim/mean"]
    events = EventAccumulator(str(moved / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    shown = {int(row["step"]): float(row["live/records"]) for row in after if "live/records" in row}
    assert {event.step: event.value for event in events.Scalars("live/records")} == shown
    assert "live/mean/ssim" in events.Tags()["scalars"]
    assert events.Images("live/samples")
    assert events.Scalars("VM/ssim/mean")[-1].step == int(after[-1]["step"])


def test_figures_come_at_new_stages_at_their_ends_and_now_and_then(
    early: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "SHORTEST", 1e9)
    monkeypatch.setattr(live, "LONGEST", 1e9)
    with Live(LoggerSettings(csv=True), METHODS) as tracker:
        tracker.note(progress("localize", 1, 9))  # of no cell that is logged
        tracker.begin(early)
        for done in range(1, 10):
            tracker.note(progress("localize", done, 9))
    assert [row.get("live/done") for row in rows(early)] == [None, "1", "9"]


def test_forgotten_scores_do_not_count_and_torn_or_damaged_lines_stop_nothing(early: Path, said: list[str]) -> None:
    scores = early / "records" / "score.0.jsonl"
    with Live(LoggerSettings(csv=True), METHODS) as tracker:
        scores.write_text('{"id": "a", "prompt": "p", "scores": {"ssim": 1.0}}\n{"id": "b", "sco')
        tracker.begin(early)
        scores.unlink()
        lines = ['{"id": "a", "prompt": "p", "scores": {"ssim": 0.25}}', "damaged", '{"id": "b", "scores": {}}']
        scores.write_text("".join(f"{line}\n" for line in lines))
        tracker.note(progress("score", 3, 3))
    assert [row.get("live/mean/ssim") for row in rows(early)] == ["1.0", "0.25"]
    assert not [line for line in said if "failed" in line]


def test_a_logger_that_raises_is_said_once_and_the_others_log(
    early: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*values: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(lightning_logs.TensorBoardLog, "log", fail)
    with Live(LoggerSettings(csv=True, tensorboard=True), METHODS) as tracker:
        tracker.begin(early)
        for stage in ("localize", "memorization", "generate"):
            tracker.note(progress(stage, 1, 2))
        (early / "step.json").unlink()
        (early / "step.json").mkdir()  # not even the steps can be kept
        tracker.note(progress("score", 1, 2))
    assert len(rows(early)) == 4
    failures = [line for line in said if "failed" in line]
    assert failures == [
        f"tensorboard failed: no space; the results are untouched, nemo-bench track {early.parent} tries again"
    ]
    assert [line for line in said if line.startswith("live tracking:")]


def test_a_logger_that_hangs_is_not_waited_for(early: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(lightning_logs.CsvLog, "begin", lambda *values: released.wait() and None)
    monkeypatch.setattr("nemo_bench.tracking.live._WAITING", 8)
    with Live(LoggerSettings(csv=True, tensorboard=True, timeout=1), METHODS) as tracker:
        while not any("behind" in line for line in said):
            tracker.begin(early)
            tracker.note(progress("generate", 1, 2))
            time.sleep(0.2)
    released.set()
    why = [line.partition(";")[0] for line in said if "failed" in line]
    assert why == ["csv failed: it is behind by several cells", "csv failed: it did not end within 1 s"]
    assert list(early.glob("tensorboard/events*"))


def test_a_sweep_agent_gets_the_figures_of_its_trial_alone(
    run: Path, nemo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "trial456")
    (none,) = run.glob("*__none__*")
    begun: list[dict[str, Any]] = []

    def note(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(offline=True, step=0, log=lambda *values, **more: None, finish=lambda exit_code: None)

    monkeypatch.setattr(wandb, "init", note)
    with Live(LoggerSettings(wandb=True, mode="offline"), {none.name: "none", nemo.name: "nemo"}) as tracker:
        for cell in (none, nemo):
            tracker.begin(cell)
            tracker.note(progress("generate", 1, 2))
            tracker.give_up()
    (options,) = begun
    assert options["dir"] == nemo
    assert "id" not in options
    assert read_file(nemo / "tracked.json", Tracked).id == "trial456"
    with pytest.raises(ConfigError, match="asks for one cell"):
        Live(LoggerSettings(wandb=True), {"a": "nemo", "b": "random"})


def run_online(finished: Path, root: Path, url: str, methods: str) -> subprocess.CompletedProcess[str]:
    """Runs two prompts with W&B online at a server, in a process of its own."""
    place = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}
    prompts = read_starts(next(finished.glob("*__none__*")))[-1].settings["prompts"]["files"]
    words = [
        *small(seeds=1, steps=2), f"prompts.files={json.dumps(prompts)}", f"method={methods}",
        f"root={root}", "logger=wandb", "logger.csv=true", "logger.timeout=2",
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "nemo_bench.cli", "run", "--json", *words],
        capture_output=True, text=True, timeout=380, check=False, env={**os.environ, **place},
    )  # fmt: skip


@pytest.mark.timeout(400)
def test_a_server_that_never_answers_costs_a_run_nothing_and_no_file_has_the_key(
    finished: Path, port: int, tmp_path: Path
) -> None:
    done = run_online(finished, tmp_path, f"http://127.0.0.1:{port}", "none,random_tokens")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb failed") == 2  # once a cell
    assert "Traceback" not in done.stderr
    assert len(json.loads(done.stdout)["rows"]) > 2
    assert all(rows(cell)[-1]["all/ssim_nearest/mean"] for cell in tmp_path.glob("default/*__*"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("silently", [False, True])
def test_a_network_lost_in_the_middle_of_a_run_costs_it_nothing(finished: Path, tmp_path: Path, silently: bool) -> None:
    server = WandbServer(silently=silently)
    try:
        done = run_online(finished, tmp_path, server.url, "none")
    finally:
        server.close()
    assert server.gone.is_set()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb failed") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert len(json.loads(done.stdout)["rows"]) > 2
    (cell,) = tmp_path.glob("default/*__none__*")
    assert rows(cell)[-1]["all/ssim_nearest/mean"]
    tracked = read_file(cell / "tracked.json", Tracked)
    assert server.begun == [tracked.id]
    assert tracked.results == ""  # so that track tries again
