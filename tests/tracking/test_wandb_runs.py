"""W&B: real offline runs, read back by W&B's own reader."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from fake_results import change_file
from nemo_bench.cli import main
from nemo_bench.config import LoggerSettings
from nemo_bench.errors import ConfigError, TrackingError
from nemo_bench.records.data import Neurons
from nemo_bench.records.io import read_file, write_json
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Layers, Roc, Run, ScoreRecord, Summary, Tracked
from nemo_bench.records.store import read_localizations, read_records, read_starts
from nemo_bench.tracking import sweep_trial, track
from nemo_bench.tracking.logged import PICTURES
from offline_run import OfflineRun

SETTINGS = LoggerSettings(wandb=True, mode="offline")
PROMPTS = ["vm-01", "tm-26", "general-01"]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Lets pytest not repeat wandb's own log at a failure."""
    caplog.set_level(logging.WARNING, "wandb")


def logged_run(cell: Path, **settings: Any) -> OfflineRun:
    track_cell(cell, LoggerSettings(wandb=True, mode="offline", **settings))
    return OfflineRun(cell)


def track_cell(cell: Path, settings: LoggerSettings, **options: Any) -> None:
    track(load_results(cell.parent), settings, cells=[cell.name], **options)


def rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_a_cell_is_a_run_with_the_spec_as_config(nemo: Path) -> None:
    run = logged_run(nemo, project="mine", entity="us")
    (start,) = run.contents("run")
    assert start["job_type"] == "benchmark"
    assert (start["project"], start["entity"]) == ("mine", "us")
    assert (start["run_group"], start["display_name"]) == ("default", nemo.name)
    assert start["tags"] == ["planted", "nemo", "three"]
    last = read_starts(nemo)[-1]
    assert start["notes"] == last.command
    assert run.config.items() >= json.loads((nemo / "spec.json").read_text()).items()
    assert run.config["versions"] == last.versions
    assert {"torch", "diffusers", "nemo-bench"} <= set(run.config["versions"])
    assert run.config["digests"]["model"]
    assert run.config["start"]["settings"] == last.settings
    assert run.contents("exit")[0]["exit_code"] == 0


def test_the_summary_is_the_row_of_the_leaderboard_and_the_means_are_charted(nemo: Path) -> None:
    run, summary = logged_run(nemo), read_file(nemo / "metrics.json", Summary)
    for group, row in summary.aggregates.items():
        for metric, numbers in row.items():
            for kind in ("mean", "low", "high", "median", "mad", "prompts"):
                if (value := getattr(numbers, kind)) is not None:
                    assert run.summary[f"{group}/{metric}/{kind}"] == pytest.approx(value)
            assert run.history[f"{group}/{metric}/mean"] == pytest.approx(numbers.mean)
    for name, value in summary.cost.items():
        assert run.summary[f"cost/{name}"] == pytest.approx(value)


def test_the_table_shows_every_prompt_with_pictures_scores_and_neurons(nemo: Path) -> None:
    run = logged_run(nemo)
    table = rows(run.table("prompts"))
    assert [row["prompt"] for row in table] == PROMPTS
    assert [row["group"] for row in table] == ["VM", "TM", "general"]
    assert all(row[picture] == "Image" for row in table[:2] for picture in PICTURES)
    assert table[2]["training image"] is None
    localized = read_localizations(nemo)
    assert all(Neurons(json.loads(row["neurons by layer"])) == localized[row["prompt"]].neurons for row in table)
    scores = [
        record.scores["ssim"]
        for record in read_records(nemo, ScoreRecord).values()
        if record.prompt == "vm-01" and "ssim" in record.scores
    ]
    assert table[0]["ssim"] == pytest.approx(sum(scores) / 2)
    assert table[2]["ssim"] is None
    (logged,) = (a for a in run.artifacts("run_table") if "prompts.table.json" in a["files"])
    files = {name: Path(file["local_path"]) for name, file in logged["files"].items()}
    assert all(path.is_relative_to(nemo / "wandb") for path in files.values())
    shown = rows(json.loads(files["prompts.table.json"].read_text()))
    (none,) = nemo.parent.glob("*__none__*")
    reference = json.loads((nemo / "prompts.jsonl").read_text().splitlines()[0])["references"][0]
    expected = (reference, none / "images/vm-01_00.png", nemo / "images/vm-01_00.png", nemo / "noise/vm-01.png")
    for name, path in zip(PICTURES, expected, strict=True):
        assert pixels(files[shown[0][name]["path"]]) == pixels(Path(path))


def pixels(path: Path) -> tuple[tuple[int, int], bytes]:
    with Image.open(path) as image:
        return image.size, image.convert("RGB").tobytes()


def test_only_so_many_prompts_are_shown_with_pictures(nemo: Path) -> None:
    first, second, third = rows(logged_run(nemo, thumbnails=1).table("prompts"))
    assert [first[picture] for picture in PICTURES] == ["Image"] * 4
    assert [row[picture] for row in (second, third) for picture in PICTURES] == [None] * 8


def test_charts_hold_what_the_records_hold(nemo: Path) -> None:
    run, aggregates = logged_run(nemo), read_file(nemo / "metrics.json", Summary).aggregates
    found = {prompt: localization.neurons for prompt, localization in read_localizations(nemo).items()}
    counts = {prompt: sum(map(len, layers.values())) for prompt, layers in found.items()}
    table = rows(run.table("neurons/per_prompt_table"))
    assert {row["prompt"]: row["neurons"] for row in table} == counts
    layers = rows(run.table("neurons/per_layer_table"))
    assert [row["width"] for row in layers] == list(read_file(nemo / "layers.json", Layers).values())
    assert layers[0]["layer"] == "down.0.0"
    assert sum(row["neurons"] for row in layers) == pytest.approx(sum(counts.values()) / 3)
    x, y = (run.charts["tradeoff/groups"]["fieldSettings"][axis] for axis in "xy")
    assert (x, y) == ("ssim", "alignment")
    means = {row["group"]: (row[x], row[y]) for row in rows(run.table("tradeoff/groups_table"))}
    assert means == {
        group: (pytest.approx(row[x].mean), pytest.approx(row[y].mean)) for group, row in aggregates.items() if x in row
    }
    assert [row["prompt"] for row in rows(run.table("tradeoff/prompts_table"))] == PROMPTS[:2]
    kinds = {key: chart["panelDefId"] for key, chart in run.charts.items() if not key.startswith("detection/")}
    assert kinds == {
        "tradeoff/groups": "wandb/scatter/v0",
        "tradeoff/prompts": "wandb/scatter/v0",
        "neurons/per_prompt": "wandb/histogram/v0",
        "neurons/per_layer": "wandb/bar/v0",
    }


def test_a_detector_has_its_curve(nemo: Path) -> None:
    numbers = ("auc", "auc_low", "auc_high", "average_precision", "best_accuracy")
    numbers += ("tpr_at_1_fpr_below", "tpr_at_1_fpr_nearest", "tpr_at_1_fpr_first")
    corners = [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    roc = Roc(title="Memorization score", **dict.fromkeys(numbers, 1.0), memorized=2, other=1, curve=corners)
    change_file(nemo / "metrics.json", Summary, detection={"memorization": roc})
    run = logged_run(nemo)
    assert run.summary["detection/memorization/auc"] == 1
    chart = run.charts["detection/roc/memorization"]
    assert chart["panelDefId"] == "wandb/area-under-curve/v0"
    assert chart["stringSettings"]["title"] == "ROC: Memorization score"
    curve = [(row["fpr"], row["tpr"]) for row in rows(run.table("detection/roc/memorization_table"))]
    assert curve == [(0, 0), (0, 1), (1, 1)]


def test_without_mitigation_there_are_no_neurons_to_chart(run: Path) -> None:
    (cell,) = run.glob("*__none__*")
    assert not [key for key in logged_run(cell).charts if key.startswith("neurons/")]


def test_one_artifact_holds_the_records_and_their_context(nemo: Path) -> None:
    (artifact,) = logged_run(nemo).artifacts("records")
    assert artifact["name"] == f"records-{nemo.name}"
    files = {path.relative_to(nemo).as_posix() for path in (nemo / "records").iterdir()}
    assert set(artifact["files"]) == files | {
        "spec.json", "metrics.json", "layers.json", "prompts.jsonl", "neurons.csv",
    }  # fmt: skip
    for name, entry in artifact["files"].items():
        content = (nemo / name).read_bytes()
        assert entry["digest"] == base64.b64encode(hashlib.md5(content).digest()).decode()
        assert Path(entry["local_path"]).read_bytes() == content
        assert Path(entry["local_path"]).is_relative_to(nemo / "wandb")


def test_unchanged_results_are_logged_once_and_changed_ones_continue_the_run(
    run: Path, nemo: Path, said: list[str]
) -> None:
    track(load_results(run), SETTINGS)
    first = OfflineRun(nemo)
    assert len(list(run.glob("*/wandb/offline-run-*"))) == 2
    track(load_results(run), SETTINGS)
    assert len(list(run.glob("*/wandb/offline-run-*"))) == 2
    assert "2 cells unchanged" in said[-1]
    write_json(nemo / "env.json", read_starts(nemo) * 2)
    track_cell(nemo, SETTINGS, again=True)
    again = OfflineRun(nemo)
    assert again.folder != first.folder
    assert again.contents("run")[0]["run_id"] == first.contents("run")[0]["run_id"]
    assert again.artifacts("records")[0]["digest"] == first.artifacts("records")[0]["digest"]
    aggregates = read_file(nemo / "metrics.json", Summary).aggregates
    aggregates["VM"]["ssim"] = aggregates["VM"]["ssim"].model_copy(update={"mean": 0.5})
    change_file(nemo / "metrics.json", Summary, aggregates=aggregates)
    track(load_results(run), SETTINGS)
    changed = OfflineRun(nemo)
    assert changed.summary["VM/ssim/mean"] == 0.5
    assert changed.contents("run")[0]["run_id"] == first.contents("run")[0]["run_id"]
    assert len(list(run.glob("*/wandb/offline-run-*"))) == 4


def test_another_project_or_mode_is_logged_as_well(nemo: Path) -> None:
    a, b = logged_run(nemo), logged_run(nemo, project="other")
    assert [r.contents("run")[0]["project"] for r in (a, b)] == ["nemo-bench", "other"]


def test_cells_and_runs_have_ids_of_their_own(run: Path) -> None:
    track(load_results(run), SETTINGS)
    ids = {read_file(path, Tracked).id for path in run.glob("*/tracked.json")}
    assert len(ids) == 2
    for path in run.glob("*/tracked.json"):
        path.unlink()
    change_file(run / "run.json", Run, token="another")
    track(load_results(run), SETTINGS)
    assert not ids & {read_file(path, Tracked).id for path in run.glob("*/tracked.json")}
    assert all(len(i) < 64 for i in ids)


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("odd"), wandb.errors.CommError("no"), TimeoutError()])
def test_whatever_wandb_raises_the_other_loggers_log(
    run: Path, nemo: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", fail)
        with pytest.raises(TrackingError, match=r"wandb failed.*nemo-bench track .* again"):
            track(load_results(run), LoggerSettings(wandb=True, csv=True, mode="offline"))
    assert (nemo / "csv" / "metrics.csv").is_file()
    assert not (nemo / "tracked.json").exists()
    assert logged_run(nemo).summary["VM/ssim/mean"]


@pytest.mark.parametrize("answers", [False, True])
def test_a_server_that_refuses_or_hangs_costs_a_timeout(run: Path, port: int, answers: bool) -> None:
    address = f"http://127.0.0.1:{port if answers else 9}"
    environment = {**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}
    words = [sys.executable, "-m", "nemo_bench.cli", "track", str(run), "logger.timeout=2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 1
    assert "the results are untouched" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(run.glob("*/tracked.json"))


def test_a_run_goes_on_where_wandb_is_absent(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')\n")
    search = os.pathsep.join([str(tmp_path), *sys.path])
    command = read_starts(next(finished.glob("*__none__*")))[-1].settings
    words = [
        "seeds=1", "localize_seeds=2", "model.steps=2", "trainer=cpu", "method=none", f"root={tmp_path}",
        f"prompts.files={json.dumps(command['prompts']['files'])}", "logger=all",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "nemo_bench.cli", "run", "--json", *words],
        capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "PYTHONPATH": search},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "wandb failed: no wandb here" in done.stderr
    assert json.loads(done.stdout)["rows"]
    assert list(tmp_path.glob("default/*/csv/metrics.csv"))


KEY = "a" * 40


def machine(name: str) -> str:
    """What ``wandb login`` writes into ``~/.netrc``."""
    return f"machine {name}\n  login user\n  password {KEY}\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new user of wandb: an empty home, nothing in the environment."""
    wandb.teardown()  # it reads its settings once a process
    os.environ.pop("WANDB_SERVICE", None)  # of the service that has ended: not to be put back
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wandb.sdk.wandb_setup._WandbSetup.ensure_service", lambda self: None)
    yield tmp_path
    wandb.teardown()


HOST = "https://wandb.example.org"
LOCAL = "http://localhost:8080"
DEFAULT = wandb.Settings().base_url
NO_KEY = "`wandb login` keeps one, or set WANDB_API_KEY"


@pytest.mark.parametrize(
    ("files", "environment", "expected"),
    [
        ({}, {}, f"offline, no key for {DEFAULT}; {NO_KEY}"),
        ({".netrc": machine("other")}, {}, f"offline, no key for {DEFAULT}; {NO_KEY}"),
        ({".netrc": machine("api.wandb.ai")}, {}, f"online, {DEFAULT}, key from netrc"),
        ({".netrc": machine(DEFAULT.split("/")[-1])}, {}, f"online, {DEFAULT}, key from netrc"),
        ({"own": machine("api.wandb.ai")}, {"NETRC": "own"}, f"online, {DEFAULT}, key from netrc"),
        ({}, {"WANDB_API_KEY": KEY}, f"online, {DEFAULT}, key from WANDB_API_KEY"),
        ({".netrc": machine("api.wandb.ai")}, {"WANDB_BASE_URL": HOST}, f"offline, no key for {HOST}; {NO_KEY}"),
        ({".netrc": machine("wandb.example.org")}, {"WANDB_BASE_URL": HOST}, f"online, {HOST}, key from netrc"),
        ({".netrc": machine("localhost:8080")}, {"WANDB_BASE_URL": LOCAL}, f"online, {LOCAL}, key from netrc"),
        (
            {".netrc": machine("localhost:8080"), ".config/wandb/settings": f"[default]\nbase_url = {LOCAL}\n"},
            {},
            f"online, {LOCAL}, key from netrc",
        ),
        (
            {".config/wandb/settings": f"[default]\nbase_url = {LOCAL}\napi_key = {KEY}\n"},
            {},
            f"online, {LOCAL}, key from wandb's settings",
        ),
        (
            {".netrc": machine("wandb.example.org"), "config/settings": f"[default]\nbase_url = {HOST}\n"},
            {"WANDB_CONFIG_DIR": "config"},
            f"online, {HOST}, key from netrc",
        ),
        (
            {".netrc": machine("api.wandb.ai"), "wandb/settings": "[default]\nmode = offline\n"},
            {},
            "offline, by wandb's settings file",
        ),
        ({".netrc": machine("api.wandb.ai")}, {"WANDB_MODE": "offline"}, "offline, by WANDB_MODE"),
        ({}, {"WANDB_MODE": "online", "WANDB_API_KEY": KEY}, f"online, {DEFAULT}, key from WANDB_API_KEY"),
        ({}, {"WANDB_MODE": "disabled"}, "disabled, by WANDB_MODE"),
    ],
)
def test_the_mode_follows_from_what_wandb_itself_finds_and_is_said(
    nemo: Path,
    home: Path,
    files: dict[str, str],
    environment: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    modes: list[str] = []

    def note(**options: Any) -> None:
        modes.append(options["mode"])
        raise RuntimeError("far enough")

    for name, content in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb, "init", note)
    with contextlib.suppress(TrackingError):
        track_cell(nemo, LoggerSettings(wandb=True))
    assert said == [f"W&B: {expected}"]
    assert modes == [mode for mode in ("online", "offline") if expected.startswith(mode)]


@pytest.mark.parametrize("asked", ["logger.mode", "WANDB_MODE"])
def test_online_without_a_key_is_an_error_in_place_of_a_question(
    nemo: Path, home: Path, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked == "WANDB_MODE":
        monkeypatch.setenv(asked, "online")
    mode = "online" if asked == "logger.mode" else None
    with pytest.raises(TrackingError, match=f"online by {asked}, but there is no key for {DEFAULT}; `wandb login`"):
        track_cell(nemo, LoggerSettings(wandb=True, mode=mode))
    assert not (nemo / "wandb").exists()


def test_disabled_by_the_environment(nemo: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track_cell(nemo, LoggerSettings(wandb=True))
    assert not (nemo / "wandb").exists()


def test_a_sweep_agent_gets_its_own_run(run: Path, nemo: Path) -> None:
    logged_run(nemo)
    own = read_file(nemo / "tracked.json", Tracked).id
    parameters = run.parent / "parameters.yaml"
    parameters.write_text("wandb_version: 1\nmethod.theta: {value: 5.0}\nmethod: {value: nemo}\n")
    agent = {
        "WANDB_SWEEP_ID": "sweep123", "WANDB_RUN_ID": "trial456", "WANDB_SWEEP_PARAM_PATH": str(parameters),
        "WANDB_PROJECT": "of-the-sweep",
    }  # fmt: skip
    words = [sys.executable, "-m", "nemo_bench.cli", "track", str(run)]
    subprocess.run(words, timeout=120, check=True, env={**os.environ, **agent})
    trial = OfflineRun(nemo)
    (start,) = trial.contents("run")
    assert start["run_id"] == "trial456" != own
    assert (start["sweep_id"], start["project"]) == ("sweep123", "of-the-sweep")
    assert trial.config["method"] == "nemo"
    assert trial.config["method.theta"] == 5
    assert trial.summary["VM/ssim/mean"]
    assert not list(run.glob("*__none__*/wandb"))
    assert logged_run(nemo, project="later").contents("run")[0]["run_id"] == "trial456"


def test_a_trial_is_one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep_trial({"a": "nemo", "b": "random"}) is None
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "trial456")
    assert sweep_trial({"a": "none", "b": "nemo"}) == "b"
    assert sweep_trial({"a": "none"}) == "a"
    for methods in ({"a": "nemo", "b": "random"}, {"a": "none", "b": "none"}):
        with pytest.raises(ConfigError, match="asks for one cell"):
            sweep_trial(methods)


def test_a_run_under_an_agent_with_several_trials_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "trial456")
    assert main(["run", "logger=wandb", "method=random,nemo", f"root={tmp_path}"]) == 1
    assert "let the sweep vary" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
