"""Kills at random moments of all stages, by one process and by two ranks: nothing is lost, nothing is there twice.

``NEMO_BENCH_KILLS`` is the number of kills, ``NEMO_BENCH_SEED`` that of their moments.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from killed import start
from on_disk import read_records
from small_runs import small

KILLS = int(os.environ.get("NEMO_BENCH_KILLS", "2"))
RANKS_EVERY = 2
"""Kills of which one hits a run of two ranks: those start new processes, which takes seconds."""
STAGES = ("localize", "memorization", "generate", "score", "detect", "audit", "audit_scores")

FEW_METRICS = [f"~metrics.{name}" for name in ("ssim_nearest", "alignment", "diversity")]


def commands(root: Path, prompts: Path) -> list[list[str]]:
    """A run with a search for neurons, a detector and an audit; one row a batch, so that no kill changes a batch."""
    words = [f"root={root}", f"prompts.files=[{prompts}]", "prompts.limit=2", "trainer=cpu", "batch_size=1"]
    return [
        ["run", *small(seeds=1, steps=2), "prompts.calibration_limit=4", *FEW_METRICS, *words, "method=none,nemo"],
        ["detect", "model.steps=1", "detector=magnitude", *words],
        [
            "audit",
            str(root / "default"),
            "--cell",
            "none",
            "steps=2",
            "samples=1",
            "images=1",
            "limit=1",
            "trainer=cpu",
        ],
    ]


def start_ranks(root: Path, prompts: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "nemo_bench.cli", *commands(root, prompts)[0], "trainer.devices=2"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children(process: int) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [int(row[0]) for row in rows if int(row[1]) == process and not row[2].startswith("Z")]


def assert_gone(process: int) -> None:
    end = time.monotonic() + 60
    while Path(f"/proc/{process}").exists() and " Z " not in Path(f"/proc/{process}/stat").read_text():
        assert time.monotonic() < end, f"process {process} was left behind"
        time.sleep(0.1)


def found(root: Path) -> dict[str, Any]:
    """Records of all cells without their cost, content of all pictures, and names of what is not whole."""
    cells = sorted(path.parent for path in root.glob("*/*/records"))
    records = {
        f"{cell.name} {stage}": {
            name: {key: value for key, value in record.items() if key != "cost"}
            for name, record in read_records(cell, stage).items()
        }
        for cell in cells
        for stage in STAGES
    }
    pictures = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.png")}
    return {**records, **pictures, "parts": [path.name for path in root.rglob("*.part")]}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def kill_one(root: Path, prompts: Path, moment: float) -> bool:
    """Kills one process at a moment; whether it had not ended before."""
    process = start(commands(root, prompts))
    process.join(moment)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        assert process.exitcode == 0
    return process.exitcode != 0


def kill_ranks(root: Path, prompts: Path, rng: random.Random, moment: float) -> bool:
    """Kills one of two ranks, which the other must not survive, a while after they have begun to start."""
    with start_ranks(root, prompts) as first:
        while not (ranks := children(first.pid)) and first.poll() is None:
            time.sleep(0.05)
        time.sleep(moment)
        if first.poll() is None:
            os.kill(rng.choice([first.pid, *children(first.pid)]), signal.SIGKILL)
        status = first.wait(120)
        for rank in ranks:
            assert_gone(rank)
    return status != 0


@pytest.mark.timeout(120 + 120 * KILLS)
def test_kills_at_random_moments_end_with_the_results_of_an_undisturbed_run(tmp_path: Path, prompt_file: Path) -> None:
    rng = random.Random(int(os.environ.get("NEMO_BENCH_SEED", "0")))
    begun = time.monotonic()
    whole = start(commands(tmp_path / "whole", prompt_file))
    whole.join()
    lasts = time.monotonic() - begun
    expected = found(tmp_path / "whole")
    assert whole.exitcode == 0
    assert all(any(expected[key] for key in expected if key.endswith(f" {stage}")) for stage in STAGES)
    root = tmp_path / "killed"
    hit: Counter[str] = Counter()
    ends = 0
    while hit.total() < KILLS:
        with_ranks = hit.total() % RANKS_EVERY == RANKS_EVERY - 1
        moment = rng.uniform(0, 0.4 * lasts)
        was_hit = kill_ranks(root, prompt_file, rng, moment) if with_ranks else kill_one(root, prompt_file, moment)
        hit["two ranks" if with_ranks else "one process"] += was_hit
        print(dict(hit), f"killed, {ends} folders finished", flush=True)
        if not was_hit and not with_ranks:
            assert differing(found(root), expected) == []
            shutil.rmtree(root)
            ends += 1
    last = start(commands(root, prompt_file))
    last.join()
    assert last.exitcode == 0
    assert differing(found(root), expected) == []
