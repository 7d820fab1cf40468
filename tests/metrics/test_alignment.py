"""Alignment of images and text."""

import pytest

from all_metrics import CLIP, unit
from nemo_bench.metrics import Alignment


def test_alignment_is_the_cosine_to_the_text() -> None:
    images = 7 * unit((1.0, 0.0), (0.0, 1.0), (-3.0, 4.0))
    assert Alignment(CLIP).score(images, 3 * unit((3.0, 4.0))[0]).tolist() == pytest.approx([0.6, 0.8, 0.28])
