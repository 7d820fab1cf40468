"""Gradient of a prompt's magnitude by each of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import FAMILIES, Diffusion
from nemo_bench.diffusion.noise import norms
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class TokenSignificance(Detector):
    """Norm of the magnitude's gradient by the embedding of each token (Wen et al. 2024, section 4).

    The paper uses it as an explanation, not as a detector. The records keep ``tokens``, pairs of a token and its
    significance, the mean over images and steps, without begin, end and padding; the score is the largest of them.

    Each image has its own significance, then they are averaged. The public script takes one norm over the whole batch
    and one embedding that its images share, so gradients add up before their norm is taken. It also mixes up the
    halves of the batch. For a single image the gradient is the same but for a factor; its sampling between the steps is
    not, since it is guided away from the prompt. Here sampling is that of every other detector.

    Nothing is published for transformers. Tokens of Stable Diffusion 3 are CLIP's, then T5's; for flow matching the
    magnitude is that of velocities. Where a model takes a pooled embedding as well, ``pooled`` is the gradient by it,
    which no token has a share in.
    """

    title = "Token significance"
    summary = "largest gradient of the noise magnitude by a token; explains which tokens trigger"
    sourcing = "public code"
    families = frozenset(FAMILIES)
    citation = cite("wen2024detecting")
    derives = True

    seeds: Count = 4
    steps: Count | None = None

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        text, unconditional = view.text, view.unconditional
        with torch.enable_grad():
            # Leaves are float32, since half precision would round small gradients to zero.
            given = {"text": text.text} if text.pooled is None else {"text": text.text, "pooled": text.pooled}
            leaves = {name: values.float().clone().requires_grad_() for name, values in given.items()}
            moved = replace(text, **{name: leaf.to(given[name].dtype) for name, leaf in leaves.items()})
            conditional = view.model.predict_noise(view.latents, view.timestep, moved)
            gradient, *pooled = torch.autograd.grad(norms(conditional - unconditional).sum(), [*leaves.values()])
        gradient = torch.where(view.model.family.used(text), gradient, 0)
        found = {"significance": gradient.norm(dim=2)}
        return {**found, "pooled": pooled[0].norm(dim=1)} if pooled else found

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        means = torch.stack([step["significance"] for step in observed]).mean((0, 1)).tolist()
        words = model.words(prompt.text)
        details: dict[str, Any] = {"tokens": [[token, round(means[position], 5)] for position, token in words]}
        if "pooled" in observed[0]:
            details["pooled"] = round(float(torch.stack([step["pooled"] for step in observed]).mean()), 5)
        return DetectorScore(max((means[position] for position, _ in words), default=0.0), details)
