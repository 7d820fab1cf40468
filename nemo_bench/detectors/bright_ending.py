"""Attention to the end token in the last step: a mask of the memorized region, and the magnitude within it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import Diffusion, cross_attentions
from nemo_bench.diffusion.noise import FIRST_BLOCK, end_attention, masked_magnitude
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count

PICTURED = 4  # Images of a prompt that are shown with their masks.


class BrightEnding(Detector):
    """Magnitude within the attention to the end token at the end of sampling (Chen et al. 2025).

    The mask of an image is the attention to the prompt's end token in the last step, the mean over heads and over the
    cross-attention layers of the first block, at the resolution of the latents; it is soft, as in the public code. The
    score is the norm of the text-conditional noise times the mask, divided by the mean of the mask: the mean over
    images, ``by_step`` in the details, then over steps. The picture has the images above their masks, each scaled from
    its darkest to its brightest. The public code samples a second time with the mask of the first; here differences are
    kept and masked afterwards. Stable Diffusion 1.x and 2.x alone: the first block of SDXL has no attention.

    Args:
        seeds: Images a prompt. The public code's page takes 16; Jeon et al. (2025) find 4 to do as well.
        steps: Steps whose magnitude counts, from the first; None for all, as published. Sampling goes to the end
            for the mask.
    """

    title = "Bright Ending"
    summary = "noise magnitude masked by the end token's attention in the last step; shows where"
    sourcing = "public code; paper second hand"
    citation = cite("chen2025exploring")
    families: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})
    limits = "needs attention at the resolution of the latents, and an end token of CLIP"
    attends = True
    images = True
    steps = None

    def __init__(self, seeds: Count = 4, steps: Count | None = None) -> None:
        self.seeds = seeds
        self.counted = steps

    @override
    def layers(self, model: Diffusion, number: int) -> Collection[str]:
        return cross_attentions(model.unet, FIRST_BLOCK) if number == model.steps - 1 else ()

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        values = {}
        if self.counted is None or view.number < self.counted:
            values["difference"] = view.step.difference
        if layers := self.layers(view.model, view.number):
            height, width = view.latents.shape[2:]
            values["mask"] = end_attention([view.attention(layer) for layer in layers], view.lengths, (height, width))
        return values

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        assert images is not None
        mask = observed[-1]["mask"]
        differences = [step["difference"] for step in observed if "difference" in step]
        by_step = torch.stack([masked_magnitude(difference, mask).mean() for difference in differences])
        details = {"by_step": [round(value, 4) for value in by_step.tolist()], "mask_mean": float(mask.mean())}
        return DetectorScore(float(by_step.mean()), details, picture(images[:PICTURED], mask[:PICTURED]))


def picture(images: Tensor, mask: Tensor) -> Tensor:
    """Images side by side, each above its mask scaled to [0, 1]; (3, 2 height, N width)."""
    low, high = mask.amin((1, 2), keepdim=True), mask.amax((1, 2), keepdim=True)
    scaled = (mask - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    masks = interpolate(scaled[:, None], images.shape[2:], mode="nearest").expand_as(images)
    return torch.cat([torch.cat([*row], 2) for row in (images, masks.to(images.device))], 1)
