"""Compares the first writing of a large report with the second, which reuses the thumbnails of the first.

Run: python benchmarks/report.py [--prompts 500] [--methods 10] [--side 512] [--elsewhere] [--json]
The run is made up, 3 images a prompt and method, with textures that compress like photographs. They are saved as a run
saves them; --elsewhere saves them without the preview inside, as other programs do, so that each is decoded whole. Each
writing is `nemo-bench report` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from nemo_bench.records.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
import fake_results

POOL = 32
"""Number of different pictures."""


def texture(numbers: np.random.Generator, side: int) -> Image.Image:
    """A picture whose spectrum falls as that of photographs does."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    waves = np.maximum(frequency, 1 / side) ** -1.2 * np.exp(2j * np.pi * numbers.random((3, *frequency.shape)))
    pixels = np.moveaxis(np.fft.irfft2(waves, s=(side, side)), 0, -1)
    return Image.fromarray(np.uint8(np.clip(128 + 55 * (pixels - pixels.mean()) / pixels.std(), 0, 255)))


def make_run(folder: Path, prompts: int, methods: int, side: int, *, preview: bool) -> Path:
    """A made-up run whose images are links to a few large ones."""
    numbers = np.random.default_rng(0)
    pool = [folder / f"{number}.png" for number in range(POOL)]
    for path in pool:
        picture = texture(numbers, side)
        if preview:
            Store(folder).save_image(path.name, picture)
        else:
            picture.save(path)
    kinds = ("VM", "TM", "TM", None)
    listed = [(f"p-{i:03d}", f"made-up prompt number {i}", kinds[i % 4]) for i in range(prompts)]
    names = {"none": "No mitigation", **{f"method{i}": f"Method {i}" for i in range(1, methods)}}
    fake_results.SIDE = 8
    return fake_results.write_fake_results(folder / "results" / "large", ["planted"], listed, names, pool)


def write(run: Path) -> tuple[float, float, float]:
    """Seconds on the clock and of all cores together, and peak megabytes, of writing the report."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "nemo_bench.cli", "report", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("the report failed")
    memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--methods", type=int, default=10)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--elsewhere", action="store_true", help="images without a preview inside")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = (arguments.prompts, arguments.methods, arguments.side)
        run = make_run(Path(folder), *size, preview=not arguments.elsewhere)
        (first, first_cpu, memory), (second, second_cpu, _) = write(run), write(run)
        result = {
            "images": sum(1 for _ in run.glob("*/images/*.png")),
            "first_seconds": round(first, 1),
            "first_cpu_seconds": round(first_cpu, 1),
            "second_seconds": round(second, 1),
            "second_cpu_seconds": round(second_cpu, 1),
            "time_ratio": round(second / first, 2),
            "peak_mb": round(memory),
            "page_mb": round((run / "report.html").stat().st_size / 1e6, 1),
            "thumbnails_mb": round(sum(path.stat().st_size for path in run.glob("*/thumbnails.json")) / 1e6, 1),
        }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
