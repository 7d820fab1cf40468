"""Which processes run together, by Lightning or by a launcher such as torchrun or Slurm, and how they are stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from nemo_bench.errors import ConfigError, RankError

STARTER = "NEMO_BENCH_STARTER"
"""Variable with the id of the process that starts others; they tell by it that their ranks are no left-overs."""
PATIENCE = 5.0
"""Seconds that a launcher may take to answer."""
PAUSE = 0.2
"""Seconds between two looks at the processes that belong together."""
GRACE = 3.0
"""Seconds that a process has to end by itself once another has died."""
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def is_main() -> bool:
    """Whether this process is rank 0; known before Lightning starts the others."""
    if "lightning" in sys.modules:  # and so knows better, once there is a trainer
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        return bool(getattr(rank_zero_only, "rank", 0) == 0)
    by_launchers = ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "NODE_RANK")
    ranks = ("RANK", "LOCAL_RANK", *by_launchers)
    return next((os.environ[name] for name in ranks if name in os.environ), "0") == "0"


def stop_at_signals() -> None:
    """Has SIGTERM, which schedulers send, and SIGHUP of a closed terminal stop this process as Ctrl-C does.

    A process that ignores SIGHUP, as under ``nohup``, goes on ignoring it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


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
    follow_starter()
    if environment.get(STARTER) in (str(os.getpid()), str(os.getppid())):
        return devices or 1, nodes
    if is_torchelastic_launched():
        _follow(os.getppid())
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


def was_started() -> bool:
    """Whether another process of this run started this one, which then does as that one decided."""
    return os.environ.get(STARTER) == str(os.getppid())


def follow_starter() -> None:
    """Has a rank end with the process that started it: nobody else would, and it keeps its memory as it waits."""
    if was_started():
        _follow(os.getppid())


@cache
def _follow(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PAUSE)
        _end("", [])

    threading.Thread(target=watch, daemon=True).start()


def watch_ranks(started: list[subprocess.Popen[bytes]]) -> None:
    """Ends this process, with a message, a while after a rank that it started has died.

    It may be waiting for that rank in code that no signal interrupts.

    Args:
        started: Ranks 1, 2, ... of this machine.
    """

    def watch() -> None:
        while not (message := _died(started)):
            time.sleep(PAUSE)
        time.sleep(GRACE)
        _end(message, started)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def explained(started: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Explains what a lost connection raises by the rank that died.

    Args:
        started: As for :func:`watch_ranks`; empty in a rank, which ends with the first process if that is the cause.

    Raises:
        RankError: A rank has died.
    """
    try:
        yield
    except RuntimeError as error:
        end = time.monotonic() + (GRACE if STARTER in os.environ else 0)
        while time.monotonic() < end:  # connections are lost before processes are seen to be gone
            if message := _died(started):
                raise RankError(message) from error
            time.sleep(PAUSE)
        raise


def _died(started: list[subprocess.Popen[bytes]]) -> str:
    """What to say of the first rank that ended otherwise than well; empty if there is none."""
    for rank, process in enumerate(started, 1):
        if status := process.poll():
            how = f"ended with status {status}; what it said stands above"
            if status < 0:
                how = f"was killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += ", perhaps by the system because memory ran out: then take fewer trainer.devices"
            kept = "All finished records are kept, the same command goes on"
            return f"rank {rank} (process {process.pid}) {how}, and the others end with it. {kept}"
    return ""


def _end(message: str, started: list[subprocess.Popen[bytes]]) -> None:
    """Ends this process and those that it started, whatever they are waiting for."""
    if message:
        print(f"nemo-bench: {message}", file=sys.stderr, flush=True)
    for process in started:
        process.kill()
    os._exit(1)


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
