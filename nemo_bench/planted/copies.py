"""Pairs of images of which it is known whether one copies the other, from the embedded model and its world."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.pictures import fitted_picture
from nemo_bench.planted.prompts import planted_names
from nemo_bench.planted.world import PLANTED, planted_picture, render
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import PAIRS_FILE, Prompt
from nemo_bench.records.io import replacing

Line = tuple[str, str, str, str]
"""Image, reference, label, kind."""


@torch.no_grad()
def write_pairs(
    folder: Path, model: Diffusion, general: Sequence[Prompt], seeds: int, captions: int | None = None
) -> None:
    """Writes images and ``copies.csv``, the latter last, so that it is there only once all is.

    Labels come from how images were made, not from any measure of similarity. Copies are what the model makes of a
    verbatim caption, and its training picture once encoded and decoded. Others are pictures that the world draws of the
    same caption, and what the model makes of general prompts, each beside the pictures in turn.

    Args:
        folder: Where they go.
        model: A model that repeats the pictures of all verbatim captions.
        general: Prompts that are not memorized.
        seeds: Images of each prompt, and drawn pictures of each caption.
        captions: Verbatim captions, the first ones; None for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    verbatim = [number for number, caption in enumerate(PLANTED) if caption.kind == "VM"][:captions]
    names = planted_names()
    lines: list[Line] = []
    for number in verbatim:
        name, caption = names[number], PLANTED[number]
        reference = f"{name}.png"
        Image.fromarray(planted_picture(number)).save(folder / reference)
        prompt = Prompt(name, caption.text)
        made = model.generate(prompt.text, seeds_of(prompt, "similarity", range(seeds)))
        lines += _save(folder, f"{name}-generated", made, [reference], "copy", "generated")
        picture = fitted_picture(folder / reference, model.image_size)[None]
        decoded = model.decode(model.encode_images(picture))
        lines += _save(folder, f"{name}-decoded", decoded, [reference], "copy", "encoded and decoded")
        rngs = [np.random.default_rng([67, number, variant]) for variant in range(seeds)]
        drawn = torch.from_numpy(np.stack([render(caption.scene, rng) for rng in rngs])).permute(0, 3, 1, 2) / 255
        lines += _save(folder, f"{name}-drawn", drawn, [reference], "other", "same caption")
    for place, prompt in enumerate(general):
        made = model.generate(prompt.text, seeds_of(prompt, "similarity", range(seeds)))
        beside = [f"{names[verbatim[(place * seeds + seed) % len(verbatim)]]}.png" for seed in range(seeds)]
        lines += _save(folder, prompt.id, made, beside, "other", "general prompt")
    with replacing(folder / PAIRS_FILE) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("image", "reference", "label", "kind"), *lines])


def _save(folder: Path, name: str, images: Tensor, references: Sequence[str], label: str, kind: str) -> list[Line]:
    """Saves images, (N, 3, height, width) in [0, 1]; references are of each, or one of all."""
    lines = []
    for number, image in enumerate(images):
        file = f"{name}-{number}.png"
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.cpu().numpy()).save(folder / file)
        lines.append((file, references[number % len(references)], label, kind))
    return lines
