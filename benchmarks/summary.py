"""Compares summing up a cell with the plain way, in which every interval and test of every metric draws for itself.

Run: python benchmarks/summary.py [--prompts 5000] [--images 4] [--repeats 3] [--alone] [--json]
Scores are made up: nine metrics, seven of them of images, of a cell and of the one without mitigation that it is paired
with; --alone leaves out that cell, and so all tests. Both ways must give the same tables to the last bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from nemo_bench.records.data import Kind, Prompt
from nemo_bench.records.schema import MetricInfo, ScoreRecord
from nemo_bench.records.statistics import aggregate, presets

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
import plain_statistics as plain

OF_TRAINING = ["ssim", "sscd", "l2"]
OF_IMAGES = [*OF_TRAINING, "ssim_change", "sscd_change", "lpips_change", "alignment"]
OF_PROMPTS = ["diversity", "neurons"]
KINDS: tuple[Kind | None, ...] = ("VM", "TM", "TM", None, None)


def about(metric: str) -> MetricInfo:
    """What a made-up metric is."""
    measure = "TrainingImage" if metric in OF_TRAINING else metric
    per = "image" if metric in OF_IMAGES else "prompt"
    return MetricInfo(title=metric, measure=measure, family=metric, per=per, higher_is_better=False)


def make_scores(prompts: list[Prompt], images: int, seed: int) -> list[ScoreRecord]:
    """Made-up records of the score stage."""
    random = np.random.default_rng(seed)
    records = []
    for prompt in prompts:
        for number in (*range(images), None):
            names = OF_PROMPTS if number is None else OF_IMAGES
            scores = dict(zip(names, random.normal(0.5, 0.2, len(names)).round(6).tolist(), strict=True))
            records.append(ScoreRecord(id=f"{prompt.id} {number}", prompt=prompt.id, seed=number, scores=scores))
    return records


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds on the clock and of the processor, and the result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - processor, result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="of a cell that is compared with no other")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prompts = [Prompt(str(i), "", KINDS[i % len(KINDS)]) for i in range(arguments.prompts)]
    own, unmitigated = (make_scores(prompts, arguments.images, seed) for seed in (0, 1))
    if arguments.alone:
        unmitigated = []
    infos = {metric: about(metric) for metric in (*OF_IMAGES, *OF_PROMPTS)}

    def shared() -> tuple[Any, Any]:
        found = presets(own, prompts, infos)
        return aggregate(own, prompts, unmitigated), {name: preset.rows for name, preset in found.items()}

    def apart() -> tuple[Any, Any]:
        rows = plain.presets(own, prompts, OF_TRAINING, ["alignment"])
        return plain.aggregate(own, prompts, unmitigated), rows

    times = []
    for _ in range(arguments.repeats):
        wall, processor, result = timed(shared)
        plain_wall, plain_processor, expected = timed(apart)
        if result != expected:
            raise SystemExit("the two ways differ")
        times.append((wall, processor, plain_wall, plain_processor))
    wall, processor, plain_wall, plain_processor = (median(column) for column in zip(*times, strict=True))
    tracemalloc.start()
    shared()
    figures = {
        "prompts": arguments.prompts,
        "plain_seconds": round(plain_wall, 2),
        "plain_cpu_seconds": round(plain_processor, 2),
        "seconds": round(wall, 2),
        "cpu_seconds": round(processor, 2),
        "time_ratio": round(plain_wall / wall, 2),
        "cpu_ratio": round(plain_processor / processor, 2),
        "peak_mb": round(tracemalloc.get_traced_memory()[1] / 1e6),
    }
    print(json.dumps(figures) if arguments.json else "\n".join(f"{key}: {value}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
