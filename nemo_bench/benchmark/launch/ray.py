"""Workers as long tasks of Ray, which puts those of a node that died on another one."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from nemo_bench.benchmark.launch.base import UNFINISHED, Worker, Workers, log_folder, threads, worker_command
from nemo_bench.config import RunSettings
from nemo_bench.errors import ConfigError, LaunchError, first_line

PATIENCE = 60
"""Seconds that workers may take to stop."""


class RayWorkers(Workers):
    """One task a worker, each a process of its own on a node of Ray.

    Args:
        overrides: ``key=value`` words of the run.
        conf: The user's folder of YAML files.
        settings: Of any cell of the run.

    Raises:
        ConfigError: Ray is not installed.
        LaunchError: Ray can't be started or reached.
    """

    def __init__(self, overrides: Sequence[str], conf: Path | None, settings: RunSettings) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "launcher=ray needs Ray, which is not installed: pip install 'nemo-bench[ray]'; launcher=slurm and "
                "--shard need no Ray"
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless asked for
        import ray

        asked = settings.launcher
        try:
            ray.init(asked.address or "local", log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise LaunchError(f"launcher.address={asked.address}: {first_line(error)}") from error
        self._ray = ray
        gpus = asked.gpus
        if gpus is None:
            has_gpus = settings.trainer.accelerator != "cpu" and ray.cluster_resources().get("GPU", 0)
            gpus = (settings.trainer.devices or 1) if has_gpus else 0
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes need not import the package for it
        task = ray.remote(
            num_cpus=asked.cpus,
            num_gpus=gpus,
            memory=asked.memory and round(asked.memory * 2**30),
            max_retries=asked.restarts,
            scheduling_strategy="SPREAD",
        )(_work)
        logs = log_folder(settings)
        logs.mkdir(parents=True, exist_ok=True)
        begun = time.strftime("%Y%m%d-%H%M%S")
        command = worker_command(overrides, conf)
        self._tasks: dict[Any, Worker] = {}
        for number in range(asked.workers):
            name = f"ray-{begun}_{number}"
            log = logs / f"{name}.log"
            found = task.remote(command, str(Path.cwd()), str(log), threads(settings))
            self._tasks[found] = Worker(name, "waiting", "", log)

    @override
    def look(self) -> list[Worker]:
        done, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        for task, worker in self._tasks.items():
            if worker.state not in UNFINISHED:
                continue
            if task in done:
                self._tasks[task] = self._ended(task, worker)
            elif worker.log.exists():
                self._tasks[task] = replace(worker, state="running")
        return list(self._tasks.values())

    def _ended(self, task: Any, worker: Worker) -> Worker:
        try:
            status = self._ray.get(task)
        except self._ray.exceptions.TaskCancelledError:
            return replace(worker, state="done", note="taken back")
        except self._ray.exceptions.RayError as error:  # its node died too often, or Ray could not start it
            return replace(worker, state="failed", note=first_line(error))
        return replace(worker, state="failed" if status else "done", note=f"exit status {status}")

    @override
    def release(self) -> None:
        for task, worker in self._tasks.items():
            if worker.state == "waiting":
                self._ray.cancel(task)

    @override
    def stop(self) -> None:
        left = [task for task, worker in self._tasks.items() if worker.state in UNFINISHED]
        for task in left:
            self._ray.cancel(task)
        if left:
            self._ray.wait(left, num_returns=len(left), timeout=PATIENCE)
        self._ray.shutdown()


def _work(command: Sequence[str], folder: str, log: str, threads: int) -> int:
    """Runs a worker in a process of its own, which is stopped where this task is; gives its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with Path(log).open("a") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            while process.poll() is None:
                time.sleep(0.5)  # a cancelled task gets KeyboardInterrupt between two of Python's own steps
        finally:
            process.terminate()
            process.wait()
    return process.returncode


def _end_with_parent() -> None:
    """Has the kernel send SIGTERM to this process when its parent dies, which Ray kills where memory is short."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
