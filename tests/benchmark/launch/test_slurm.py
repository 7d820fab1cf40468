"""Workers of a real Slurm of three nodes on this machine: a node killed, a time limit, failures, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from disturbed import WORDS, lines, meanwhile, results, wait_for
from nemo_bench.benchmark.launch import follow
from nemo_bench.cli import main
from slurm_cluster import SlurmCluster, missing, slurm_cluster

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm")))
        try:
            started = stack.enter_context(slurm_cluster(folder))
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            pytest.skip(f"there is a Slurm, but it does not start here: {error}")
        yield started


@pytest.fixture(autouse=True)
def _environment(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(follow, "POLL", 0.3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by this process alone, undisturbed."""
    root = tmp_path_factory.mktemp("whole")
    assert main(["run", *WORDS, f"root={root}"]) == 0
    return root


def launched(root: Path, *more: str) -> int:
    return main(["run", *WORDS, f"root={root}", "launcher=slurm", *more])


def states(cluster: SlurmCluster) -> dict[str, tuple[str, str]]:
    """State and node of each worker that Slurm remembers."""
    found = cluster.run("squeue", "--array", "--noheader", "--states=all", "--format=%i %T %N").splitlines()
    return {name: (state, " ".join(node)) for name, state, *node in (line.split() for line in found)}


def nodes(cluster: SlurmCluster) -> list[str]:
    """Nodes on which workers run."""
    return [node for state, node in states(cluster).values() if state == "RUNNING"]


def test_a_killed_node_costs_no_record(
    cluster: SlurmCluster, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def disturb() -> None:
        wait_for(lambda: len(nodes(cluster)) == 2 and lines(tmp_path) > 5)
        cluster.kill(nodes(cluster)[0])
        done.append(lines(tmp_path))

    with meanwhile(disturb):
        assert launched(tmp_path, "launcher.workers=2") == 0, cluster.log()
    assert 5 < done[0] < lines(whole)
    assert results(tmp_path) == results(whole)
    printed = capsys.readouterr().out
    assert "workers: 2 running" in printed
    assert "1 waiting" in printed


def test_at_its_time_limit_a_worker_stops_and_goes_on_later(cluster: SlurmCluster, whole: Path, tmp_path: Path) -> None:
    def disturb() -> None:
        wait_for(lambda: lines(tmp_path) > 5)
        (job,) = (name for name, (state, _) in states(cluster).items() if state == "RUNNING")
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm does `launcher.notice` seconds before

    with meanwhile(disturb):
        assert launched(tmp_path, "launcher.time=10") == 0, cluster.log()
    assert results(tmp_path) == results(whole)
    (log,) = (tmp_path / "default" / "logs").iterdir()
    printed = log.read_text()
    assert "nemo-bench: stopped; all finished records are kept" in printed
    assert "the time limit is near: requeued" in printed


def test_a_failed_worker_is_named_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The worker, which is another process, finds no such class.
    conf = tmp_path / "conf" / "method"
    conf.mkdir(parents=True)
    (conf / "spoils.yaml").write_text("_target_: spoiling.Spoils\nprompts: [vm-01]\n")
    assert launched(tmp_path, "method=spoils", "--conf", str(tmp_path / "conf")) == 1
    printed = capsys.readouterr().err
    (log,) = (tmp_path / "default" / "logs").iterdir()
    assert "1 of 1 worker failed; what is finished is kept" in printed
    assert f"{log.stem}: FAILED (NonZeroExitCode); nemo-bench: " in printed
    assert str(log) in printed


def test_ctrl_c_cancels_the_workers(cluster: SlurmCluster, tmp_path: Path) -> None:
    def disturb() -> None:
        wait_for(lambda: nodes(cluster) and lines(tmp_path))
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(disturb):
        assert launched(tmp_path) == 130
    wait_for(lambda: not nodes(cluster))
    (log,) = (tmp_path / "default" / "logs").iterdir()
    assert states(cluster)[log.stem][0] in ("COMPLETING", "CANCELLED")
    wait_for(lambda: "nemo-bench: stopped; all finished records are kept" in log.read_text())


def test_what_slurm_refuses_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launched(tmp_path, "launcher.partition=nowhere") == 1
    assert "nemo-bench: sbatch: sbatch: error: invalid partition specified: nowhere" in capsys.readouterr().err
