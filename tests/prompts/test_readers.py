"""Lists of prompts in all file formats: published lists, malformed ones, any texts."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from misbehaving import picture
from nemo_bench.errors import PromptError
from nemo_bench.prompts import read_prompts
from nemo_bench.records.data import Prompt

PUBLISHED = Path(__file__).parents[3] / "shared" / "data"

MEMORIZED = '''\
;Caption;URL;type;mean_sscd;max_sscd;Index
0;The Podcast;https://a.example/1.jpg;VM;0.83;0.84;1030727993
1;Bag, open - for "camp";https://a.example/2.jpg;TM;0.19;0.20;2026642560
2;"Watch: ""Lifted; Up""";https://a.example/3.jpg;VM;;;567947515
'''
UNMEMORIZED = (
    ";Caption;URL;Index\n0;Soaring by Peter;https://a.example/s.jpg;396\n1;アヤワスカ;https://a.example/a.jpg;7984\n"
)
COCO = ";Caption;URL;Index\n0;a person, standing;;0000\n1;a person, standing;;0001\n"
MEMBENCH = """\
,prompt,urls
0,garden flag,['https://a.example/f.jpg?v=1']
1,western rug; blue,"['https://a.example/r.jpg', 'https://b.example/r.jpg']"
"""
JSONL = """\
{"caption": "The Podcast", "index": 1030727993, "url": "https://a.example/1.jpg"}
{"caption": "\\u00c9tui", "index": 2026642560, "url": "https://a.example/2.jpg"}
"""

Write = Callable[..., Path]
PNG = picture()


def triples(prompts: list[Prompt]) -> list[tuple[str, str, str | None]]:
    return [(prompt.id, prompt.text, prompt.kind) for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        pytest.param(
            "memorized.csv",
            MEMORIZED,
            [
                ("1030727993", "The Podcast", "VM"),
                ("2026642560", 'Bag, open - for "camp"', "TM"),
                ("567947515", 'Watch: "Lifted; Up"', "VM"),
            ],
            id="memorized",
        ),
        pytest.param(
            "u.csv", UNMEMORIZED, [("396", "Soaring by Peter", None), ("7984", "アヤワスカ", None)], id="unmemorized"
        ),
        pytest.param(
            "c.csv", COCO, [("0000", "a person, standing", None), ("0001", "a person, standing", None)], id="coco"
        ),
        pytest.param("b.csv", MEMBENCH, [("0", "garden flag", None), ("1", "western rug; blue", None)], id="membench"),
        pytest.param("m.jsonl", JSONL, [("1030727993", "The Podcast", None), ("2026642560", "Étui", None)], id="jsonl"),
        pytest.param(
            "sd2.txt",
            "Floors 4 Linen\n\n  \nOak, \u2028 wide",
            [("sd2-0001", "Floors 4 Linen", None), ("sd2-0002", "Oak, \u2028 wide", None)],
            id="txt",
        ),
    ],
)
def test_a_list_in_a_published_form_is_read(
    write: Write, name: str, content: str, expected: list[tuple[str, str, str | None]]
) -> None:
    assert triples(read_prompts(write(name, content))) == expected


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published lists are not beside this checkout")
def test_the_published_lists_are_read_whole() -> None:
    files = sorted(file for file in PUBLISHED.iterdir() if file.suffix in {".csv", ".jsonl", ".txt"})
    lists = {file.name: read_prompts(file) for file in files}
    for prompts in lists.values():
        assert len({prompt.id for prompt in prompts}) == len(prompts)
    sizes = {
        "coco2014_val_10000.csv": 10000,
        "membench_SD1_final.csv": 3000,
        "memorized_laion_prompts.csv": 500,
        "sd2_mem.txt": 219,
        "sdv1_500_memorized.jsonl": 500,
        "unmemorized_laion_prompts.csv": 500,
    }
    assert {name: len(prompts) for name, prompts in lists.items()} == sizes
    memorized = lists["memorized_laion_prompts.csv"]
    assert Counter(prompt.group for prompt in memorized) == {"TM": 388, "VM": 112}
    # The same list in two formats gives the same ids, so the same seeds.
    assert [p._replace(kind=None) for p in memorized] == lists["sdv1_500_memorized.jsonl"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["p.csv", "p.txt"])
def test_any_line_ending_and_a_byte_order_mark_are_read(write: Write, name: str, ending: str) -> None:
    lines = ["first one", "second one"] if name == "p.txt" else ["ID,Text", "1,first one", "2,second one"]
    prompts = read_prompts(write(name, b"\xef\xbb\xbf" + ending.join(lines).encode()))
    assert [prompt.text for prompt in prompts] == ["first one", "second one"]


def test_a_csv_of_one_column_is_not_split(write: Write) -> None:
    prompts = read_prompts(write("p.csv", 'text\na, b; c\n"d, e"\n'))
    assert triples(prompts) == [("p-0001", "a, b; c", None), ("p-0002", "d, e", None)]


@pytest.mark.parametrize(("name", "content"), [("p.txt", " a \n"), ("p.csv", "text,kind\n a ,\n")])
def test_texts_keep_their_spaces(write: Write, name: str, content: str) -> None:
    assert read_prompts(write(name, content))[0].text == " a "


def test_all_words_for_a_kind_are_read(write: Write) -> None:
    prompts = read_prompts(write("p.csv", "text,kind\na,VM\nb,mv\nc,TM\nd,TV\ne,\n"))
    assert [prompt.kind for prompt in prompts] == ["VM", "VM", "TM", "TM", None]
    assert read_prompts(write("p.jsonl", '{"text": "a", "type": null}'))[0].kind is None


def test_the_first_of_several_columns_counts(write: Write) -> None:
    path = write("p.csv", ",index,id,text,prompt\n7,8,9,a,b\n")
    assert triples(read_prompts(path)) == [("9", "b", None)]


def test_prompts_without_a_kind_are_memorized_on_request(write: Write) -> None:
    path = write("p.csv", "text,kind\na,TM\nb,\nc,memorized\n")
    assert [p.kind for p in read_prompts(path)] == ["TM", None, "memorized"]
    prompts = read_prompts(path, memorized=True)
    assert [p.group for p in prompts] == ["TM", "memorized", "memorized"]


def test_a_limit_keeps_the_first_prompts(write: Write) -> None:
    path = write("p.csv", "text;kind\na;TM\nb;VM\nc;VM\nd;VM\n")
    assert triples(read_prompts(path, limit=2, prefix="list")) == [
        ("list-0001", "a", "TM"),
        ("list-0002", "b", "VM"),
    ]


@pytest.mark.parametrize(
    "content",
    ["Index;text\n1;a\n1;b\n", "Index;text\n1;a\n;b\n", ";text\n1;a\n1;b\n", "text;\na;5\nb;6\n"],
    ids=["twice", "empty", "unnamed twice", "unnamed, not first"],
)
def test_prompts_without_unique_ids_are_numbered(write: Write, content: str) -> None:
    assert [prompt.id for prompt in read_prompts(write("p.csv", content))] == ["p-0001", "p-0002"]


def test_the_index_is_used_before_a_column_without_a_name(write: Write) -> None:
    assert [p.id for p in read_prompts(write("p.csv", ";text;Index\n0;a;7\n1;b;7\n"))] == ["0", "1"]


def test_reference_files_are_relative_to_the_list_or_a_folder(write: Write, tmp_path: Path) -> None:
    for name in ("lists/a.png", "lists/sub/b.png", "other/a.png", "other/sub/b.png"):
        write(name, PNG)
    absolute = tmp_path / "other" / "a.png"
    table = write("lists/p.csv", "text,References\nx,a.png | sub/b.png | |\ny,\n")
    lines = write("lists/p.jsonl", json.dumps({"text": "x", "reference": ["a.png", str(absolute)]}))
    assert [p.references for p in read_prompts(table)] == [
        (tmp_path / "lists/a.png", tmp_path / "lists/sub/b.png"),
        (),
    ]
    other = read_prompts(table, references=tmp_path / "other")
    assert other[0].references == (tmp_path / "other/a.png", tmp_path / "other/sub/b.png")
    assert read_prompts(lines)[0].references == (tmp_path / "lists/a.png", absolute)


def test_references_of_prompts_beyond_the_limit_may_be_missing(write: Write) -> None:
    path = write("p.csv", "text,references\nx,\ny,gone.png\n")
    assert len(read_prompts(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        pytest.param("p.csv", "", ["p.csv", "empty"], id="empty file"),
        pytest.param("p.csv", "id,text\n", ["p.csv", "no prompt"], id="names only"),
        pytest.param("p.txt", b"\xef\xbb\xbf\n", ["p.txt", "no prompt"], id="mark only"),
        pytest.param("p.csv", "\nid,words\n1,a\n", ["line 2", "'id', 'words'", "prompt, text"], id="no column"),
        pytest.param("p.jsonl", '{"text": "a"}\n{"words": "b"}', ["line 2", "'words'", "prompt, text"], id="no key"),
        pytest.param("p.csv", "text,Text\na,b\n", ["line 1", "two columns", "'text'"], id="column twice"),
        pytest.param("p.csv", 'id,text\n1,"a\nb"\n2, \n', ["line 4", "empty"], id="empty text"),
        pytest.param("p.jsonl", '{"text": null}', ["line 1", "empty"], id="null text"),
        pytest.param("p.jsonl", '{"text": 3}', ["line 1", "3", "int"], id="text is a number"),
        pytest.param("p.csv", "id,text\n1,a,b\n", ["line 2", "3 cells", "2 columns", "','"], id="ragged"),
        pytest.param("p.csv", 'id,text\n1,a\n2,"b\n3,c\n', ["line 3", "CSV"], id="open quote"),
        pytest.param("p.jsonl", '{"text": "a"}\n\n{"text": \n', ["line 3", "JSON"], id="torn JSON"),
        pytest.param("p.jsonl", '["a"]\n', ["line 1", '["a"]', "object"], id="JSON list"),
        pytest.param("p.csv", "text,type\na,VN\n", ["line 2", "'VN'", "Did you mean 'VM'", "TM"], id="kind"),
        pytest.param("p.csv", "id,text\n7,a\n8,b\n7,c\n", ["line 4", "'7'", "line 2"], id="id twice"),
        pytest.param("p.jsonl", '{"text": "a", "id": 1}\n{"text": "b"}', ["line 2", "id is None"], id="id missing"),
        pytest.param("p.jsonl", '{"text": "a", "id": 1.5}', ["line 1", "id is 1.5"], id="id a fraction"),
        pytest.param("p.jsonl", '{"text": "a", "references": 3}', ["line 1", "references are 3"], id="references"),
        pytest.param("p.txt", b"a\nb\xff\n", ["line 2", "0xff", "UTF-8"], id="bytes"),
        pytest.param("p.txt", "a\nb\0\n", ["line 2", "NUL"], id="NUL"),
        pytest.param("p.jsonl", '{"text": "a\\u0000"}', ["line 1", "NUL"], id="NUL escaped"),
        pytest.param("p.jsonl", '{"text": "\\ud83d"}', ["line 1", "surrogate"], id="half a character"),
        pytest.param("p.cvs", "text\na\n", ["p.cvs", "'.cvs'", "Did you mean '.csv'", ".jsonl"], id="ending"),
    ],
)
def test_a_malformed_list_is_an_error_that_names_the_line(
    write: Write, name: str, content: str | bytes, said: list[str]
) -> None:
    path = write(name, content)
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    for part in (str(path), *said):
        assert part in str(caught.value)


def test_a_missing_file_is_an_error_that_names_the_nearest(write: Write, tmp_path: Path) -> None:
    write("memorized.csv", MEMORIZED)
    write("memorised.png", "no list")
    with pytest.raises(PromptError, match=r"no such file.*Did you mean 'memorized\.csv'\? Choices: memorized\.csv\."):
        read_prompts(tmp_path / "memorised.csv")
    with pytest.raises(PromptError, match=r"no folder .*gone"):
        read_prompts(tmp_path / "gone" / "memorized.csv")
    (tmp_path / "bare.csv").mkdir()
    with pytest.raises(PromptError, match=r"No file of prompts"):
        read_prompts(tmp_path / "bare.csv" / "p.csv")
    with pytest.raises(PromptError, match=r"bare\.csv: can't be read"):
        read_prompts(tmp_path / "bare.csv")


def test_a_limit_below_one_is_an_error(write: Write) -> None:
    path = write("p.csv", "text,kind\na,TM\nb,\n")
    with pytest.raises(PromptError, match=r"limit is 0"):
        read_prompts(path, limit=0)


def test_parquet_without_pyarrow_is_an_error_that_names_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(PromptError, match=r"p\.parquet.*pip install pyarrow"):
        read_prompts(write("p.parquet", b"PAR1"))


def test_parquet_is_read_and_checked_like_other_lists(write: Write) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write("a.png", PNG)

    def table(columns: dict[str, list[object]]) -> bytes:
        file = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), file)
        return file.getvalue()

    columns: dict[str, list[object]] = {
        "Caption": ["x", "y"],
        "type": ["MV", None],
        "Index": [7, 9],
        "references": [["a.png"], []],
    }
    path = write("p.parquet", table(columns))
    assert read_prompts(path) == [Prompt("7", "x", "VM", (path.parent / "a.png",)), Prompt("9", "y")]
    with pytest.raises(PromptError, match=r"row 2: the prompt is empty"):
        read_prompts(write("p.parquet", table({"text": ["x", None]})))
    with pytest.raises(PromptError, match=r"'words'"):
        read_prompts(write("p.parquet", table({"words": ["x"]})))
    with pytest.raises(PromptError, match=r"not valid parquet"):
        read_prompts(write("p.parquet", b"no parquet"))


steady = settings(max_examples=60, deadline=None, derandomize=True)
# Anything but NUL, which no prompt may hold; blank texts are refused as well.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
prompt_lists = st.lists(st.tuples(texts, st.sampled_from([None, "VM", "TM"])), min_size=1, max_size=5)


@steady
@given(prompt_lists, st.sampled_from(",;"))
@example([('a;"b",\r\nc\rd\n\u2028e', "VM"), ("\ufeff", None), ('"', "TM")], ";")
def test_any_prompts_written_as_csv_are_read_back(prompts: list[tuple[str, str | None]], delimiter: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["id", "text", "kind"])
            writer.writerows((n, text, kind) for n, (text, kind) in enumerate(prompts))
        assert triples(read_prompts(path)) == [(str(n), text, kind) for n, (text, kind) in enumerate(prompts)]


@steady
@given(prompt_lists, st.booleans())
@example([('a;"b",\r\nc\rd\n\u2028e', "VM"), ("\ufeff", None), ('"', "TM")], False)
def test_any_prompts_written_as_json_lines_are_read_back(
    prompts: list[tuple[str, str | None]], ascii_only: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        lines = [json.dumps({"text": text, "kind": kind}, ensure_ascii=ascii_only) for text, kind in prompts]
        path.write_bytes("\n".join(lines).encode())
        expected = [(f"p-{n:04d}", text, kind) for n, (text, kind) in enumerate(prompts, start=1)]
        assert triples(read_prompts(path)) == expected


def test_importing_prompts_imports_no_library_that_is_needed_later() -> None:
    code = (
        "import sys, nemo_bench.prompts, nemo_bench.hub; late = {'torch', 'lightning', 'aiohttp', 'datasets', "
        "'pyarrow', 'huggingface_hub'}; print(sorted(late & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
