"""Lists of links and files in a cell, in every form that programs write."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nemo_bench.errors import PromptError
from nemo_bench.prompts import read_links, read_prompts
from nemo_bench.prompts.lists import split_links, split_list, without_login

A = "https://a.example/1.jpg"
B = "http://b.example/w_200,h_100/x|y;z/o'2.jpg?u=https://c.example/3.jpg&v=1,2"
C = "https://web.archive.org/web/2015/http://c.example/my pic.jpg"


def links(cell: Any) -> list[str]:
    written = split_list(cell)
    assert written is not None
    return [link for text in written for link in split_links(text)]


@pytest.mark.parametrize("url", [A, B, C, f" {A}\n", A.upper()])
def test_one_link_stays_whole(url: str) -> None:
    assert links(url) == [url.strip()]


@pytest.mark.parametrize("separator", [" ", "\n", "\r\n", "\t", ",", ", ", ";", "; ", "|", " | ", ",\n"])
def test_separated_links_are_split(separator: str) -> None:
    assert links(separator.join([A, B, C])) == [A, B, C]
    assert links(separator.join([C, A]) + separator) == [C, A]
    assert links(f"[{separator.join([A, C])}]") == [A, C]


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda urls: list(np.array(urls))])
@pytest.mark.parametrize("write", [str, repr])
@pytest.mark.parametrize("urls", [[A], [A, B, C], [A, *(f"{C}?{n}" for n in range(40))]])
def test_lists_written_by_python_and_numpy_are_read(kind: Any, write: Any, urls: list[str]) -> None:
    assert links(write(kind(urls))) == urls
    assert links(write(np.array(urls, object))) == urls


def test_lists_written_by_pandas_are_read(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [[A, C], np.array([A, B, C], object), [B], None, A]
    frame = pandas.DataFrame({"text": list("vwxyz"), "URL": rows})
    path = tmp_path / "p.csv"
    frame.to_csv(path)
    assert list(read_links(path).values()) == [(A, C), (A, B, C), (B,), (), (A,)]
    frame.to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    assert list(read_links(tmp_path / "p.jsonl").values()) == [(A, C), (A, B, C), (B,), (), (A,)]
    pytest.importorskip("pyarrow")
    frame[:4].to_parquet(tmp_path / "p.parquet")
    assert list(read_links(tmp_path / "p.parquet").values()) == [(A, C), (A, B, C), (B,), ()]


@pytest.mark.parametrize(
    "cell", [None, "", " ", "nan", "None", "[]", "[None]", "[nan]", [], [None], float("nan"), "{}"]
)
def test_a_cell_without_links_gives_none(cell: Any) -> None:
    assert links(cell) == []


def test_a_list_that_was_cut_is_an_error() -> None:
    assert split_list(str(np.array([f"{A}?{n}" for n in range(2000)]))) is None
    assert split_list(f"['{A}', '{B[:9]}") is None


WORDS = st.text("abcXYZ019-_.~%$&'()*+,;=|:@!", min_size=1, max_size=12)
URLS = st.builds(
    lambda scheme, path, query, end: f"{scheme}://host.example/{path}{query}{end}",
    st.sampled_from(["http", "https", "HTTPS"]),
    st.lists(WORDS, max_size=3).map("/".join),
    st.sampled_from(["", "?url=https://c.example/x", "?a=1,2;3|4", "/w_1,h_2/http://c.example/", "?q=two words"]),
    st.sampled_from(["/a.jpg", "a.png", "=", ")", "7"]),
)
FORMS = {
    "json": json.dumps,
    "python": str,
    "numpy": lambda urls: str(np.array(urls)),
    "numpy objects": lambda urls: repr(np.array(urls, object)),
    **{
        f"by {between!r}": between.join
        for between in (" ", ",", ", ", ";", "; ", "|", " | ", "\n", "\r\n", ",\n", "\t")
    },
}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(URLS, min_size=1, max_size=6), st.sampled_from(sorted(FORMS)))
@example([A, B, C], "numpy")
def test_any_links_are_read_from_any_form(urls: list[str], form: str) -> None:
    assert links(FORMS[form](urls)) == urls


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("[]{}()'\",|; \\\nahtps:/.0nN", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    written = split_list(text)
    assert written is None or all(isinstance(link, str) for part in written for link in split_links(part))


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("https://user:secret@host.example/a@2x.jpg", "https://host.example/a@2x.jpg"),
        ("HTTP://us@er:se:cret@host.example:80?a=b@c", "HTTP://host.example:80?a=b@c"),
        ("//user@host.example/a", "//host.example/a"),
        ("https://host.example//a@b/c", "https://host.example//a@b/c"),
        ("https://host.example?mail=a@b", "https://host.example?mail=a@b"),
        ("https://host.example#a@b", "https://host.example#a@b"),
    ],
)
def test_logins_are_removed_from_links(tmp_path: Path, link: str, expected: str) -> None:
    assert without_login(link) == expected
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"text": "x", "url": [A, link]}))
    assert read_links(path)["p-0001"] == (A, expected)


def test_an_error_does_not_show_a_login(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"text": "x", "url": ["https://user:secret@host.example/", 7]}))
    with pytest.raises(PromptError, match=r"line 1: holds no list of links") as caught:
        read_links(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "cell",
    ["a.png|(b) c, d.png", "a.png | (b) c, d.png |", "['a.png' '(b) c, d.png']", '["a.png", "(b) c, d.png"]'],
)
def test_lists_of_files_are_read_in_any_form(tmp_path: Path, cell: str) -> None:
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "PNG")
    for name in ("a.png", "(b) c, d.png"):
        (tmp_path / name).write_bytes(content.getvalue())
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"text": "x", "references": cell}))
    assert [file.name for file in read_prompts(path)[0].references] == ["a.png", "(b) c, d.png"]
    path.write_text(json.dumps({"text": "x", "references": "(b) c, d.png"}))
    assert [file.name for file in read_prompts(path)[0].references] == ["(b) c, d.png"]
