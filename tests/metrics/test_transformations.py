"""Changes of pictures by hand, and of pictures of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nemo_bench.metrics.transformations import TRANSFORMATIONS, UNCHANGED


def changed(name: str, pixels: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint8]:
    return np.asarray(TRANSFORMATIONS[name](Image.fromarray(pixels), seed))


def plain(*color: int, side: int = 40) -> NDArray[np.uint8]:
    return np.tile(np.array(color, np.uint8), (side, side, 1))


@given(st.sampled_from([*TRANSFORMATIONS]), st.integers(32, 64), st.integers(32, 64), st.integers(0, 3))
def test_pictures_keep_size_and_form_and_the_same_seed_gives_the_same(
    name: str, width: int, height: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    found = changed(name, pixels, seed)
    assert (found.shape, found.dtype) == ((height, width, 3), np.uint8)
    assert (found == changed(name, pixels, seed)).all()
    assert (found == pixels).all() == (name == UNCHANGED)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("dark × 0.6", (200, 100, 50), (120, 60, 30)),
        ("bright × 1.4", (100, 50, 200), (140, 70, 255)),
        ("gray", (255, 0, 0), (76, 76, 76)),  # 0.299 of red, as in ITU-R 601
        ("blur 3%", (10, 20, 30), (10, 20, 30)),
        ("hue 90°", (255, 0, 0), (128, 255, 0)),
        ("hue 30°", (0, 255, 0), (0, 255, 128)),
    ],
)
def test_plain_colors_by_hand(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    assert np.abs(changed(name, plain(*before)).astype(int) - after).max() <= 3


def test_flip_crop_blur_and_noise_by_hand() -> None:
    halves = np.concatenate([plain(0, 0, 0), plain(255, 255, 255)], axis=1)
    assert (changed("flip", halves) == halves[:, ::-1]).all()
    framed = plain(255, 255, 255, side=100)
    framed[15:85, 15:85] = 0
    assert (changed("crop 70%", framed)[5:-5, 5:-5] == 0).all()
    assert (changed("crop 90%", framed)[0] == 255).all()
    edges = [changed(name, halves)[20, :, 0].astype(int) for name in (UNCHANGED, "blur 1%", "blur 3%")]
    assert np.diff([np.abs(np.diff(edge)).max() for edge in edges]).max() < 0  # ever softer
    for name, deviation in (("noise 0.05", 0.05), ("noise 0.15", 0.15)):
        noisy = changed(name, plain(128, 128, 128, side=100)).astype(float) / 255
        assert noisy.std() == pytest.approx(deviation, rel=0.05)
        assert noisy.mean() == pytest.approx(128 / 255, abs=0.005)
