"""Which tokens a prompt's magnitude hangs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nemo_bench.detectors.base import Detector, Finding, View, check_counts
from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.noise import norms
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


class TokenSignificance(Detector):
    """Norm of the magnitude's gradient by the embedding of each token (Wen et al. 2024, section 4).

    An explanation first of all: tokens and their significance, the mean over images and steps, are kept in the records,
    begin, end and padding left out. The paper makes no detector of it; the score here is the largest of them.

    Significance is that of each image by itself, then averaged. The public script takes one norm over the whole batch
    and one embedding that its images share, so that gradients add up before their norm is taken. It also mixes up the
    halves of the batch. For a single image the gradient survives all that but for a factor; the sampling between its
    steps does not, which is guided away from the prompt. Here sampling is that of every other detector.

    Args:
        seeds: Images a prompt.
        steps: Steps watched, None for all, as published.

    Raises:
        ConfigError: There are no seeds or steps.
    """

    title = "Token significance"
    summary = "largest gradient of the noise magnitude by a token; explains which tokens trigger"
    sourcing = "public code"
    citation = cite("wen2024detecting")
    derives = True

    def __init__(self, seeds: int = 4, steps: int | None = None) -> None:
        check_counts(self.title, seeds, steps)
        self.seeds, self.steps = seeds, steps

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        text, unconditional = view.text, view.unconditional
        with torch.enable_grad():
            # The leaf is float32: half precision would round small gradients to nothing.
            leaf = text.text.float().requires_grad_()
            own = replace(text, text=leaf.to(text.text.dtype))
            conditional = view.model.predict_noise(view.latents, view.timestep, own)
            (gradient,) = torch.autograd.grad(norms(conditional - unconditional).sum(), leaf)
        return {"significance": gradient.norm(dim=2)}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`; ``tokens`` are pairs of token and significance."""
        tokens = model.tokens(prompt.text)
        values = torch.stack([step["significance"] for step in seen]).mean((0, 1))[1 : len(tokens) - 1].tolist()
        pairs = [[token, round(value, 5)] for token, value in zip(tokens[1:-1], values, strict=True)]
        return Finding(max(values, default=0.0), {"tokens": pairs})
