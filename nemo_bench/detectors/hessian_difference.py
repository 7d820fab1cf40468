"""Difference between the gradients of both halves' squared norms, which stands for that of their curvatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, View
from nemo_bench.diffusion import FAMILIES
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class HessianDifference(Detector):
    """Squared norm of J_c^T e_c - J_u^T e_u on pure noise (anonymous public code of 2026, "metric 2").

    e_c and e_u are the noises predicted for the prompt and for the empty one, J_c and J_u their derivatives by the
    latents; the difference is the gradient of (|e_c|^2 - |e_u|^2) / 2, so one backward pass makes it. In scores it is
    the difference of each Hessian times its score, of another scale. The score is the mean over starting noises; a few
    prompts have values far above all others. For models that predict velocity the noise is converted before
    derivatives are taken. Half precision can overflow; take ``model.dtype=float32``.

    Nothing is published for transformers; for flow matching e_c and e_u are velocities.
    """

    title = "Hessian difference"
    summary = "how far curvature with the prompt differs from that without it, on pure noise"
    sourcing = "public code; there is no paper yet"
    families = frozenset(FAMILIES)
    citation = cite("anonymous2026early")
    derives = True

    seeds: Count = 1
    #: What both derivatives are multiplied with: the ``"own"`` noise of each half, or the ``"difference"`` of both, a
    #: variant of the same code after Jeon et al. (2025).
    along: Literal["own", "difference"] = "own"

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        model, rows = view.model, len(view.latents)
        text = model.unconditional(rows).followed_by(view.text)
        with torch.enable_grad():
            latents = view.latents.clone().requires_grad_()
            noise = model.predict_noise(torch.cat([latents, latents]), view.timestep, text)
            unconditional, conditional = noise.chunk(2)
            if self.along == "own":
                value = (conditional.square().sum() - unconditional.square().sum()) / 2
            else:
                difference = (conditional - unconditional).detach()
                value = ((conditional - unconditional) * difference).sum()
            (gradient,) = torch.autograd.grad(value, latents)
        return {"hessian_difference": gradient.float().square().flatten(1).sum(1)}
