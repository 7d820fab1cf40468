"""What launchers would start, shares of the cells, and a Slurm that forgets and does not answer."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cell_configs import one_cell
from disturbed import QUICK
from nemo_bench.benchmark.launch import check_launcher, follow, printed
from nemo_bench.benchmark.launch.slurm import SlurmWorkers
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.status import CellStatus
from nemo_bench.cli import main
from nemo_bench.config import LauncherSettings, RunSettings, grid
from nemo_bench.errors import ConfigError, LaunchError
from small_runs import small


def settings(*words: str) -> RunSettings:
    return one_cell(*words).settings


def test_launcher_changes_no_cell() -> None:
    (local,), (slurm,) = (plan(grid(["method=none", *words])) for words in ([], ["launcher=slurm", "launcher.gpus=2"]))
    assert local.spec == slurm.spec
    assert slurm.config.settings.launcher == LauncherSettings(kind="slurm", gpus=2)


def test_a_run_has_one_launcher() -> None:
    with pytest.raises(ConfigError, match="launcher must be the same for all cells"):
        plan(grid(["method=none", "launcher=local,slurm"]))


def test_script_asks_for_what_was_set_and_is_bash(tmp_path: Path) -> None:
    words = [
        "launcher=slurm", "launcher.workers=3", "launcher.memory=1.5", "launcher.time=1-12:00:00", "launcher.cpus=8",
        "launcher.notice=90", "launcher.partition='a,b'", "launcher.account=me", "launcher.restarts=7",
        "launcher.options=['--constraint=a100|h100',--exclusive]", "trainer=gpu", "trainer.devices=2",
        f"root={tmp_path}/with space%d", "name=mine", "seeds=3",
    ]  # fmt: skip
    script = printed(words, tmp_path, settings(*words))
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {
        "--job-name=nemo-bench-mine", "--array=0-2", f"--output='{tmp_path}/with space%%d/mine/logs/%A_%a.log'",
        f"--chdir={Path.cwd()}", "--cpus-per-task=8", "--gres=gpu:2", "--mem=1536M", "--time=1-12:00:00",
        "--signal=B:USR1@90", "--partition=a,b", "--account=me", "--constraint='a100|h100'", "--exclusive", "--requeue",
    } <= set(options)  # fmt: skip
    assert 'OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"' in script
    assert (
        f"'root={tmp_path}/with space%d' name=mine seeds=3 launcher=local launcher.workers=1 --conf {tmp_path} &"
        in script
    )
    assert '"${SLURM_RESTART_COUNT:-0}" -lt 7' in script
    assert "launcher.workers=3" not in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher.workers=2"], "launcher.workers=2: add launcher=slurm or launcher=ray, or --print"),
        (["launcher=slurm", "--shard", "1/2"], "--shard 1/2: workers of launcher=slurm take the next cell"),
        (["launcher=slurm", "launcher.options=[constraint]", "--print"], "'constraint' is no option of sbatch"),
        (["launcher=slurm", 'launcher.options=["--comment=a\nb"]', "--print"], "characters that can't be printed"),
        (["launcher=slurm", "launcher.workers=0"], "launcher.workers=0"),
        (["launcher=slum"], "Did you mean 'slurm'?"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "method=none", f"root={tmp_path}", *words]) == 1
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/2/3"])
def test_no_share(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--shard", shard])
    assert f"expected i/n, such as 1/4 to 4/4, given '{shard}'" in capsys.readouterr().err


def test_printed_commands_share_the_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*small(seeds=1), *QUICK, "prompts.limit=1", "method=none,embedding_noise", f"root={tmp_path}"]
    assert main(["run", *words, "launcher.workers=2", "--print"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("--shard 1/2")
    assert second.endswith("launcher=local launcher.workers=1 --shard 2/2")
    for number, finished in ((1, 1), (2, 2)):
        assert main(["run", *words, "--shard", f"{number}/2"]) == 0
        assert len(list(tmp_path.glob("default/*/metrics.json"))) == finished
    rows = json.loads((tmp_path / "default" / "leaderboard.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"none", "embedding_noise"}


def test_without_slurm_it_says_what_else_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["run", "method=none", f"root={tmp_path}/results", "launcher=slurm"]) == 1
    said = capsys.readouterr().err
    assert "launcher=slurm needs sbatch, squeue, scancel, which this machine has not" in said
    assert "--print" in said


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that stand for Slurm's; ``squeue`` prints the file ``queue``, or fails without it."""
    programs = {
        "sbatch": "cat >/dev/null; echo '7;cluster'",
        "squeue": f"cat {tmp_path}/queue 2>/dev/null || {{ echo 'slurm_load_jobs error: it is down' >&2; exit 1; }}",
        "scancel": f'echo "$@" >>{tmp_path}/cancelled',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_states_of_slurm(slurm: Path) -> None:
    asked = settings(f"root={slurm}", "launcher=slurm", "launcher.workers=4")
    workers = SlurmWorkers([], None, asked)

    def look(*lines: str) -> list[tuple[str, str]]:
        (slurm / "queue").write_text("".join(f"{line} \n" for line in lines))
        return [(worker.state, worker.note) for worker in workers.look()]

    assert look("7_0|PENDING|Resources|", "7_1|RUNNING|None|node1", "7_2|COMPLETING|None|node2", "7_3|TIMEOUT|x|n") == [
        ("waiting", "Resources"), ("running", "node1"), ("running", "node2"), ("failed", "TIMEOUT (x)"),
    ]  # fmt: skip
    workers.release()
    assert look("7_0|CANCELLED|None|", "7_1|CANCELLED|None|", "7_2|COMPLETED|None|node2") == [
        ("done", ""), ("failed", "CANCELLED (None)"), ("done", ""), ("failed", "TIMEOUT (x)"),
    ]  # fmt: skip
    workers.stop()
    assert (slurm / "cancelled").read_text() == "--state=PENDING 7\n"


def test_a_worker_that_slurm_forgot_failed(slurm: Path) -> None:
    workers = SlurmWorkers([], None, settings(f"root={slurm}", "launcher=slurm"))
    (slurm / "queue").write_text("")
    (worker,) = workers.look()
    assert (worker.state, worker.note) == ("failed", "forgotten by Slurm before its end was seen")


def test_a_controller_that_is_down_is_asked_again(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    words = ["method=none", f"root={slurm}/results", "launcher=slurm"]
    (slurm / "later").write_text("7_0|FAILED|NonZeroExitCode|node1\n")
    up_at_third = f"[[ $(wc -l <{slurm}/asked) == 3 ]] && cp {slurm}/later {slurm}/queue"
    squeue = (slurm / "squeue").read_text()
    (slurm / "squeue").write_text(squeue.replace("\n", f"\necho >>{slurm}/asked; {up_at_third}\n", 1))
    monkeypatch.setattr(follow, "POLL", 0.01)
    with pytest.raises(LaunchError, match="1 of 1 worker failed") as failed:
        follow.launch(plan(grid(words)), words, None)
    assert [line for line in said if "it is down" in line] == [
        "squeue: slurm_load_jobs error: it is down; asked again every 0.01 s"
    ]
    assert said[-1] == "workers: 1 failed; 0 of 1 cell and 0 of 252 records done"
    assert "7_0: FAILED (NonZeroExitCode); it printed nothing" in str(failed.value)


def test_workers_that_can_not_be_stopped_do_not_hide_why_they_were_to_be(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    words = ["method=none", f"root={slurm}/results", "launcher=slurm"]
    (slurm / "scancel").write_text("#!/bin/bash\necho 'it is down' >&2; exit 1\n")
    monkeypatch.setattr(follow, "_follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        follow.launch(plan(grid(words)), words, None)
    assert said[-1] == "scancel: it is down; its workers go on, stop them by: scancel 7"


def test_workers_that_can_not_be_released_hide_no_failure(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    words = ["method=none", f"root={slurm}/results", "launcher=slurm", "launcher.workers=2"]
    (slurm / "queue").write_text("7_0|FAILED|NonZeroExitCode|n\n7_1|PENDING|Resources|\n")
    at_last = f"sed -i 's/PENDING/COMPLETED/' {slurm}/queue"
    (slurm / "scancel").write_text(f"#!/bin/bash\n{at_last}\necho 'it is down' >&2; exit 1\n")
    monkeypatch.setattr(follow, "POLL", 0.01)
    cells = plan(grid(words))
    finished = CellStatus(cells[0].id, "finished", 0, 0)
    monkeypatch.setattr(follow, "read_status", lambda folder: [finished])
    with pytest.raises(LaunchError, match=r"1 of 2 workers failed.*\n  7_0: FAILED"):
        follow.launch(cells, words, None)
    assert "scancel: it is down; workers that wait end by themselves once they begin" in said


def test_several_workers_of_this_process_are_refused() -> None:
    with pytest.raises(ConfigError, match="this process alone"):
        check_launcher(replace(settings(), launcher=LauncherSettings(workers=2)))
