"""Compares images scored per second by the metrics of pixels that are on by default with all pairs compared in full.

Run: python benchmarks/nearest.py [--references 500] [--size 512] [--prompts 16] [--rounds 3] [--json]
Prompts have four images each. Those of every other prompt are noisy copies of its training image, others are new. Each
half is scored as a batch of a run is, and its first prompt plainly: each metric for itself, each image compared with
all training images, whose moments are computed once a prompt. Both must give the same numbers, and are timed by image.
Scores in turns, and takes medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from nemo_bench.benchmark.stages.base import Stage
from nemo_bench.benchmark.stages.score import PromptSample, References, SampleReader, Scorer
from nemo_bench.errors import StoreError
from nemo_bench.metrics import (
    SSIM,
    BenchMetric,
    Change,
    MemorizationRate,
    NearestTrainingImage,
    PixelDistance,
    TiledDistance,
    TrainingImage,
)
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.data import Prompt
from nemo_bench.records.schema import ImageRecord, ScoreRecord

SEEDS = 4
METRICS: dict[str, BenchMetric] = {
    "ssim": TrainingImage(SSIM()),
    "ssim_nearest": NearestTrainingImage(SSIM()),
    "tiled_l2": TrainingImage(TiledDistance()),
    "memorized": MemorizationRate(PixelDistance(), 0.15),
    "ssim_change": Change(SSIM()),
}


def scene(seed: int, size: int) -> Image.Image:
    """A gradient, shapes of all sizes that hide one another, and a texture with the spectrum of photographs."""
    random = np.random.default_rng(seed)

    def noise(side: int, channels: int) -> NDArray[np.float64]:
        coarse = [Image.fromarray(random.integers(0, 256, (side, side), np.uint8)) for _ in range(channels)]
        fine = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in coarse]
        return np.stack(fine, -1) / 255.0

    picture = Image.fromarray((255 * noise(2, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(10 ** random.uniform(0.5, 2.5))):
        x, y = random.uniform(0, size, 2)
        width, height = size * 0.5 * random.random(2) ** 2.5 + 4
        color = tuple(random.integers(0, 256, 3).tolist())
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape([x - width, y - height, x + width, y + height], fill=color)
    texture = sum((noise(side, 1) - 0.5) * 16 / side for side in (16, 32, 64, 128, 256))
    strength = 255 * random.uniform(0.02, 0.5) * noise(5, 1)
    return Image.fromarray(np.clip(np.asarray(picture) + strength * texture, 0, 255).astype(np.uint8))


def noisy(picture: Image.Image, seed: int) -> Image.Image:
    """A copy as a model makes it."""
    random = np.random.default_rng(seed)
    pixels = np.asarray(picture) + random.normal(0, 6, (picture.height, picture.width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def plainly(sample: PromptSample, pool: torch.Tensor) -> list[dict[str, float]]:
    """Scores of each image of a prompt, each metric for itself."""
    device = pool.device
    values: dict[str, list[float]] = {}
    for name, metric in METRICS.items():
        fields = {f: pool if f == "pool" else sample.field(f, metric.space, device) for f in metric.needs}
        if isinstance(metric, NearestTrainingImage):
            values[name] = metric.space.compare(fields["images"], pool).amax(1).tolist()
        else:
            values[name] = metric.score(**fields).tolist()
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What some work gives, and its seconds and seconds of processors."""
    start, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--references", type=int, default=500)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=16, help="half of them are scored at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        files = [root / f"reference{number}.png" for number in range(arguments.references)]
        for number, file in enumerate(files):
            scene(number, arguments.size).save(file, compress_level=1)
        records, unmitigated, tasks = [], {}, []
        for number, reference in enumerate(files[: arguments.prompts]):
            tasks.append(Task.of_prompt(Prompt(str(number), "a picture", "VM", (reference,))))
            for seed in range(SEEDS):
                name, key = f"{number}_{seed}.png", 10**6 + SEEDS * number + seed
                copy = noisy(Image.open(reference), key)
                image = scene(key, arguments.size) if number % 2 else copy
                image.save(root / name, compress_level=1)
                copy.save(root / f"plain_{name}", compress_level=1)
                records.append(ImageRecord(id=name, prompt=str(number), seed=seed, image=name, size=image.size))
                unmitigated[name] = root / f"plain_{name}"
        reader = SampleReader(METRICS.values(), root, records, unmitigated=unmitigated)
        references = References(files)
        stage = Stage(lambda stage, samples: [], ScoreRecord, None).to(device)
        size = (arguments.size, arguments.size)
        _, prepare, prepare_processor = timed(lambda: references.pool(SSIM(), size, device))
        pool = torch.cat([SSIM().embed([Image.open(file)], size, device) for file in files])

        scorer = Scorer(METRICS, references)

        def score_plainly(tasks: list[Task]) -> list[dict[str, float]]:
            samples = reader(tasks)
            assert not isinstance(samples, StoreError)
            return plainly(samples[0], pool)

        def score(tasks: list[Task]) -> list[ScoreRecord]:
            return scorer(stage, reader(tasks))

        rounds = []
        for _ in range(arguments.rounds):
            figures: dict[str, NDArray[np.float64]] = {}
            for kind, chosen in (("copies", tasks[::2]), ("new images", tasks[1::2])):
                plain, *of_plain = timed(partial(score_plainly, chosen[:1]))
                ours, *of_ours = timed(partial(score, chosen))
                found = [record.scores for record in ours if record.seed is not None]
                assert len(found) == SEEDS * len(chosen)
                for one, other in zip(found, plain, strict=False):
                    assert all(abs(one[name] - other[name]) < 2e-6 for name in METRICS)
                figures[kind] = np.array([of_plain, of_ours]) / [[len(plain)], [len(found)]]
            rounds.append(figures | {"both": np.mean([*figures.values()], 0)})
    result = {"once: seconds": prepare, "once: processor seconds": prepare_processor}
    for kind in rounds[0]:
        ratios = [of_plain / of_ours for of_plain, of_ours in (figures[kind] for figures in rounds)]
        result[f"{kind}: time ratio"], result[f"{kind}: processor time ratio"] = np.median(ratios, 0).tolist()
    result["images per processor second"] = median(1 / figures["both"][1, 1] for figures in rounds)
    if arguments.json:
        print(json.dumps(result))
        return
    print("| measure | value |\n| --- | ---: |")
    for measure, value in result.items():
        print(f"| {measure} | {value:.2f} |")


if __name__ == "__main__":
    main()
