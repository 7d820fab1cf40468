"""A process that is killed by tests; what it imports is imported before it is forked."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

import torch

import nemo_bench.benchmark.audit
import nemo_bench.benchmark.detect
import nemo_bench.benchmark.run  # noqa: F401
from nemo_bench.cli import main


def execute(commands: Sequence[Sequence[str]]) -> None:
    """Runs commands one after another, without output, as long as none fails."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for words in commands:
        if status := main(words):
            sys.exit(status)


def start(commands: Sequence[Sequence[str]]) -> BaseProcess:
    """Starts a process that runs commands, forked where everything is imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    process = context.Process(target=execute, args=(commands,))
    process.start()
    return process
