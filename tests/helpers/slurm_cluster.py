"""A Slurm of several nodes on this machine: one controller, and daemons that differ by name and port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

NODE = "NEMO_BENCH_TEST_NODE"
"""Variable of the daemons of a node, and of those that they start for each job."""
PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "squeue", "scontrol", "scancel")
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdTimeout={timeout}
KillWait=10
MinJobAge=300
SwitchType=switch/none
"""


def missing() -> str:
    """Why no Slurm can be started here; empty where it can."""
    if os.geteuid() != 0:
        return "a Slurm for tests is started by root alone"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"no {', '.join(lacking)} here: apt-get install slurm-wlm munge" if lacking else ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class SlurmCluster:
    """A running Slurm; its nodes can be killed."""

    folder: Path
    nodes: list[str]
    environment: dict[str, str]  #: What programs need to find it.
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *words: str) -> str:
        """Runs one of Slurm's programs and gives what it prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def kill(self, node: str) -> None:
        """Kills a node as a power cut does: its daemons, so that they report nothing, then everything they started."""
        daemon = self.daemons.pop(node)
        kill_processes(f"{NODE}={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}")
        daemon.wait()
        kill_processes(f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}")
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")

    def log(self) -> str:
        """The end of every log, for a message."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


def kill_processes(*variables: str) -> None:
    """Kills processes in whose environment all of some variables are set as given."""
    wanted = {variable.encode() for variable in variables}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if wanted <= set((place / "environ").read_bytes().split(b"\0")):
                os.kill(int(place.name), signal.SIGKILL)
        except OSError:
            continue  # it ended


@contextmanager
def slurm_cluster(folder: Path, nodes: int = 3, cpus: int = 1) -> Iterator[SlurmCluster]:
    """Starts a Slurm of some nodes, each with some CPUs, and stops it with all that it runs.

    Args:
        folder: An empty folder of a short path, since a socket is in it.
        nodes: Number of nodes.
        cpus: CPUs that each is said to have, whatever the machine has.
    """
    folder.chmod(0o755)
    (folder / "state").mkdir()
    names = [f"node{number}" for number in range(1, nodes + 1)]
    config = CONFIG.format(host=socket.gethostname().split(".")[0], port=_free_port(), folder=folder, timeout=10)
    for name in names:
        host = f"NodeHostname={socket.gethostname().split('.')[0]} NodeAddr=127.0.0.1 Port={_free_port()}"
        config += f"NodeName={name} {host} CPUs={cpus} RealMemory=1000\n"
    config += f"PartitionName=all Nodes={','.join(names)} Default=YES MaxTime=INFINITE State=UP\n"
    (folder / "slurm.conf").write_text(config)
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = SlurmCluster(folder, names, environment)
    with ExitStack() as stack:
        stack.callback(kill_processes, f"SLURM_CONF={environment['SLURM_CONF']}")
        key, munge = folder / "munge.key", folder / "munge.socket"
        subprocess.run(["mungekey", f"--keyfile={key}", "--create"], check=True, env=environment)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
        stack.enter_context(
            _daemon(["munged", "--foreground", "--force", f"--socket={munge}", f"--key-file={key}", *files], cluster)
        )
        _wait(munge.exists, cluster)
        stack.enter_context(_daemon(["slurmctld", "-D", "-i"], cluster))
        for name in names:
            daemon = _daemon(["slurmd", "-D", "-N", name], cluster, {NODE: name})
            cluster.daemons[name] = stack.enter_context(daemon)
        _wait(lambda: _idle(cluster) == len(names), cluster)
        yield cluster


def _idle(cluster: SlurmCluster) -> int:
    try:
        return cluster.run("sinfo", "--Node", "--noheader", "--format=%T").split().count("idle")
    except RuntimeError:
        return 0  # the controller is not up yet


@contextmanager
def _daemon(
    words: list[str], cluster: SlurmCluster, more: Mapping[str, str] = MappingProxyType({})
) -> Iterator[subprocess.Popen[bytes]]:
    with (cluster.folder / f"{words[0]}.out.log").open("ab") as output:
        environment = {**cluster.environment, **more}
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(condition: Callable[[], bool], cluster: SlurmCluster, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"Slurm did not start:\n{cluster.log()}")
        time.sleep(0.1)


def _free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
