"""Workers as a job array of Slurm, by its own programs; none of them needs Slurm's accounting."""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from typing_extensions import override

from nemo_bench.benchmark.launch.base import UNFINISHED, Worker, Workers, log_folder, threads, worker_command
from nemo_bench.config import RunSettings
from nemo_bench.errors import ConfigError, LaunchError

log = logging.getLogger(__name__)

PROGRAMS = ("sbatch", "squeue", "scancel")
FAILED = (
    "BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
)  # fmt: skip
"""States of a job that is over and did not succeed; one that begins again is ``PENDING`` at once."""
PATIENCE = 60
"""Seconds that a program of Slurm may take."""

_SCRIPT = """\
#!/bin/bash
{options}
# Save it, then: mkdir -p {logs} && sbatch FILE
unset SLURM_NTASKS SLURM_PROCID # or Lightning would wait for ranks of srun; a worker starts its own
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"
{command} &
worker=$!
trap : TERM # Slurm sends it to all processes of a job that is cancelled or taken back; it requeues the latter by itself
trap 'is_over=yes; kill -TERM "$worker"' USR1
until wait "$worker"; status=$?; ! kill -0 "$worker" 2>/dev/null; do :; done
if [[ "$is_over" && "$status" != 0 && "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]]; then
  echo "the time limit is near: requeued, and goes on from its records"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def script(overrides: Sequence[str], conf: Path | None, settings: RunSettings) -> str:
    """The batch script of an array of workers.

    Raises:
        ConfigError: A further option is none.
    """
    logs = log_folder(settings)
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in _options(settings, logs)),
        logs=shlex.quote(str(logs)),
        threads=threads(settings),
        command=shlex.join(worker_command(overrides, conf)),
        restarts=settings.launcher.restarts,
    )


def _options(settings: RunSettings, logs: Path) -> Iterator[str]:
    asked = settings.launcher
    devices = settings.trainer.devices or 1
    gpus = asked.gpus
    if gpus is None:
        gpus = devices if settings.trainer.accelerator in ("gpu", "cuda") else 0
    given = {
        "job-name": f"nemo-bench-{settings.name}",
        "array": f"0-{asked.workers - 1}",
        "output": str(logs).replace("%", "%%") + "/%A_%a.log",
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "nodes": "1",
        "cpus-per-task": str(asked.cpus),
        "gres": f"gpu:{gpus}" if gpus else None,
        "mem": f"{round(asked.memory * 1024)}M" if asked.memory else None,
        "time": asked.time,
        "signal": f"B:USR1@{asked.notice}",
        "partition": asked.partition,
        "account": asked.account,
    }
    for name, value in given.items():
        if value is not None:
            yield f"--{name}={_quoted(f'launcher: {name}', value)}"
    yield "--requeue"
    for option in asked.options:
        name, separator, value = option.partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"launcher.options: {option!r} is no option of sbatch such as '--constraint=a100'")
        yield name + separator + _quoted("launcher.options", value)


def _quoted(key: str, value: str) -> str:
    """A value as sbatch reads it in a script: one line, quoted."""
    if not value.isprintable():
        raise ConfigError(f"{key}: {value!r} holds characters that can't be printed")
    return shlex.quote(value) if value else ""


class SlurmWorkers(Workers):
    """A job array.

    Args:
        overrides: ``key=value`` words of the run.
        conf: The user's folder of YAML files.
        settings: Of any cell of the run.

    Raises:
        ConfigError: Slurm's programs are not there.
        LaunchError: Slurm does not take the job.
    """

    def __init__(self, overrides: Sequence[str], conf: Path | None, settings: RunSettings) -> None:
        text = script(overrides, conf, settings)
        if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
            raise ConfigError(
                f"launcher=slurm needs {', '.join(lacking)}, which this machine has not: start it where jobs are "
                "submitted, or print the script with --print; launcher=ray and --shard need no Slurm"
            )
        self._logs = log_folder(settings)
        self._logs.mkdir(parents=True, exist_ok=True)
        self.job = _slurm("sbatch", "--parsable", text=text).strip().split(";")[0]
        self._released: set[str] = set()
        names = [f"{self.job}_{number}" for number in range(settings.launcher.workers)]
        self._seen = {name: Worker(name, "waiting", "submitted", self._logs / f"{name}.log") for name in names}

    @override
    def look(self) -> list[Worker]:
        form = ("--array", "--noheader", "--states=all", "--format=%i|%T|%r|%N")
        try:
            lines = _slurm("squeue", *form, f"--jobs={self.job}").splitlines()
        except LaunchError as error:
            if "Invalid job id" not in str(error):
                raise
            lines = []
        found = {name: about for name, *about in (line.strip().split("|") for line in lines)}
        for name, worker in self._seen.items():
            if name in found:
                self._seen[name] = self._worker(worker, *found[name])
            elif worker.state in UNFINISHED:  # Slurm forgets a job minutes after its end
                self._seen[name] = replace(worker, state="failed", note="forgotten by Slurm before its end was seen")
        return list(self._seen.values())

    def _worker(self, worker: Worker, state: str, reason: str, node: str) -> Worker:
        if state == "COMPLETED" or (state == "CANCELLED" and worker.name in self._released):
            return replace(worker, state="done", note="")
        if state in FAILED:
            return replace(worker, state="failed", note=f"{state} ({reason})")
        if state == "PENDING":
            return replace(worker, state="waiting", note=reason)
        return replace(worker, state="running", note=node)

    @override
    def release(self) -> None:
        self._released = {worker.name for worker in self._seen.values() if worker.state == "waiting"}
        _slurm("scancel", "--state=PENDING", self.job)

    @override
    def stop(self) -> None:
        if any(worker.state in UNFINISHED for worker in self._seen.values()):
            try:
                _slurm("scancel", self.job)
            except LaunchError as error:  # which would take the place of what made this stop
                log.warning("%s; its workers go on, stop them by: scancel %s", error, self.job)


def _slurm(program: str, *words: str, text: str | None = None) -> str:
    """What a program of Slurm prints."""
    try:
        done = subprocess.run(
            [program, *words], input=text, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{program} gave no answer in {PATIENCE} s") from error
    if done.returncode:
        raise LaunchError(f"{program}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
