"""Which processes run together, by Lightning or by a launcher such as torchrun or Slurm, and how they are stopped."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping

from nemo_bench.errors import ConfigError

STARTER = "NEMO_BENCH_STARTER"
"""Variable with the id of the process that starts others; they tell by it that their ranks are no left-overs."""
PATIENCE = 5.0
"""Seconds that a launcher may take to answer."""
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def is_main() -> bool:
    """Whether this process is rank 0; known before Lightning starts the others."""
    if "lightning" in sys.modules:  # and so knows better, once there is a trainer
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        return bool(getattr(rank_zero_only, "rank", 0) == 0)
    by_launchers = ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "NODE_RANK")
    ranks = ("RANK", "LOCAL_RANK", *by_launchers)
    return next((os.environ[name] for name in ranks if name in os.environ), "0") == "0"


def stop_at_sigterm() -> None:
    """Has SIGTERM, which schedulers send before they take a machine back, stop this process as Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def together(devices: int | None, nodes: int) -> tuple[int, int]:
    """Processes a node and nodes of this run; a launcher that is none is found out before anything waits for it.

    Without ``devices`` there are as many as torchrun started, or else one. ConfigError where ranks are left over from a
    job that is over, or are others than were asked for.
    """
    # Lightning takes seconds to import.
    from lightning.fabric.plugins.environments.lsf import LSFEnvironment
    from lightning.fabric.plugins.environments.mpi import MPIEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from torch.distributed import is_torchelastic_launched

    environment = os.environ
    if environment.get(STARTER) in (str(os.getpid()), str(os.getppid())):
        return devices or 1, nodes
    if is_torchelastic_launched():
        return _of_torchrun(devices, nodes, environment)
    given = {name: environment[name] for name in _RANKS if name in environment}
    with warnings.catch_warnings():
        # Lightning's advice to begin with srun wherever there is one, also where nobody wants to use it.
        warnings.filterwarnings("ignore", message="The `srun` command is available")
        launched = any(kind.detect() for kind in (SLURMEnvironment, LSFEnvironment, MPIEnvironment))
    # Where several nodes were asked for, ranks may be given by hand; Lightning says what it takes.
    by_hand = nodes > 1 and "MASTER_ADDR" in environment
    size = (devices or 1) * nodes
    alone = size == 1 and given.get("WORLD_SIZE", "1") == "1" and {given.get(n, "0") for n in _RANKS[:2]} == {"0"}
    if given and not (launched or by_hand or alone):
        raise ConfigError(
            f"{' '.join(f'{name}={value}' for name, value in given.items())} in the environment: a launcher sets such, "
            "but none runs here; they are left over from a job or set in a container, and this process would wait for "
            f"others that nobody starts. Take them away: unset {' '.join(given)}"
        )
    if size > 1:
        environment[STARTER] = str(os.getpid())
    return devices or 1, nodes


def _of_torchrun(devices: int | None, nodes: int, environment: Mapping[str, str]) -> tuple[int, int]:
    local, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
    if devices is None:
        devices, nodes = local, world // local
    if devices != local or devices * nodes != world:
        raise ConfigError(
            f"trainer.devices={devices} trainer.num_nodes={nodes}, but torchrun started {local} processes on this node "
            f"and {world} altogether: leave both out, or set trainer.devices={local} trainer.num_nodes={world // local}"
        )
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        place = (environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
        if not _answers(place):
            names = [*_RANKS, *sorted(name for name in environment if name.startswith("TORCHELASTIC_"))]
            raise ConfigError(
                f"RANK={environment['RANK']} WORLD_SIZE={world} are set as by torchrun, but no torchrun answers at "
                f"{place[0]}:{place[1]}; they are left over from a job. Take them away: unset {' '.join(names)}"
            )
    return devices, nodes


def _answers(place: tuple[str, int]) -> bool:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            socket.create_connection(place, timeout=PATIENCE).close()
        except OSError:
            time.sleep(0.2)
        else:
            return True
    return False
