"""Shows that memory does not grow with the number of images scored, and compares images per second with a plain loop.

Run: python benchmarks/score.py [--images 500] [--size 256] [--json] [key=value ...]
Makes JPEGs named as the public scripts do, four a prompt. N and 4N of them are scored with `nemo-bench score`, each in
a process of its own whose peak memory is taken. Then 4N are scored once more, and by a plain loop that opens one image
after the other and compares it with its prompt by the same open_clip model; both must give the same numbers. The words
key=value are settings, such as model=sd14 trainer=gpu trainer.workers=4.
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
from typing import Any

import numpy as np
import torch
from PIL import Image

from nemo_bench.benchmark.plan import metrics_of
from nemo_bench.benchmark.rescore import cells_of
from nemo_bench.benchmark.run import renew_scores
from nemo_bench.benchmark.runner import Runner
from nemo_bench.metrics.networks import loaded
from nemo_bench.records.schema import ScoreRecord

METRICS = """\
alignment:
  _target_: nemo_bench.metrics.Alignment
  space: {_target_: nemo_bench.metrics.OpenClip, model: "${model.clip}", pretrained: "${model.clip_pretrained}"}
"""
SEEDS = 4


def plain_loop(folder: Path, texts: list[str], network: Any) -> list[float]:
    """Alignment of each image."""
    device = next(network.parameters()).device
    scores = []
    with torch.no_grad():
        for number, prompt in enumerate(texts):
            text = network.encode_text(network.tokenizer([prompt]).to(device), normalize=True)
            for seed in range(SEEDS):
                picture = Image.open(folder / f"img_{number:04d}_{seed:02d}.jpg")
                pixels = network.preprocess(picture)[None].to(device)
                scores.append((network.encode_image(pixels, normalize=True) @ text.T).item())
    return scores


def peak_memory(command: list[str]) -> float:
    """Peak megabytes of a command."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        if status:
            raise SystemExit(output.read().decode())
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit / 1e6


def make_images(folder: Path, count: int, size: int) -> None:
    """Smooth random pictures, which compress about as photographs do."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        image = coarse.resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"img_{number // SEEDS:04d}_{number % SEEDS:02d}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=500, help="N; a multiple of 4")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.images % SEEDS:
        parser.error(f"--images: expected a multiple of {SEEDS}")
    overrides = arguments.overrides
    if not any(word.startswith("model=") for word in overrides):
        overrides = ["model=planted", *overrides]

    few, many = arguments.images, 4 * arguments.images
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        conf = root / "conf"
        (conf / "metrics").mkdir(parents=True)
        (conf / "metrics" / "alignment.yaml").write_text(METRICS)
        texts = [f"a picture of number {number}" for number in range(many // SEEDS)]
        (root / "prompts.txt").write_text("\n".join(texts))
        memory = {}
        for count in (few, many):
            folder = root / f"images{count}"
            folder.mkdir()
            make_images(folder, count, arguments.size)
            words = [f"prompts.files=[{root / 'prompts.txt'}]", f"root={root}", "metrics=alignment", *overrides]
            words.append(f"prompts.limit={count // SEEDS}")
            score = [sys.executable, "-m", "nemo_bench.cli", "score", str(folder), "--json", "--conf", str(conf)]
            memory[count] = peak_memory([*score, *words, f"name=run{count}"])
        (cell,) = cells_of(folder, [*words, "name=rate"], conf=conf, progress=False)
        runner = Runner(cell.config.settings.trainer, progress=False)
        network = loaded(metrics_of(cell)["alignment"].space, runner.trainer.strategy.root_device)
        plain_loop(folder, texts[:4], network)
        start = time.perf_counter()
        expected = plain_loop(folder, texts, network)
        plain = many / (time.perf_counter() - start)
        renew_scores([cell])
        start = time.perf_counter()
        runner.score(cell)
        ours = many / (time.perf_counter() - start)
        records = cell.store.records(ScoreRecord).values()
        found = [record.scores["alignment"] for record in records if record.seed is not None]
        assert len(found) == len(expected)
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4
    result = {
        "images": few,
        "peak_memory_mb": memory[few],
        "peak_memory_mb_of_four_times_as_many": memory[many],
        "memory_ratio": memory[many] / memory[few],
        "images_per_second": ours,
        "plain_images_per_second": plain,
        "speed_ratio": ours / plain,
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print("| measure | value |\n| --- | ---: |")
    for key, value in result.items():
        print(f"| {key.replace('_', ' ')} | {f'{value:.2f}' if isinstance(value, float) else value} |")


if __name__ == "__main__":
    main()
