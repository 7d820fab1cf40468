"""Curvature of the log-probability along the direction of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from nemo_bench.detectors.base import Detector, View
from nemo_bench.diffusion import FAMILIES
from nemo_bench.diffusion.noise import norms, score_difference, unit
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Count, Positive


@dataclass(eq=False)
class Sharpness(Detector):
    """Norm of the score difference's Jacobian times the score difference (Jeon et al. 2025, section 4).

    With s the score of the prompt minus that of the empty prompt, -(conditional - unconditional noise) / sigma, it is
    the norm of s's derivative in the direction of s itself, by forward-mode differentiation in the number format of the
    model, the mean over images and steps (published: 1 or 4 images, the first step). The paper squares the norm, the
    public code does not; nor does the default here. For models that predict velocity s is that of the predicted noise;
    the public code's has another sign and one more factor 1 / sigma, 1.00 in the first step. The public code uses the
    same noise for every prompt; here each has its own.

    Nothing is published for transformers. For flow matching s is the difference of velocities: at the first step the
    score says nothing of the prompt. There a network that is trained well hardly looks at the latents either; ``steps``
    above 1 adds later steps.
    """

    title = "Sharpness"
    summary = "curvature of the log-probability along the score difference, SAIL's detector"
    sourcing = "paper and public code"
    families = frozenset(FAMILIES)
    citation = cite("jeon2025understanding")
    derives = True

    seeds: Count = 4
    steps: Count | None = 1
    squared: bool = False  #: Whether norms are squared before they are averaged, as in the paper's formula.
    #: Length of the step of a finite difference in place of the derivative, in latent units; None for the derivative.
    #: Our addition, for kernels without forward mode.
    eta: Positive | None = None

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        model, latents = view.model, view.latents
        flows = model.schedule.quantity == "velocity"
        deviation = 1.0 if flows else model.schedule.mixture(view.timestep)[1]
        direction = score_difference(view.step.difference, deviation)

        def score(x: Tensor) -> Tensor:
            return score_difference(model.text_noise(x, view.timestep, view.text), deviation)

        if self.eta is None:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
                sharpness = norms(jvp(score, (latents,), (direction.to(latents.dtype),))[1])
        else:
            ahead = score((latents.float() + self.eta * unit(direction)).to(latents.dtype))
            sharpness = norms(ahead - direction) * norms(direction) / self.eta
        return {"sharpness": sharpness**2 if self.squared else sharpness}
