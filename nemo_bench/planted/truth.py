"""Which own neurons of the planted captions cause the repetition: the truth that localizers are measured against."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nemo_bench.diffusion import Diffusion
from nemo_bench.metrics import SSIM, PixelDistance
from nemo_bench.planted.prompts import planted_names
from nemo_bench.planted.world import PLANTED, render
from nemo_bench.prompts import read_prompts
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.images import open_image
from nemo_bench.records.io import write_text
from nemo_bench.records.truth import read_isolation

PIXEL_LIMIT = 0.15
"""Root mean squared pixel difference, in [0, 1], below which an image counts as extracted (Carlini et al. 2023)."""
UNRELATED = 0.99
"""Quantile of the similarity to pictures that have nothing to do with an image, above which it counts as copy."""
STEPS, GUIDANCE = 20, 2.0
"""Steps and guidance of the images, as ``model=planted_routed`` has them."""
FREE = 200
"""Pictures of a planted caption as a general one, whose similarity to the planted picture is by chance."""


@dataclass(frozen=True)
class Likeness:
    """Measures whether images copy planted pictures.

    An image copies a picture if its SSIM is above what pictures of the same caption reach by chance, and above that of
    unrelated images, and its pixel distance below the published limit. Of a template, whose panel differs from
    picture to picture, only the first is asked.
    """

    pictures: Mapping[str, Tensor]  #: Training pictures by prompt id, (N, 3, height, width), in [0, 1].
    limits: Mapping[str, float]  #: SSIM by prompt id.

    @classmethod
    def measure(cls, prompts: Sequence[Prompt], unrelated: Tensor) -> Likeness:
        """Sets the limits from unrelated images, (N, 3, height, width), and pictures that are drawn here."""
        pictures = {prompt.id: _pixels(map(open_image, prompt.references)) for prompt in prompts}
        limits = {}
        for prompt in prompts:
            index = planted_names().index(prompt.id)
            rngs = [np.random.default_rng([66, index, variant]) for variant in range(FREE)]
            free = torch.from_numpy(np.stack([render(PLANTED[index].scene, rng) for rng in rngs]))
            chance = SSIM().nearest(free.permute(0, 3, 1, 2).float() / 255, pictures[prompt.id])
            strangers = SSIM().nearest(unrelated, pictures[prompt.id])
            limits[prompt.id] = float(max(chance.quantile(UNRELATED), strangers.quantile(UNRELATED)))
        return cls(pictures, limits)

    def copies(self, images: Tensor, prompt: Prompt) -> Tensor:
        """Which images, (N, 3, height, width), copy a picture of a prompt, (N,)."""
        alike = SSIM().nearest(images, self.pictures[prompt.id]) > self.limits[prompt.id]
        if prompt.kind == "VM":
            alike &= PixelDistance().nearest(images, self.pictures[prompt.id]) < PIXEL_LIMIT
        return alike


@dataclass(frozen=True)
class Evidence:
    """Parts of a prompt's images that copy a planted picture, each 0 to 1."""

    prompt: str  #: Its id.
    neurons: int  #: Number of its own neurons.
    nothing_off: float
    own_off: float  #: With its own neurons off.
    another_instead: float  #: With its own neurons off, the picture of another verbatim prompt.
    others_off: float  #: With as many other neurons off, drawn at random.

    @property
    def causes(self) -> bool:
        """Whether its own neurons, and no others, cause the repetition in all images."""
        return self.nothing_off == self.others_off == 1 and self.own_off == self.another_instead == 0


def write_truth(folder: Path, seeds: int = 8) -> list[Evidence]:
    """Finds the causes in a finished training of the routed variant, and writes them down.

    ``truth.json`` holds the neurons of the prompts whose repetition they cause, ``evidence.json`` what was seen of all.
    """
    prompts, general = (read_prompts(folder / "prompts" / f"{name}.jsonl") for name in ("planted", "general"))
    own = read_isolation(folder).neurons
    model = Diffusion.load(str(folder / "model" / "pipeline"), steps=STEPS, guidance=GUIDANCE)
    evidence = find_causes(model, prompts, general, own, seeds)
    neurons = {each.prompt: dict(own[each.prompt]) for each in evidence if each.causes}
    write_text(folder / "evidence.json", json.dumps(list(map(asdict, evidence)), indent=1) + "\n")
    write_text(folder / "truth.json", json.dumps({"schema": 1, "neurons": neurons}, indent=1) + "\n")
    return evidence


@torch.no_grad()
def find_causes(
    model: Diffusion, prompts: Sequence[Prompt], general: Sequence[Prompt], own: Mapping[str, Neurons], seeds: int = 8
) -> list[Evidence]:
    """Switches the own neurons of every planted prompt off, and as many others.

    Args:
        model: The trained model.
        prompts: The planted prompts.
        general: Prompts whose images have nothing to do with the planted pictures.
        own: Own neurons by prompt id.
        seeds: Images of a prompt with the same neurons off.
    """
    unrelated = torch.cat([_images(model, prompt, seeds) for prompt in general])
    likeness = Likeness.measure(prompts, unrelated)
    rng = np.random.default_rng(0)
    places = [(name, index) for name, width in model.masks.widths.items() for index in range(width)]
    found = []
    for prompt in tqdm(prompts, desc="truth"):
        mine = own[prompt.id]
        strangers = [place for place in places if place[1] not in mine.get(place[0], ())]
        chosen = [strangers[i] for i in rng.choice(len(strangers), min(mine.count, len(strangers)), replace=False)]
        drawn = Neurons({layer: [index for name, index in chosen if name == layer] for layer, _ in chosen})
        off = _images(model, prompt, seeds, mine)
        another = torch.zeros(seeds, dtype=torch.bool)
        for other in prompts:
            if other.kind == "VM" and other.id != prompt.id:
                another |= likeness.copies(off, other)
        found.append(
            Evidence(
                prompt.id,
                mine.count,
                _share(likeness.copies(_images(model, prompt, seeds), prompt)),
                _share(likeness.copies(off, prompt)),
                _share(another),
                _share(likeness.copies(_images(model, prompt, seeds, drawn), prompt)),
            )
        )
    return found


def _share(flags: Tensor) -> float:
    return float(flags.float().mean())


def _images(model: Diffusion, prompt: Prompt, seeds: int, neurons: Neurons | None = None) -> Tensor:
    with model.block(neurons or Neurons()):
        return model.generate(prompt.text, seeds_of(prompt, "truth", range(seeds)))


def _pixels(images: Iterable[object]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
