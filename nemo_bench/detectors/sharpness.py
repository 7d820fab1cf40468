"""How sharply the probability landscape bends where a prompt leads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_bench.detectors.base import Detector, Finding, View, check_counts
from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.noise import norms, score_difference, unit
from nemo_bench.errors import ConfigError
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


class Sharpness(Detector):
    """Norm of the score difference's Jacobian times the score difference (Jeon et al. 2025, section 4).

    With s the score of the prompt minus that of the empty prompt, -(conditional - unconditional noise) / sigma, it is
    the norm of s's derivative in the direction of s itself, by forward-mode differentiation, the mean over images and
    steps. The paper squares the norm, the public code does not, and neither is it squared here by default. Of models
    that predict velocity s is that of the predicted noise; the public code's has another sign and one more factor
    1 / sigma, 1.00 in the first step. The public code takes the same noise for every prompt, here each has its own.

    Derivatives are taken in the number format of the model; give float32 where half precision is too coarse.

    Args:
        seeds: Images a prompt; 1 and 4 are published.
        steps: Steps watched, from the first; published is 1, which needs no sampling.
        squared: Whether norms are squared before they are averaged, as the paper writes it.
        eta: Length of the step of a finite difference in place of the derivative, in latent units; None for the
            derivative. Ours, for kernels that have no forward mode.

    Raises:
        ConfigError: There are no seeds or steps, or ``eta`` is not finite and above 0.
    """

    title = "Sharpness"
    summary = "curvature of the log-probability along the score difference, SAIL's detector"
    sourcing = "paper and public code"
    citation = cite("jeon2025understanding")
    derives = True

    def __init__(self, seeds: int = 4, steps: int | None = 1, squared: bool = False, eta: float | None = None) -> None:
        check_counts(self.title, seeds, steps)
        if eta is not None and not 0 < eta < math.inf:
            msg = f"{self.title} needs a finite step above 0, given detector.eta={eta}"
            raise ConfigError(f"{msg}; null takes the derivative")
        self.seeds, self.steps, self.squared, self.eta = seeds, steps, squared, eta

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        model, latents, signal = view.model, view.latents, view.model.signal(view.timestep)
        direction = score_difference(view.difference, signal)

        def score(x: Tensor) -> Tensor:
            return score_difference(model.text_noise(x, view.timestep, view.text), signal)

        if self.eta is None:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
                sharpness = norms(jvp(score, (latents,), (direction.to(latents.dtype),))[1])
        else:
            ahead = score((latents.float() + self.eta * unit(direction)).to(latents.dtype))
            sharpness = norms(ahead - direction) * norms(direction) / self.eta
        return {"sharpness": sharpness**2 if self.squared else sharpness}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`."""
        return Finding(float(torch.stack([step["sharpness"] for step in seen]).mean()))
