"""Names on disk that come from ids."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from nemo_bench.benchmark.stages.base import file_name
from nemo_bench.records.data import Prompt


def named(*ids: str) -> list[str]:
    return [file_name(Prompt(id_, "a text")) for id_ in ids]


def test_plain_ids_are_file_names() -> None:
    plain = ["vm-01", "567947515", "a.b_c"]
    assert named(*plain) == plain


@given(st.lists(st.text(min_size=1), min_size=2, max_size=5, unique=True))
@example(["Cup", "cup", "CUP"])
@example(["caf\u00e9", "cafe\u0301", "CAF\u00c9"])
@example(["ß", "ss", "ẞ", "k", "\N{KELVIN SIGN}"])
@example([".", "..", "...", ".a", "a", "a/b", "a b", "../a"])
def test_ids_never_share_a_file_whatever_the_file_system_takes_for_the_same(ids: list[str]) -> None:
    names = named(*ids)
    assert len({unicodedata.normalize("NFKD", name).casefold() for name in names}) == len(ids)
    for name in names:
        assert name.isascii()
        assert not name.startswith(".")
        assert Path(name).name == name
        assert len(name) < 80
