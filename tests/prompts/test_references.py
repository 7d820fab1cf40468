"""Reference images of prompts: missing and damaged files, the manifest of downloads, the digest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from misbehaving import picture
from nemo_bench.errors import PromptError
from nemo_bench.prompts import MANIFEST, check_references, read_manifest, read_prompts, references_digest
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import prompts_digest

Write = Callable[..., Path]
PNG = picture()


@pytest.mark.parametrize("content", [b"", b"no image", PNG[:45]])
def test_damaged_references_are_set_apart(write: Write, tmp_path: Path, content: bytes) -> None:
    write("a.png", content)
    write("b.png", PNG)
    path = write("p.csv", "text,references\nx,a.png\ny,a.png|b.png\n")
    bad, good = tmp_path / "a.png", tmp_path / "b.png"
    prompts = read_prompts(path)
    assert [(p.references, p.damaged_references) for p in prompts] == [((), (bad,)), ((good,), (bad,))]
    write("a.png", PNG)
    assert check_references("p", prompts) == [
        Prompt("p-0001", "x", None, (bad,)),
        Prompt("p-0002", "y", None, (good, bad)),
    ]


def test_references_that_are_all_damaged_are_an_error(write: Write) -> None:
    for name, content in (("a.png", PNG[:45]), ("b.png", b"")):
        write(name, content)
    path = write("p.csv", "text,references\nx,a.png\ny,a.png|b.png\n")
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert "none of the 2 reference files can be read as an image" in message
    assert "a.png of prompt 'p-0001' (" in message
    assert "b.png of prompt 'p-0002' (no image); replace them, or take them out of the list" in message


def test_missing_references_are_an_error_that_counts_them(write: Write) -> None:
    write("there.png", "image")
    path = write("p.csv", "id,text,references\na,x,there.png|1.png|2.png\nb,y,3.png|4.png\nc,z,there.png\n")
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert "4 reference files of 2 prompts" in message
    for part in ("1.png (prompt 'a')", "2.png (prompt 'a')", "3.png (prompt 'b')"):
        assert part in message
    assert "4.png" not in message
    assert "there.png" not in message


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text(), st.binary(max_size=8)), min_size=1, max_size=3))
def test_digests_do_not_depend_on_folders_and_names(prompts: list[tuple[str, bytes]]) -> None:
    def in_folder(folder: Path, ending: str) -> str:
        listed = []
        for n, (text, image) in enumerate(prompts):
            reference = folder / f"{n}{ending}"
            reference.write_bytes(image)
            listed.append(Prompt(str(n), text, None, (reference,)))
        return prompts_digest(listed) + references_digest(listed)

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        assert in_folder(Path(one), ".png") == in_folder(Path(other), ".jpg")


def test_digests_depend_on_prompts_and_contents_of_references(write: Write) -> None:
    red, blue = write("red.png", "red"), write("blue.png", "blue")
    prompt = Prompt("1", "a", "VM", (red,))
    own = [prompt._replace(id="2"), prompt._replace(text="b"), prompt._replace(kind="TM"), prompt._replace(kind=None)]
    assert len({prompts_digest([p]) for p in [prompt, *own]}) == 5
    shown = [prompt._replace(references=files) for files in ((blue,), (red, red), ())]
    assert len({references_digest([p]) for p in [prompt, *shown]}) == 4
    assert {prompts_digest([p]) for p in shown} == {prompts_digest([prompt])}
    before = references_digest([prompt])
    red.write_text("green")
    assert references_digest([prompt]) != before
    red.unlink()
    with pytest.raises(PromptError, match=r"red\.png"):
        references_digest([prompt])


def test_a_damaged_manifest_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"url": "a", "status": "dead"}\nnonsense\n{"url": "b", "status": "dead"}\n')
    with pytest.raises(PromptError, match="line 2 is no entry"):
        read_manifest(tmp_path)
