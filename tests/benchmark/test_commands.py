"""The command line as a user has it: processes, kills, two ranks, W&B's own reader."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from killed import start
from nemo_bench.benchmark.export import export
from nemo_bench.benchmark.pending import is_current
from nemo_bench.cli import main
from nemo_bench.config import grid
from nemo_bench.diffusion import folder_digest
from nemo_bench.errors import StoreError
from nemo_bench.prompts import read_prompts
from nemo_bench.records.data import Neurons
from on_disk import read_records
from small_runs import small

SMALL = [*small(), "method=nemo", "batch_size=2"]  # batches of other sizes round otherwise


def run_words(root: Path, prompts: Path, *more: str) -> list[str]:
    return ["run", *SMALL, f"root={root}", f"prompts.files=[{prompts}]", *more]


def command(root: Path, prompts: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "nemo_bench.cli", *run_words(root, prompts, *more)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def execute(words: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def records(root: Path, stage: str) -> dict[str, dict[str, Any]]:
    (cell,) = (p for p in (root / "default").iterdir() if p.is_dir())
    rounded = ("cost", "sha256", "bytes")  # pixels of batches that a kill cut are rounded otherwise
    return {n: {k: v for k, v in r.items() if k not in rounded} for n, r in read_records(cell, stage).items()}


def assert_close(a: Any, b: Any) -> None:
    """Equal, numbers up to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=2e-3)
    else:
        assert a == b


def test_killed_anywhere_it_goes_on_and_two_ranks_find_the_same(tmp_path: Path, prompt_file: Path) -> None:
    whole = start([run_words(tmp_path / "whole", prompt_file)])
    for run, stop in enumerate((signal.SIGINT, signal.SIGKILL, signal.SIGTERM)):
        process = start([run_words(tmp_path / "killed", prompt_file)])
        while process.is_alive() and lines(tmp_path / "killed") < 6 * (run + 1):
            time.sleep(0.02)
        assert process.pid is not None
        os.kill(process.pid, stop)
        process.join(60)
        assert process.exitcode == (-stop if stop == signal.SIGKILL else 130)
        if run == 0:
            tear(tmp_path / "killed")
    execute(command(tmp_path / "killed", prompt_file, "trainer.devices=2"))
    _, *rest = command(tmp_path / "ranks", prompt_file, "trainer.devices=2")
    execute([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *rest])
    whole.join()
    for stage in ("localize", "memorization", "generate", "score"):
        expected = records(tmp_path / "whole", stage)
        assert expected
        assert_close(records(tmp_path / "killed", stage), expected)
        assert_close(records(tmp_path / "ranks", stage), expected)


def lines(root: Path) -> int:
    return sum(path.read_text().count("\n") for path in root.glob("**/records/*.jsonl"))


def tear(root: Path) -> None:
    """Cuts the last line of one records file in half, as a crash of the machine would."""
    path = max(root.glob("**/records/*.jsonl"), key=lambda p: p.stat().st_mtime)
    content = path.read_bytes()
    path.write_bytes(content[: -len(content.splitlines(keepends=True)[-1]) // 2])


def test_more_ranks_than_work(tmp_path: Path, prompt_file: Path) -> None:
    prompt_file.write_text(prompt_file.read_text().splitlines()[0] + "\n")
    execute(command(tmp_path, prompt_file, "trainer.devices=2", "seeds=1", "method=none"))
    assert len(records(tmp_path, "generate")) == 1


def test_a_run_tells_every_logger_and_unchanged_results_only_once(tmp_path: Path, prompt_file: Path) -> None:
    words = command(tmp_path, prompt_file, "logger=all", "method=none,nemo")
    said = [execute(words).stdout for _ in range(2)]
    assert "W&B (offline)" in said[0]
    assert "2 cells unchanged" in said[1]
    for file in ("wandb/offline-run-*/*.wandb", "tracked.json", "csv/metrics.csv", "tensorboard/events*"):
        assert len(list((tmp_path / "default").glob(f"*/{file}"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=nemoo"], "Did you mean 'nemo'?"),
        (["sedes=3"], "Did you mean 'seeds'?"),
        (["seeds=many"], "seeds=many: expected a whole number"),
        (["model=planed"], "Did you mean 'planted'?"),
        (["model.source=/nowhere/model"], "no pipeline folder"),
        (["prompts.files=[missing.csv]"], "missing.csv"),
    ],
)
def test_bad_input_is_explained_before_anything_is_loaded_or_written(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", refuse)
    assert main(["run", f"root={tmp_path / 'results'}", *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_dry_run_counts_and_writes_nothing(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["seeds=2", "model.steps=5", f"root={tmp_path / 'results'}", f"prompts.files=[{prompt_file}]"]
    words.append("prompts.calibration=package:planted/prompts/calibration.txt")
    assert main(["run", "--dry-run", "--json", *words]) == 0
    expected = json.loads(capsys.readouterr().out)
    rows = expected["cells"]
    (about,) = expected["prompts"].values()
    assert (about["taken"], about["of"]) == (3, 3)
    assert about["first"][0] == {"id": "vm-01", "text": read_prompts(prompt_file)[0].text}
    measure = {"memorization": 3, "generate": 6, "score": 3}
    assert [row["pending"] for row in rows] == [measure, *[{"localize": 3, **measure}] * 4]
    assert [row["passes"]["generate"] for row in rows] == [6 * 5 * 2] * 5
    count = 6 * len({path for prompt in read_prompts(prompt_file) for path in prompt.references})
    assert [row["comparisons"] for row in rows] == [{"ssim_nearest": count}] * 5
    assert expected["total"]["comparisons"] == {"ssim_nearest": 5 * count}
    assert main(["run", "--dry-run", *words]) == 0
    assert f"ssim_nearest: at most {5 * count} comparisons with training images, four times" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_ls_is_a_list_of_objects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "method", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in listing} >= {"none", "random", "nemo"}
    assert all({"name", "summary", "citation"} <= entry.keys() for entry in listing)
    assert main(["ls"]) == 0
    assert "ssim, ssim_nearest" in capsys.readouterr().out
    assert main(["ls", "method", "nemo"]) == 0
    assert "theta_min: 1.0" in capsys.readouterr().out
    assert main(["ls", "metods"]) == 1
    assert "Did you mean 'method'?" in capsys.readouterr().err


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    listing = f"{sys.executable} -m nemo_bench.cli ls --json | head -c 1"
    done = subprocess.run(listing, shell=True, capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[", "")


def test_report_and_export_of_a_finished_cell(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, f"root={tmp_path}", f"prompts.files=[{prompt_file}]"]
    assert main(["run", *words]) == 0
    folder = tmp_path / "default"
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    (cell,) = (p for p in folder.iterdir() if p.is_dir())
    ahead = time.time() + 1000  # the clock was set back since
    os.utime(cell / "metrics.json", (ahead, ahead))
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == page
    assert is_current(folder)
    assert main(["export", str(cell), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model_index.json").is_file()
    records = read_records(cell, "localize").values()
    localized = {record["prompt"]: Neurons(record["localization"]["neurons"]) for record in records}
    together = localized["vm-01"] | localized["tm-26"]
    assert export(cell, tmp_path / "again") == together
    assert_card_says(tmp_path / "exported", cell, together)
    assert main(["export", str(cell), str(tmp_path / "exported")]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["export", str(cell), str(tmp_path / "other"), "--prompt", "vm-1"]) == 1
    assert "Did you mean 'vm-01'?" in capsys.readouterr().err
    (start,) = json.loads((cell / "env.json").read_text())
    for settings in (None, {}, {"model": {}}, {"model": {"similarity": 3}}, {**start["settings"], "method": None}):
        (cell / "env.json").write_text(json.dumps([{**start, "settings": settings}]))
        with pytest.raises(StoreError, match=r"env\.json does not hold what it should"):
            export(cell, tmp_path / "other")
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert not (tmp_path / "nothing").exists()


def assert_card_says(folder: Path, cell: Path, neurons: Neurons) -> None:
    """What was switched off, from which cell, digests, and code that loads it."""
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    spec = json.loads((cell / "spec.json").read_text())
    assert f"# planted with {neurons.count} value neurons switched off" in text
    for fact in (cell.name, spec["digests"]["model"], spec["title"], folder_digest(folder), "2 prompts together"):
        assert fact in text
    counts = dict(re.findall(r"\| `([\w.]+)` \| (\d+) \|", text))
    assert counts == {name: str(len(ids)) for name, ids in neurons.items()}
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    name = next(iter(neurons))
    weight = names["pipeline"].unet.get_submodule(name).weight
    assert not weight[list(neurons[name])].any()
    assert weight.any()


@pytest.mark.parametrize(
    ("given", "devices"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, []),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, ["trainer.devices=2"]),
    ],
)
def test_ranks_that_are_left_over_are_named_in_place_of_waiting(
    given: dict[str, str],
    devices: list[str],
    tmp_path: Path,
    prompt_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NEMO_BENCH_STARTER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    words = [*SMALL, f"root={tmp_path}", f"prompts.files=[{prompt_file}]", "method=none", *devices]
    assert main(["run", *words]) == 1
    said = capsys.readouterr().err
    assert all(f"{name}={value}" in said for name, value in given.items() if name != "MASTER_PORT")
    assert f"unset {' '.join(name for name in given if name != 'MASTER_PORT')}" in said
    assert not list(tmp_path.glob("default/*/records"))


def test_torchrun_without_devices_takes_as_many_as_it_started(tmp_path: Path, prompt_file: Path) -> None:
    python, *words = command(tmp_path, prompt_file, "seeds=2", "method=none")
    started = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    execute([*started, *words])
    (cell,) = (p for p in (tmp_path / "default").iterdir() if p.is_dir())
    assert json.loads((cell / "env.json").read_text())[-1]["world_size"] == 2
    assert len(records(tmp_path, "generate")) == 6


def test_a_root_that_cannot_be_written_is_said_before_work(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    allowed = tempfile.TemporaryFile

    def refused(dir: Path) -> Any:
        if dir == tmp_path / "locked":
            raise OSError(30, "Read-only file system")
        return allowed(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    for root, why in (("file/results", "file is no folder"), ("locked/results", "locked can't be written to")):
        words = [*SMALL, "method=none", f"root={tmp_path / root}", f"prompts.files=[{prompt_file}]"]
        assert main(["run", *words]) == 1
        said = capsys.readouterr().err
        assert why in said
        assert "name a folder" in said
        assert "goes on" not in said
        assert main(["run", *words, "--dry-run"]) == 1
        assert capsys.readouterr().err.startswith(f"nemo-bench: root={tmp_path}")


@pytest.mark.parametrize(("name", "goes_on"), [("run", True), ("references", True), ("export", False), ("ls", False)])
def test_the_same_command_goes_on_is_said_only_where_it_does(
    name: str, goes_on: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"run": [], "references": ["list.csv", "folder"], "export": ["cell", "folder"], "ls": []}[name]
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(*args: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(f"nemo_bench.cli._{name}", fail)
        assert main([name, *words]) in (1, 130)
        assert ("the same command goes on" in capsys.readouterr().err) == goes_on


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("report", "a run"), ("track", "a run or a cell"), ("audit", "a run or a cell"), ("export", "a cell")],
)
def test_a_folder_that_is_not_there_is_said_to_be_missing_and_the_nearest_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, wanted: str
) -> None:
    (tmp_path / "default").mkdir()
    given = tmp_path / "defualt"
    words = [name, str(given), *([str(tmp_path / "out")] if name == "export" else [])]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert f"{given} does not exist; give {wanted}" in said
    assert "Did you mean 'default'?" in said


def test_settings_may_stand_on_both_sides_of_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"root={tmp_path}", "method=none", "--dry-run", "--json", "prompts.limit=1", "seeds=3"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["pending"]["generate"] == 6
    with pytest.raises(SystemExit):
        main(["run", "seeds=1", "--dry-runn"])
    assert "unknown option '--dry-runn'. Did you mean '--dry-run'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "seeds=1"])
    assert "unknown argument 'seeds=1'; nemo-bench report takes no settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum"], "unknown command 'rum'. Did you mean 'run'?"),
        (["seeds=3", "method=none"], "a command comes first, such as: nemo-bench run seeds=3 method=none"),
        (["run", "--jsn"], "unknown option '--jsn'. Did you mean '--json'?"),
        (["references", "a.csv", "images", "--retrys"], "unknown option '--retrys'. Did you mean '--retries'?"),
    ],
)
def test_what_is_typed_wrongly_is_answered_by_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_command_there_is_help_and_the_version_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (([], "COMMAND"), (["--version"], f"nemo-bench {version('nemo-bench')}\n")):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
        assert said in capsys.readouterr().out


def test_the_settings_of_every_cell_are_printed_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--cfg", "method=none,nemo", "seeds=3", "model.guidance=5", f"root={tmp_path}"]
    assert main(words) == 0
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert shown == [asdict(choice.settings) for choice in grid(words[2:])]
    assert [cell["method"].get("theta") for cell in shown] == [None, 5.0]
    assert shown[0]["metrics"]["alignment"]["space"]["model"] == shown[0]["model"]["clip"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown
    assert not list(tmp_path.iterdir())


PROGRAM = [sys.executable, "-m", "nemo_bench"]


def test_the_package_is_run_like_the_command_and_its_line_can_be_typed_again(tmp_path: Path, prompt_file: Path) -> None:
    root = tmp_path / "with space"
    execute([*PROGRAM, *command(root, prompt_file, "method=none", "seeds=1")[3:]])
    (cell,) = (p for p in (root / "default").iterdir() if p.is_dir())
    line = json.loads((cell / "env.json").read_text())[0]["command"]
    assert shlex.split(line) == ["nemo-bench", *command(root, prompt_file, "method=none", "seeds=1")[3:]]


LEFT_OVER = {"MPLBACKEND": "module://backend_of_another_environment", "WANDB_SERVICE": "3-1-tcp-localhost-9"}
"""What a kernel of a notebook, or a process that uses wandb, hands on to what it starts."""


def test_what_a_kernel_hands_on_breaks_nothing_and_is_kept_by_the_library(tmp_path: Path, prompt_file: Path) -> None:
    words = [*PROGRAM, *command(tmp_path, prompt_file, "method=none", "seeds=1", "logger=wandb")[3:]]
    left_over = {**environment(), **LEFT_OVER}
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, env=left_over)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "default" / "report.html").is_file()
    assert list(tmp_path.glob("default/*/wandb/offline-run-*"))
    # In a notebook the back end is the user's.
    code = "import matplotlib, nemo_bench; from nemo_bench.report import write_report; print(matplotlib.get_backend())"
    own = {**environment(), "MPLBACKEND": "pdf"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=own)
    assert done.stdout == "pdf\n"


def test_numbers_of_the_first_prompts_only_are_said_to_be_no_results(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--dry-run", f"root={tmp_path}", f"prompts.files=[{prompt_file}]", "method=none"]
    assert main([*words, "prompts.limit=2"]) == 0
    shown = capsys.readouterr()
    assert "2 of 3 prompts, the first of them:" in shown.out
    assert read_prompts(prompt_file)[1].text[:40] in shown.out
    assert (
        shown.err == "prompts.limit=2: of each file the first prompts only, for a try; these numbers are no results\n"
    )
    assert main(words) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("nemo-bench r", {"run", "report", "references", "regions"}),
        ("nemo-bench run --d", {"--dry-run"}),
        ("nemo-bench run method=sta", {"method=static_transition"}),
        ("nemo-bench run seeds=2 loc", {"localize_seeds=", "localizer="}),
    ],
)
def test_a_shell_is_told_how_words_go_on(typed: str, found: set[str], tmp_path: Path) -> None:
    # What argcomplete's own functions for shells set.
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_COMP_WORDBREAKS": " ", "COMP_TYPE": "9",
        "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"),
        "_ARGCOMPLETE_IFS": " ",
    }  # fmt: skip
    subprocess.run([*PROGRAM, "run"], check=True, timeout=60, env={**environment(), **asked})
    assert set((tmp_path / "answer").read_text().split()) == found
