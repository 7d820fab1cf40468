"""How much the images of a prompt differ where they differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from nemo_bench.detectors.base import Detector, Finding, View, check_counts
from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.noise import tiled_distance
from nemo_bench.errors import ConfigError
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


class TiledL2(Detector):
    """Negative tiled distance between the images of a prompt (Carlini et al. 2023; as a detector Jeon et al. 2025).

    Two images are as far apart as the two tiles in the same place that are farthest apart, root mean squared over
    pixels in [0, 1]: images that share a flat background are not alike. The mean over all pairs. Carlini et al. draw
    500 images a prompt and look for cliques; this is the use that Jeon et al. make of it with 4 and 16.

    Args:
        seeds: Images a prompt, at least 2.
        tiles: Tiles along a side; 4 of 128 pixels are published, for images of 512.

    Raises:
        ConfigError: There are fewer than two seeds, or no tile; or, once the model is known, tiles do not divide its
            images.
    """

    title = "Tiled L2"
    summary = "negative tiled distance among the images of a prompt; needs no look inside"
    sourcing = "paper second hand"
    citation = cite("carlini2023extracting")
    images = True
    steps = None

    def __init__(self, seeds: int = 4, tiles: int = 4) -> None:
        check_counts(self.title, seeds, least=2)
        if tiles < 1:
            raise ConfigError(f"{self.title} needs at least 1 tile along a side, given detector.tiles={tiles}")
        self.seeds, self.tiles = seeds, tiles

    def fits(self, model: Diffusion) -> None:
        """See :meth:`Detector.fits`."""
        width, height = model.image_size
        if width % self.tiles or height % self.tiles:
            raise ConfigError(f"detector.tiles={self.tiles} does not divide images of {width}x{height} pixels")

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        return {}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`."""
        assert images is not None
        pairs = torch.tensor(list(combinations(range(len(images)), 2)), device=images.device)
        return Finding(-float(tiled_distance(images[pairs[:, 0]], images[pairs[:, 1]], self.tiles).mean()))
