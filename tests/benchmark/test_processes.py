"""Ranks in the environment, of a launcher that runs, of one that is over, and of none; and how they end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from nemo_bench.benchmark import processes
from nemo_bench.benchmark.processes import STARTER, explained, together
from nemo_bench.errors import ConfigError, NemoBenchError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "2",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", STARTER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(STARTER, "0")  # so that what a test sets is taken away again
    monkeypatch.setattr(processes, "PATIENCE", 0.5)


def set_all(values: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("given", "devices", "nodes", "expected"),
    [
        ({}, None, 1, (1, 1)),
        ({}, 2, 1, (2, 1)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, None, 1, (1, 1)),
        ({"NODE_RANK": "1", "MASTER_ADDR": "host", "WORLD_SIZE": "4"}, 2, 2, (2, 2)),
        ({"SLURM_NTASKS": "4", "RANK": "3", "WORLD_SIZE": "4"}, 4, 1, (4, 1)),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", STARTER: str(os.getppid())}, 2, 1, (2, 1)),
    ],
)
def test_ranks_that_belong_to_the_run_are_no_error(
    given: dict[str, str],
    devices: int | None,
    nodes: int,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(given, monkeypatch)
    assert together(devices, nodes) == expected


@pytest.mark.parametrize(
    ("given", "devices", "unset"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, None, "unset RANK WORLD_SIZE"),
        ({"WORLD_SIZE": "8"}, None, "unset WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, 2, "unset LOCAL_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, 2, "unset RANK LOCAL_RANK WORLD_SIZE"),
    ],
)
def test_ranks_of_no_launcher_are_named(
    given: dict[str, str], devices: int | None, unset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(given, monkeypatch)
    with pytest.raises(ConfigError) as told:
        together(devices, 1)
    assert unset in str(told.value)
    assert all(f"{name}={value}" in str(told.value) for name, value in given.items())


def test_what_torchrun_started_is_taken_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as agent:
        set_all({**TORCHRUN, "MASTER_PORT": str(agent.getsockname()[1])}, monkeypatch)
        assert together(None, 1) == together(2, 2) == (2, 2)
        with pytest.raises(ConfigError, match=r"started 2 processes on this node and 4 .* trainer.num_nodes=2"):
            together(1, 1)


def test_ranks_of_a_torchrun_that_is_over_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    set_all({**TORCHRUN, "MASTER_PORT": str(port)}, monkeypatch)
    with pytest.raises(ConfigError, match=rf"no torchrun answers at .*:{port}.*unset RANK .*TORCHELASTIC_RUN_ID"):
        together(None, 1)


def start(code: str) -> subprocess.Popen[str]:
    """A process that knows the module and waits for a minute after some lines of code."""
    head = "import os, signal, subprocess, sys, time\nfrom nemo_bench.benchmark import processes\n"
    head += "from nemo_bench.benchmark.processes import *\n"
    words = [sys.executable, "-c", f"{head}{code}\ntime.sleep(60)"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_alive(process: int) -> bool:
    """Whether there is such a process that is no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")


def assert_gone(process: int) -> None:
    end = time.monotonic() + 30
    while is_alive(process):
        assert time.monotonic() < end, f"process {process} is left"
        time.sleep(0.1)


RANK = "[sys.executable, '-c', 'from nemo_bench.benchmark.processes import *; follow_starter(); print(1, flush=True); "


def test_a_rank_ends_with_the_process_that_started_it() -> None:
    rank = f"{RANK}import time; time.sleep(60)']"
    first = start(
        f"os.environ[STARTER] = str(os.getpid())\nrank = subprocess.Popen({rank}, stdout=subprocess.PIPE)\n"
        "rank.stdout.readline()\nprint(rank.pid, flush=True)"
    )
    assert first.stdout is not None
    rank_id = int(first.stdout.readline())
    assert is_alive(rank_id)
    first.kill()
    assert_gone(rank_id)
    first.communicate()


@pytest.mark.parametrize(
    ("how", "told"),
    [("kill -9 $$", "was killed by SIGKILL, perhaps by the system because memory ran out"), ("exit 3", "status 3;")],
)
def test_the_first_process_ends_with_a_rank_that_died_and_names_it(how: str, told: str) -> None:
    first = start(
        f"ranks = [subprocess.Popen(['sh', '-c', words]) for words in ('exec sleep 60', '{how}')]\n"
        "print(*(rank.pid for rank in ranks), flush=True)\nprocesses.GRACE = 0.5\nwatch_ranks(ranks)"
    )
    out, err = first.communicate(timeout=50)
    other, dead = map(int, out.split())
    assert first.returncode == 1
    assert f"rank 2 (process {dead})" in err
    assert told in err
    assert_gone(other)


def test_a_lost_connection_is_explained_by_the_rank_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    with subprocess.Popen(["sh", "-c", "exit 3"]) as dead, subprocess.Popen(["sh", "-c", "exit 0"]) as well:
        with (
            pytest.raises(NemoBenchError, match=rf"rank 2 \(process {dead.pid}\) ended with status 3"),
            explained([well, dead]),
        ):
            raise RuntimeError("Connection closed by peer")
        with pytest.raises(RuntimeError, match="a real one"), explained([well]):
            raise RuntimeError("a real one")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_signals_stop_a_process_as_ctrl_c_does(name: str) -> None:
    told = "try: print(1, flush=True), time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(130)"
    # Whoever runs the tests may ignore SIGHUP, as nohup does, or SIGINT, as a shell does in the background.
    normal = "signal.signal(signal.SIGHUP, signal.SIG_DFL)\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(f"{normal}\nstop_at_signals()\n{told}")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == 130
    process.communicate()


def test_a_process_under_nohup_survives_the_end_of_its_terminal() -> None:
    process = start(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nstop_at_signals()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\nsys.exit(7)"
    )
    process.communicate(timeout=50)
    assert process.returncode == 7
