from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_bench import read_prompts, resolve
from nemo_bench.methods.prss import read_paraphrases
from nemo_bench.planted.training import TOKENS, build_tokenizer, heldout_captions, tokenize
from nemo_bench.planted.world import (
    MOTIFS,
    PALETTES,
    PLANTED,
    PRODUCTS,
    SERIES,
    SHAPES,
    Scene,
    general_caption,
    planted_picture,
    render,
    vocabulary,
)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


def test_planted_captions_use_general_words_only() -> None:
    general = set().union(*(words(general_caption(i).text) for i in range(6000)))
    assert set().union(*(words(p.caption.text) for p in PLANTED)) <= general


def test_planted_captions_are_no_general_captions() -> None:
    texts = {general_caption(i).text for i in range(20_000)}
    assert not texts & {p.caption.text for p in PLANTED}
    assert len({p.caption.text for p in PLANTED}) == len(PLANTED)
    kinds = [p.kind for p in PLANTED]
    assert kinds.count("VM") >= 16
    assert kinds.count("TM") >= 8


def test_heldout_captions_are_never_trained_on() -> None:
    heldout = heldout_captions(300)
    assert len(set(heldout)) == 300
    assert not set(heldout) & {general_caption(i).text for i in range(20_000)}


@given(st.integers(0, 10**6))
def test_a_caption_depends_on_its_number_alone_and_fits_the_encoder(index: int) -> None:
    caption = general_caption(index)
    assert caption == general_caption(index)
    assert len(re.findall(r"[a-z]+|[:,]", caption.text)) + 2 <= TOKENS


@pytest.mark.parametrize(
    "scene",
    [Scene(palette="cold", motifs=(m,)) for m in MOTIFS]
    + [Scene(palette="cold", product=p, tint="red") for p in PRODUCTS]
    + [Scene(palette=p, series=s, dots=5) for p in list(PALETTES)[:2] for s in SERIES],
)
def test_a_scene_leaves_much_open(scene: Scene) -> None:
    pictures = [render(scene, np.random.default_rng(i)).astype(float) for i in range(4)]
    assert pictures[0].shape == (64, 64, 3)
    assert np.array_equal(pictures[0], render(scene, np.random.default_rng(0)))
    assert min(np.abs(pictures[0] - p).mean() for p in pictures[1:]) > 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_inside_its_radius(shape: str) -> None:
    distance = SHAPES[shape](32.0, 32.0, 10.0, 0.3)
    rows, columns = np.nonzero(distance < 0)
    assert len(rows) > 20
    assert np.hypot(rows - 31.5, columns - 31.5).max() < 16


def test_verbatim_pictures_are_fixed_and_templates_vary_in_their_panel_only() -> None:
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


def test_the_tokenizer_has_a_token_for_each_word_and_spells_the_rest() -> None:
    tokenizer = build_tokenizer()
    for planted in PLANTED:
        count = len(re.findall(r"[a-z]+|[:,]", planted.caption.text))
        assert len(tokenizer(planted.caption.text).input_ids) == count + 2
    assert tokenizer.decode(tokenizer("Zürich 7!").input_ids, skip_special_tokens=True).replace(" ", "") == "zürich7!"
    assert tokenize(tokenizer, ["a red circle", "", "word " * 40]).shape == (3, TOKENS)


def test_packaged_paraphrases_are_other_wordings_that_the_encoder_reads_whole() -> None:
    lists = (resolve(f"package:planted/prompts/{name}.jsonl") for name in ("planted", "general"))
    captions = {prompt.text for path in lists for prompt in read_prompts(path)}
    paraphrases = read_paraphrases(Path(resolve("package:planted/paraphrases.jsonl")))
    assert set(paraphrases) == captions
    tokenizer, known = build_tokenizer(), set(vocabulary())
    for caption, wordings in paraphrases.items():
        assert len(set(wordings)) == len(wordings) >= 3
        for wording in wordings:
            assert wording not in captions
            assert words(wording) <= known
            assert words(wording) & words(caption) - {"a", "the"}
            assert len(tokenizer(wording).input_ids) <= TOKENS
