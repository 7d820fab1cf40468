"""Which embeddings the padding fix changes, and which it can't."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batches import batch_of
from nemo_bench import Diffusion, ModelError
from nemo_bench.benchmark.plan import plan
from nemo_bench.config import grid
from nemo_bench.diffusion import TokenizerFiles
from nemo_bench.methods import PaddingFix, Setup
from nemo_bench.methods.padding_fix import Change, changed

TEXT = torch.arange(8.0)[:, None] + 10
"""Eight tokens, of which the fourth is the end: 10, words 11 and 12, end 13, padding 14 to 17."""
EXPECTED: dict[Change, list[float]] = {
    "pad": [10, 11, 12, 13, 14, 15, 16, 17],
    "pad_and_end": [10, 11, 12, 0, 14, 15, 16, 17],
    "part": [10, 11, 12, 13, 0, 0, 16, 17],
    "zero_pad": [10, 11, 12, 13, 0, 0, 0, 0],
    "zero_end": [10, 11, 12, 0, 14, 15, 16, 17],
    "zero_end_pad": [10, 11, 12, 0, 0, 0, 0, 0],
    "zero_prompt": [10, 0, 0, 13, 14, 15, 16, 17],
    "prompt_by_end": [10, 13, 13, 13, 14, 15, 16, 17],
    "pad_by_end": [10, 11, 12, 13, 13, 13, 13, 13],
    "prompt_pad_by_end": [10, 13, 13, 13, 13, 13, 13, 13],
    "prompt_end_by_pad": [10, 15.5, 15.5, 15.5, 14, 15, 16, 17],
}


@pytest.mark.parametrize("change", EXPECTED)
def test_changes_by_hand(change: Change) -> None:
    assert changed(TEXT, 3, change)[:, 0].tolist() == EXPECTED[change]
    assert TEXT[:, 0].tolist() == [*range(10, 18)]


def test_all_of_the_padding_is_its_largest_part() -> None:
    assert torch.equal(changed(TEXT, 3, "part", 1.0), changed(TEXT, 3, "zero_pad"))


@pytest.mark.parametrize("change", ["pad", "part", "zero_pad", "pad_by_end", "prompt_end_by_pad"])
def test_a_prompt_without_padding_stays_as_it_is(tiny: Diffusion, change: Change) -> None:
    batch = batch_of(tiny, [(0, 0)], ["red " * 30])
    with PaddingFix(change=change).apply(tiny, batch) as new:
        torch.testing.assert_close(new.text.text, batch.text.text)
    assert dict(new.notes[0]) == {"padding": 0}


def test_another_padding_token_changes_the_padding_alone(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)], ["red sun map", "fox"])
    token, own = tiny.pipeline.tokenizer.pad_token, batch.text.text
    with PaddingFix(change="pad").apply(tiny, batch) as new:
        text = new.text.text
    for row, end in ((0, 4), (1, 2)):
        torch.testing.assert_close(text[row, : end + 1], own[row, : end + 1], rtol=0, atol=1e-5)
        assert ((text[row, end + 1 :] - own[row, end + 1 :]).abs().amax(1) > 1e-2).all()
    assert tiny.pipeline.tokenizer.pad_token == token
    assert torch.equal(tiny.encode(["red sun map", "fox"]).text, own)
    assert [note["padding"] for note in new.notes] == [11, 13]


def test_encoding_with_the_models_own_token_is_the_pipelines(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    with PaddingFix(change="pad", token=tiny.pipeline.tokenizer.pad_token).apply(tiny, batch) as new:
        assert torch.equal(new.text.text, batch.text.text)
        assert new.unconditional
        assert torch.equal(new.unconditional.text, tiny.unconditional(2).text)


@pytest.mark.parametrize(
    ("settings", "is_changed"),
    [({}, True), ({"change": "pad"}, True), ({"unconditional": "own"}, False), ({"change": "zero_end"}, False)],
)
def test_the_empty_prompt_is_padded_alike_and_keeps_its_end(
    tiny: Diffusion, settings: dict[str, Any], is_changed: bool
) -> None:
    with PaddingFix(**settings).apply(tiny, batch_of(tiny, [(0, 0), (0, 1)])) as new:
        assert (new.unconditional is not None) == is_changed
    if new.unconditional:
        own = tiny.unconditional(2).text
        torch.testing.assert_close(new.unconditional.text[:, :2], own[:, :2], rtol=0, atol=1e-5)
        assert ((new.unconditional.text - own)[:, 2:].abs().amax(2) > 1e-2).all()


def test_a_token_that_is_none_or_no_change_is_an_error(tiny: Diffusion) -> None:
    with pytest.raises(ModelError, match="has no token 'cat'; set token"):
        PaddingFix(token="cat").setup(tiny, Setup())
    PaddingFix(change="zero_pad", token="cat").setup(tiny, Setup())
    tokenizer = SimpleNamespace(get_vocab=lambda: {"!": 0}, pad_token="!")
    sd2: Any = SimpleNamespace(pipeline=SimpleNamespace(tokenizer=tokenizer))
    with pytest.raises(ModelError, match="pads with '!' already"):
        PaddingFix(change="pad").setup(sd2, Setup())
    PaddingFix().setup(sd2, Setup())


def test_what_files_of_the_tokenizer_tell_is_said_before_weights_load(tmp_path: Path) -> None:
    words = ["prompts.limit=2", f"root={tmp_path}", "method=padding_fix"]
    with pytest.raises(ModelError, match=r"padding_fix on planted.*: the tokenizer has no token 'catlike'"):
        plan(grid([*words, "method.token=catlike"]))
    assert plan(grid([*words, "method.token=catlike", "method.change=zero_pad"]))
    files: dict[str, dict[str, Any]] = {
        "vocab.json": {"!": 0, "fox": 1},
        "special_tokens_map.json": {"pad_token": {"content": "!"}},
    }
    sd2 = TokenizerFiles(files.get)
    PaddingFix().check_tokenizer(sd2)
    with pytest.raises(ModelError, match="pads with '!' already"):
        PaddingFix(change="pad").check_tokenizer(sd2)
    PaddingFix(token="cat").check_tokenizer(TokenizerFiles({}.get))  # nothing is told: setup looks again
