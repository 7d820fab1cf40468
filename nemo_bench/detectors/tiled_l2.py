"""Largest difference, tile by tile, between the images of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import FAMILIES, Diffusion
from nemo_bench.diffusion.noise import tiled_distance
from nemo_bench.errors import ConfigError
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class TiledL2(Detector):
    """Negative tiled distance between the images of a prompt (Carlini et al. 2023; as a detector Jeon et al. 2025).

    The distance of two images is that of the two tiles in the same place that differ most, root mean squared over
    pixels in [0, 1], so that images with the same flat background are not alike. The score is the mean over all pairs.
    Carlini et al. draw 500 images a prompt and look for cliques; Jeon et al. use it this way with 4 and 16.
    """

    title = "Tiled L2"
    summary = "negative tiled distance among the images of a prompt; needs no look inside"
    sourcing = "paper second hand"
    citation = cite("carlini2023extracting")
    families = frozenset(FAMILIES)
    images = True
    steps = None

    seeds: Annotated[int, Field(ge=2)] = 4
    #: Tiles along a side, which must divide the images; 4 of 128 pixels are published, for images of 512.
    tiles: Count = 4

    @override
    def check_model(self, model: Diffusion) -> None:
        width, height = model.image_size
        if width % self.tiles or height % self.tiles:
            raise ConfigError(f"detector.tiles={self.tiles} does not divide images of {width}x{height} pixels")

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        return {}

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        assert images is not None
        pairs = torch.tensor(list(combinations(range(len(images)), 2)), device=images.device)
        return DetectorScore(-float(tiled_distance(images[pairs[:, 0]], images[pairs[:, 1]], self.tiles).mean()))
