"""Where attention goes to the end of the prompt."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import View
from nemo_bench.detectors.regions.base import RegionLocalizer
from nemo_bench.diffusion import Diffusion, cross_attentions
from nemo_bench.diffusion.noise import FIRST_BLOCK, end_attention
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class EndAttention(RegionLocalizer):
    """Bright Ending's mask: attention to the prompt's end token in the last step (Chen et al. 2025).

    It is the mean over heads and over the cross-attention layers of the first block, whose resolution is that of the
    latents. Stable Diffusion 1.x and 2.x alone: the first block of SDXL has no attention.
    """

    title = "Bright Ending mask"
    summary = "attention to the end of the prompt in the last step"
    sourcing = "public code; paper second hand"
    citation = cite("chen2025exploring")
    families: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})
    limits = "needs attention at the resolution of the latents, and an end token of CLIP"
    attends = True

    seeds: Count = 4

    @override
    def layers(self, model: Diffusion, number: int) -> Collection[str]:
        return cross_attentions(model.unet, FIRST_BLOCK) if number == model.steps - 1 else ()

    @override
    def heat(self, view: View) -> Tensor:
        height, width = view.latents.shape[2:]
        maps = [view.attention(layer) for layer in self.layers(view.model, view.number)]
        return end_attention(maps, view.lengths, (height, width))
