"""Measures how much of their time the processes of a run work, where prompts differ tenfold in cost.

Run: python benchmarks/scaling.py [--prompts 42] [--seconds 60] [--json]
Each run is a stage of the package with a Lightning trainer of its own: on 1 and 2 processes of one thread that multiply
matrices, and on 1 and 4 that sleep instead, so that more processes than cores can be tried. What prompts cost is
drawn from 1 to 10, evenly in the logarithm. Idle is the share of the time, from the first batch to the end of the last
process, in which a process has nothing to do; efficiency is the time of one process divided by n times that of n. Both
are measured with the costliest prompts first, as where costs are known from another cell, and in the order of the list,
as where they are not. The baseline deals prompts out beforehand, every n-th to each process, by the times measured.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_bench.benchmark.runner import Runner
from nemo_bench.benchmark.stages.base import Stage
from nemo_bench.config import TrainerSettings
from nemo_bench.records.schema import Record

SIDE = 256
"""Of the matrices."""


def multiply(matrix: torch.Tensor, count: int) -> None:
    for _ in range(count):
        matrix @ matrix


def seconds_of_one() -> float:
    """Seconds that a product takes."""
    torch.set_num_threads(1)
    matrix = torch.ones(SIDE, SIDE)
    multiply(matrix, 200)
    start = time.perf_counter()
    multiply(matrix, 2000)
    return (time.perf_counter() - start) / 2000


def run_process(how: str, processes: int, costs: Sequence[float], each: float, folder: Path) -> None:
    """Runs the stage in this process, and writes when it was busy with which prompt."""
    torch.set_num_threads(1)
    matrix = torch.ones(SIDE, SIDE)
    busy: list[tuple[int, float, float]] = []

    def handle(stage: Stage, batch: Sequence[tuple[int, float]]) -> list[Record]:
        for number, cost in batch:
            start = time.time()
            if how == "sleep":
                time.sleep(cost)
            else:
                multiply(matrix, round(cost / each))
            busy.append((number, start, time.time()))
        return []

    runner = Runner(TrainerSettings(accelerator="cpu", devices=processes), progress=False)
    runner.start()
    runner.predict(Stage(handle, Record, None), [[task] for task in enumerate(costs)], "")
    (folder / f"{runner.trainer.global_rank}.json").write_text(json.dumps(busy))
    runner.wait()


def measure(how: str, processes: int, costs: Sequence[float], each: float) -> dict[str, float]:
    """Seconds, idle share, and idle share if the same prompts had been dealt out."""
    with tempfile.TemporaryDirectory() as folder:
        words = [how, str(processes), json.dumps(list(costs)), str(each), folder]
        subprocess.run([sys.executable, __file__, "--process", *words], check=True)
        ranks: list[list[Any]] = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    spans = [span for rank in ranks for span in rank]
    begin, end = min(start for _, start, _ in spans), max(stop for _, _, stop in spans)
    took = {number: stop - start for number, start, stop in spans}
    assert len(took) == len(spans) == len(costs), "a prompt was taken twice, or never"
    dealt = [sum(took[number] for number in range(rank, len(costs), processes)) for rank in range(processes)]
    return {
        "seconds": end - begin,
        "idle": 1 - sum(took.values()) / (processes * (end - begin)),
        "dealt idle": 1 - sum(dealt) / (processes * max(dealt)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=42)
    parser.add_argument("--seconds", type=float, default=60, help="work of one process, in seconds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    draw = random.Random(0)
    drawn = [10 ** draw.random() for _ in range(arguments.prompts)]
    costs = [arguments.seconds * cost / sum(drawn) for cost in drawn]
    each = seconds_of_one()
    results: dict[str, dict[str, float]] = {}
    for how, count in (("compute", 2), ("sleep", 4)):
        one = measure(how, 1, costs, each)["seconds"]
        for order, ordered in (("costliest first", sorted(costs, reverse=True)), ("in order of the list", costs)):
            found = measure(how, count, ordered, each)
            name = f"{count} processes, {how}, {order}"
            results[name] = {"efficiency": one / (count * found["seconds"]), **found}
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print("| run | efficiency | idle | idle if dealt beforehand |\n| --- | ---: | ---: | ---: |")
    for name, row in results.items():
        print(f"| {name} | {row['efficiency']:.3f} | {row['idle']:.3f} | {row['dealt idle']:.3f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        how, processes, costs, each, folder = sys.argv[2:]
        run_process(how, int(processes), json.loads(costs), float(each), Path(folder))
    else:
        main()
