from __future__ import annotations

import filecmp
import re
from pathlib import Path

import pytest

from nemo_bench import read_prompts, resolve
from nemo_bench.methods.prss import read_paraphrases
from nemo_bench.planted.prompts import heldout_captions, neighbours, reworded, write_prompts
from nemo_bench.planted.tokenizer import TOKENS, build_tokenizer
from nemo_bench.planted.world import general_caption, vocabulary

PACKAGE = Path(resolve("package:planted"))


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


def test_heldout_captions_are_never_trained_on() -> None:
    heldout = [caption.text for caption in heldout_captions(300)]
    assert len(set(heldout)) == 300
    assert not set(heldout) & {general_caption(i).text for i in range(20_000)}


def test_shipped_prompts_and_pictures_are_those_of_the_world(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    for folder in ("prompts", "references", "masks", "controls"):
        names = sorted(p.name for p in (tmp_path / folder).iterdir())
        assert names == sorted(p.name for p in (PACKAGE / folder).iterdir())
        _, different, odd = filecmp.cmpfiles(tmp_path / folder, PACKAGE / folder, names, shallow=False)
        if folder == "prompts":
            assert (different, odd) == ([], [])
    assert len(read_prompts(PACKAGE / "prompts" / "planted.jsonl")) == 26


def test_shipped_paraphrases_are_other_wordings_that_fit_the_encoder() -> None:
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


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("the golden harbor by an island", "a golden harbor by the island"),
        ("wild river design, two rings, one star", "wild river design with two rings, one star"),
        ("burning bird and album", "burning bird with album"),
    ],
)
def test_rewordings_by_hand(caption: str, expected: str) -> None:
    assert reworded(caption) == expected


def test_a_neighbour_shares_most_words() -> None:
    caption, own = "the golden harbor podcast, episode nine", {"golden", "harbor", "podcast", "episode", "nine"}
    (found,) = neighbours([caption])
    assert found not in read_prompts_texts()
    others = [words(c.text) - {"a", "an", "the"} for c in heldout_captions(600)[336:]]
    shared = words(found) - {"a", "an", "the"}
    assert len(shared & own) / len(shared | own) >= max(len(other & own) / len(other | own) for other in others)


def read_prompts_texts() -> set[str]:
    names = ("prompts/general.jsonl", "prompts/calibration.txt")
    return {prompt.text for name in names for prompt in read_prompts(PACKAGE / name)}
