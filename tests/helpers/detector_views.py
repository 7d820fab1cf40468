"""A prompt, views of its first step, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nemo_bench.detectors import Detector, DetectorScore, View, watch
from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Prompt
from tiny import tiny_texts

PROMPT = Prompt("p", tiny_texts(1)[0])


def view_of(model: Diffusion, latents: Tensor, timestep: int | None = None, **options: Any) -> View:
    """A step of the prompt from some latents, by default the first."""
    rows = len(latents)
    return View(
        model=model,
        text=model.encode([PROMPT.text] * rows),
        latents=latents,
        timestep=model.timesteps()[0] if timestep is None else timestep,
        seeds=range(rows),
        **{"lengths": [len(model.tokens(PROMPT.text))] * rows, **options},
    )


def generation(model: Diffusion, count: int) -> tuple[Tensor, Conditioning]:
    """Starting noise and conditioning that a detector gets for the prompt."""
    latents = model.latents(seeds_of(PROMPT, "generate", range(count)))
    return latents, model.encode([PROMPT.text] * count)


def score_of(model: Diffusion, detector: Detector) -> DetectorScore:
    """The score of the prompt."""
    scores: Sequence[DetectorScore] = watch(model, {"it": detector}, [PROMPT])[0]["it"]
    return scores[0]
