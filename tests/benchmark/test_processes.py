"""Ranks in the environment: of a launcher that runs, of one that is over, and of none."""

from __future__ import annotations

import os
import socket

import pytest

from nemo_bench.benchmark import processes
from nemo_bench.benchmark.processes import STARTER, together
from nemo_bench.errors import ConfigError

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
