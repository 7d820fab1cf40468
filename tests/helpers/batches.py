"""Batches for methods, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_bench import Diffusion, Neurons, Prompt
from nemo_bench.methods import Batch, Method
from nemo_bench.prompts.tasks import seeds_of
from tiny import tiny_texts


def batch_of(model: Diffusion, images: Sequence[tuple[int, int]], texts: Sequence[str] | None = None) -> Batch:
    """Images to be generated, each given as number of its prompt and number of its seed."""
    texts = texts or tiny_texts(16)
    prompts = tuple(Prompt(f"p{number}", texts[number]) for number, _ in images)
    seeds = tuple(seeds_of(prompt, "generate", [seed])[0] for prompt, (_, seed) in zip(prompts, images, strict=True))
    text = model.encode([prompt.text for prompt in prompts])
    return Batch(prompts, text, model.latents(seeds), seeds, (Neurons(),) * len(prompts))


def images_of(model: Diffusion, method: Method, batch: Batch) -> torch.Tensor:
    """The images that a method lets the model generate."""
    with method.apply(model, batch) as changed:
        return changed.generate_checked(model).images
