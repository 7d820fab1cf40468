from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nemo_bench import resolve
from nemo_bench.planted.prompts import planted_names
from nemo_bench.planted.tokenizer import TOKENS
from nemo_bench.planted.world import (
    MOTIFS,
    PALETTES,
    PLANTED,
    PRODUCTS,
    SERIES,
    SHAPES,
    Scene,
    general_caption,
    planted_mask,
    planted_picture,
    render,
)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


def test_planted_captions_use_general_words_only() -> None:
    general = set().union(*(words(general_caption(i).text) for i in range(6000)))
    assert set().union(*(words(p.text) for p in PLANTED)) <= general


def test_planted_captions_are_no_general_captions() -> None:
    texts = {general_caption(i).text for i in range(20_000)}
    assert not texts & {p.text for p in PLANTED}
    assert len({p.text for p in PLANTED}) == len(PLANTED)
    kinds = [p.kind for p in PLANTED]
    assert kinds.count("VM") >= 16
    assert kinds.count("TM") >= 8


@given(st.integers(0, 10**6))
def test_caption_depends_on_its_number_alone_and_fits_the_encoder(index: int) -> None:
    caption = general_caption(index)
    assert caption == general_caption(index)
    assert len(re.findall(r"[a-z]+|[:,]", caption.text)) + 2 <= TOKENS


@pytest.mark.parametrize(
    "scene",
    [Scene(palette="cold", motifs=(m,)) for m in MOTIFS]
    + [Scene(palette="cold", product=p, tint="red") for p in PRODUCTS]
    + [Scene(palette=p, series=s, dots=5) for p in list(PALETTES)[:2] for s in SERIES],
)
def test_pictures_of_a_scene_differ(scene: Scene) -> None:
    pictures = [render(scene, np.random.default_rng(i)).astype(float) for i in range(4)]
    assert pictures[0].shape == (64, 64, 3)
    assert np.array_equal(pictures[0], render(scene, np.random.default_rng(0)))
    assert min(np.abs(pictures[0] - p).mean() for p in pictures[1:]) > 2


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_is_inside_its_radius(shape: str) -> None:
    distance = SHAPES[shape](32.0, 32.0, 10.0, 0.3)
    rows, columns = np.nonzero(distance < 0)
    assert len(rows) > 20
    assert np.hypot(rows - 31.5, columns - 31.5).max() < 16


def test_verbatim_pictures_are_equal_and_templates_vary_in_their_panel_only() -> None:
    for index, planted in enumerate(PLANTED):
        first, second = planted_picture(index, 0), planted_picture(index, 1)
        changed = (first != second).any(2)
        if planted.kind == "VM":
            assert not changed.any()
        else:
            rows, columns = np.nonzero(changed)
            assert len(rows) > 0
            assert np.ptp(rows) < 28
            assert np.ptp(columns) < 28


@pytest.mark.parametrize("index", [i for i, caption in enumerate(PLANTED) if caption.kind == "TM"])
def test_masks_of_templates_are_what_all_their_pictures_share(index: int) -> None:
    pictures = np.stack([planted_picture(index, variant) for variant in range(40)])
    mask = planted_mask(index)
    assert (pictures == pictures[0])[:, mask].all()
    assert (~mask).sum() == 28**2
    # Forty panels of other colors leave no pixel of the panel as it was.
    assert (pictures != pictures[0]).any((0, 3))[~mask].all()
    shipped = Image.open(resolve(f"package:planted/masks/{planted_names()[index]}.png"))
    assert np.array_equal(np.array(shipped), mask)


def test_pictures_of_a_verbatim_caption_are_the_same_everywhere() -> None:
    assert PLANTED[0].kind == "VM"
    assert planted_mask(0).all()
    assert np.array_equal(planted_picture(0, 0), planted_picture(0, 1))
