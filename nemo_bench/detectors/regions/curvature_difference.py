"""Where the prompt adds curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import View
from nemo_bench.detectors.regions.base import RegionLocalizer
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class CurvatureDifference(RegionLocalizer):
    """Curvature of the log-density that the prompt adds at each coordinate, in the last step (Kim and Lee 2026).

    With D = e_c - e_u the difference of the noises predicted for the prompt and for the empty one, and J its derivative
    by the latents, it is the diagonal of J, summed over channels, 0 where negative. Like the public code it leaves out
    the factor 1 / sigma of the paper, which changes the scale alone. The diagonal is the mean of v * (J^T v) over
    vectors v of random signs, drawn once for all images, so that other images of a batch do not matter.
    """

    title = "Curvature difference"
    summary = "where the prompt adds curvature in the last step"
    sourcing = "public code and abstract"
    citation = cite("kim2026localizing")
    derives = True

    seeds: Count = 4
    probes: Count = 16  #: Vectors v. One is said to be close.

    @property
    @override
    def own_passes(self) -> int:
        return 2 + 2 * self.probes  # conditional and unconditional, forward once and backward for each probe

    @override
    def heat(self, view: View) -> Tensor:
        model, rows = view.model, len(view.latents)
        text = model.unconditional(rows).followed_by(view.text)
        diagonal = torch.zeros_like(view.latents, dtype=torch.float32)
        with torch.enable_grad():
            latents = view.latents.clone().requires_grad_()
            noise = model.predict_noise(torch.cat([latents, latents]), view.timestep, text)
            unconditional, conditional = noise.chunk(2)
            difference = conditional - unconditional
            for number in range(1, self.probes + 1):
                signs = random_signs(model.latent_shape, number).to(difference).expand_as(difference)
                (product,) = torch.autograd.grad(difference, latents, signs, retain_graph=number < self.probes)
                diagonal += signs * product
        return (diagonal / self.probes).sum(1).clamp(min=0)


def random_signs(shape: tuple[int, int, int], number: int) -> Tensor:
    """The vector of a number, 1 or -1 at random, (channels, height, width)."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(number)) * 2 - 1
