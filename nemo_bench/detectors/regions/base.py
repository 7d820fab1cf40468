"""The base of all localizers of regions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.records.data import Prompt


class RegionLocalizer(Detector):
    """Says where in its images a prompt is memorized, by a heat map of each image.

    Maps are made in the last step of sampling. As a detector its score is the mean of the maps (Kim and Lee 2026).
    """

    images = True
    steps = None
    seeds: int = 4

    @property
    def own_passes(self) -> int:
        """UNet passes of one sample that an image takes beside sampling; 0 unless overridden."""
        return 0

    @abstractmethod
    def heat(self, view: View) -> Tensor:
        """The map of each image, larger where memorized, (N, height, width) of latents or images; of the last step."""

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        return {"heat": self.heat(view).float()} if view.number == view.model.steps - 1 else {}

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        assert images is not None
        heat = observed[-1]["heat"]
        require_finite("heat maps", heat)
        return DetectorScore(float(heat.mean()), picture=torch.cat([*images], 2), tensors={"heat": heat})
