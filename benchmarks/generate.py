"""Compares images per second with the plain diffusers pipeline at the same settings.

Run: python benchmarks/generate.py [--images 64] [--batch 16] [--compile] [--json] [key=value ...]
The words key=value are settings of `nemo-bench run`, such as model=sd14 model.dtype=float16. Both sides make the same
images, batch by batch, from the same noise; ours with other neurons blocked in each row. Each side makes one batch
before the clock starts, and the two take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from nemo_bench import Diffusion, Neurons, read_prompts, resolve
from nemo_bench.benchmark.runner import load_model
from nemo_bench.config import ModelSettings, grid


def plain_side(model: Diffusion) -> Callable[[list[str], Tensor], Tensor]:
    """The pipeline's own call, texts and all."""
    pipeline: DiffusionPipeline = model.pipeline
    pipeline.scheduler = model.scheduler
    pipeline.set_progress_bar_config(disable=True)

    def generate(texts: list[str], latents: Tensor) -> Tensor:
        images: Tensor = pipeline(
            texts,
            latents=latents,
            num_inference_steps=model.steps,
            guidance_scale=model.guidance,
            output_type="pt",
        ).images
        return images

    return generate


def our_side(model: Diffusion) -> Callable[[list[str], Tensor], Tensor]:
    layer, width = next(iter(model.masks.widths.items()))

    def generate(texts: list[str], latents: Tensor) -> Tensor:
        with model.block([Neurons({layer: [row % width]}) for row in range(len(texts))]):
            return model.generate(model.encode(texts), latents)

    return generate


def load(settings: ModelSettings) -> Diffusion:
    return load_model(settings).to("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="compile our side with torch.compile")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    settings = grid([*arguments.overrides, "method=none"])[0].settings
    texts = [p.text for file in settings.prompts.files for p in read_prompts(resolve(file))][: arguments.batch]
    plain = load(settings.model)
    settings.model.compiled = arguments.compile
    ours = load(settings.model)
    sides = {"plain": plain_side(plain), "ours": our_side(ours)}
    seconds = dict.fromkeys(sides, 0.0)
    batches = max(1, arguments.images // len(texts))
    for number in tqdm(range(batches + 1), desc="batches"):
        latents = plain.latents(range(number * len(texts), (number + 1) * len(texts)))
        for name, side in sides.items():
            start = time.perf_counter()
            side(texts, latents)
            if plain.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] += (time.perf_counter() - start) * (number > 0)
    result = {
        "device": torch.cuda.get_device_name() if plain.device.type == "cuda" else "cpu",
        "compiled": arguments.compile,
        "batch": len(texts),
        "images": batches * len(texts),
        **{f"{name}_images_per_second": batches * len(texts) / value for name, value in seconds.items()},
        "speed_ratio": seconds["plain"] / seconds["ours"],
    }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
