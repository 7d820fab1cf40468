"""Tiled L2, by hand."""

from __future__ import annotations

import pytest
import torch

from detector_views import PROMPT
from nemo_bench.detectors import (
    TiledL2,
)
from nemo_bench.diffusion import Diffusion


def test_tiled_l2_is_the_negative_mean_over_pairs(tiny: Diffusion) -> None:
    images = torch.zeros(3, 3, 8, 8)
    images[1] += 0.5
    images[2] += 1.0
    assert TiledL2(seeds=3).score(tiny, PROMPT, [], images).score == pytest.approx(-(0.5 + 0.5 + 1.0) / 3)
