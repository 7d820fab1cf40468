"""Where the end token is looked at in the last step: a mask of what is memorized, and the magnitude within it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nemo_bench.detectors.base import Detector, Finding, View, check_counts
from nemo_bench.diffusion import Diffusion, cross_attentions
from nemo_bench.diffusion.noise import FIRST_BLOCK, end_attention, masked_magnitude
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt

PICTURED = 4
"""Images of a prompt that are shown with their masks."""


class BrightEnding(Detector):
    """Magnitude within the attention that the end token gets at the end of sampling (Chen et al. 2025).

    The mask of an image is what the prompt's end token gets in the last step, the mean over heads and over the
    cross-attention layers of the first block, at the resolution of the latents; it is soft, as in the public code. The
    score is the norm of the text-conditional noise times the mask, divided by the mean of the mask: the mean over steps
    and images. Masks are kept as pictures: above the images, below how far the mask is from its darkest to its
    brightest. The public code samples a second time with the mask of the first; here differences are kept and masked
    afterwards.

    Stable Diffusion 1.x and 2.x alone: the first block of SDXL has no attention.

    Args:
        seeds: Images a prompt. The public code's page takes 16; Jeon et al. (2025) find 4 to do as well, and that is
            what other detectors sample.
        steps: Steps whose magnitude counts, from the first; None for all, as published. Sampling goes to the end
            for the mask.

    Raises:
        ConfigError: There are no seeds or steps.
    """

    title = "Bright Ending"
    summary = "noise magnitude masked by the end token's attention in the last step; shows where"
    sourcing = "public code; paper second hand"
    citation = cite("chen2025exploring")
    families: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})
    attends = True
    images = True
    steps = None

    def __init__(self, seeds: int = 4, steps: int | None = None) -> None:
        check_counts(self.title, seeds, steps)
        self.seeds, self.counted = seeds, steps

    def layers(self, model: Diffusion, number: int) -> Collection[str]:
        """See :meth:`Detector.layers`."""
        return cross_attentions(model.unet, FIRST_BLOCK) if number == model.steps - 1 else ()

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        kept = {"difference": view.difference} if self.counted is None or view.number < self.counted else {}
        layers = self.layers(view.model, view.number)
        if layers:
            maps, shape = [view.attention(layer) for layer in layers], view.latents.shape
            kept["mask"] = end_attention(maps, view.lengths, (shape[2], shape[3]))
        return kept

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`; ``by_step`` is the mean over images of each step."""
        mask = seen[-1]["mask"]
        steps = [step["difference"] for step in seen if "difference" in step]
        by_step = torch.stack([masked_magnitude(difference, mask).mean() for difference in steps])
        assert images is not None
        details = {"by_step": [round(value, 4) for value in by_step.tolist()], "mask_mean": float(mask.mean())}
        return Finding(float(by_step.mean()), details, picture(images[:PICTURED], mask[:PICTURED]))


def picture(images: Tensor, mask: Tensor) -> Tensor:
    """Images side by side and below each its mask, scaled to [0, 1]; (3, 2 height, N width)."""
    low, high = mask.amin((1, 2), keepdim=True), mask.amax((1, 2), keepdim=True)
    scaled = (mask - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    shown = interpolate(scaled[:, None], images.shape[2:], mode="nearest").expand_as(images)
    return torch.cat([torch.cat([*row], 2) for row in (images, shown.to(images.device))], 1)
