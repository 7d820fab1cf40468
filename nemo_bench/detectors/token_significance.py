"""Gradient of a prompt's magnitude by each of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import Diffusion
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
    """

    title = "Token significance"
    summary = "largest gradient of the noise magnitude by a token; explains which tokens trigger"
    sourcing = "public code"
    citation = cite("wen2024detecting")
    derives = True

    seeds: Count = 4
    steps: Count | None = None

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        embedding, unconditional = view.text.text, view.unconditional
        with torch.enable_grad():
            # The leaf is float32, since half precision would round small gradients to zero.
            leaf = embedding.float().clone().requires_grad_()
            text = replace(view.text, text=leaf.to(embedding.dtype))
            conditional = view.model.predict_noise(view.latents, view.timestep, text)
            (gradient,) = torch.autograd.grad(norms(conditional - unconditional).sum(), leaf)
        return {"significance": gradient.norm(dim=2)}

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        tokens = model.tokens(prompt.text)
        values = torch.stack([step["significance"] for step in observed]).mean((0, 1))[1 : len(tokens) - 1].tolist()
        pairs = [[token, round(value, 5)] for token, value in zip(tokens[1:-1], values, strict=True)]
        return DetectorScore(max(values, default=0.0), {"tokens": pairs})
