"""Workers of a real Ray cluster on this machine: a node killed, failures, Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from disturbed import WORDS, lines, meanwhile, results, wait_for
from nemo_bench.benchmark.launch import follow
from nemo_bench.cli import main
from ray_cluster import RayCluster, missing, ray_cluster

needs_ray = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with ExitStack() as stack:
            try:
                started = stack.enter_context(ray_cluster())
            except (OSError, RuntimeError) as error:
                pytest.skip(f"there is Ray, but no cluster of it starts here: {error}")
            yield started


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL", 0.3)


def launched(root: Path, cluster: RayCluster, *more: str) -> int:
    words = ["launcher=ray", f"launcher.address={cluster.address}", f"root={root}"]
    return main(["run", *WORDS, *words, *more])


@needs_ray
def test_a_cluster_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where Ray notes clusters of this machine
    assert main(["run", *WORDS, f"root={tmp_path}", "launcher=ray", "launcher.address=auto"]) == 1
    assert "nemo-bench: launcher.address=auto: " in capsys.readouterr().err


@needs_ray
def test_ctrl_c_stops_the_workers(cluster: RayCluster, tmp_path: Path) -> None:
    def disturb() -> None:
        wait_for(lambda: lines(tmp_path))
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(disturb):
        assert launched(tmp_path, cluster) == 130
    (log,) = (tmp_path / "default" / "logs").iterdir()
    assert "nemo-bench: stopped; all finished records are kept" in log.read_text()
    assert not cluster.working()


@needs_ray
def test_a_killed_node_costs_no_record(cluster: RayCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["run", *WORDS, f"root={whole}"]) == 0
    done = []

    def disturb() -> None:
        wait_for(lambda: len(cluster.working()) == 2 and lines(killed) > 5)
        cluster.kill(cluster.working()[0])
        done.append(lines(killed))

    with meanwhile(disturb):
        assert launched(killed, cluster, "launcher.workers=2") == 0
    assert 5 < done[0] < lines(whole)
    assert results(killed) == results(whole)
    assert "workers: 2 running" in capsys.readouterr().out


@needs_ray
def test_a_failed_worker_is_named_with_its_log(
    cluster: RayCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The worker, which is another process, finds no such class.
    conf = tmp_path / "conf" / "method"
    conf.mkdir(parents=True)
    (conf / "spoils.yaml").write_text("_target_: spoiling.Spoils\nprompts: [vm-01]\n")
    assert launched(tmp_path, cluster, "method=spoils", "--conf", str(tmp_path / "conf")) == 1
    printed = capsys.readouterr().err
    (log,) = (tmp_path / "default" / "logs").iterdir()
    assert "1 of 1 worker failed; what is finished is kept" in printed
    assert f"{log.stem}: exit status 1; nemo-bench: " in printed
    assert str(log) in printed


def test_without_ray_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", *WORDS, f"root={tmp_path}", "launcher=ray"]) == 1
    assert "pip install 'nemo-bench[ray]'" in capsys.readouterr().err
