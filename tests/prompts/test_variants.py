"""Variants of prompts: how lists name them, and what they get from the prompts that they vary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_bench import Prompt, read_prompts
from nemo_bench.benchmark.plan import read_listed
from nemo_bench.config import PromptSettings
from nemo_bench.errors import PromptError
from nemo_bench.prompts import with_originals
from nemo_bench.records.io import digest, prompts_digest

PICTURE, OTHER = Path("a.png"), Path("b.png")
BASE = Prompt("a", "a red sun", "VM", (PICTURE,))
VARIANT = {"id": "a-fr", "text": "un soleil rouge", "variant_of": "a", "axis": "translation"}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_lists_of_every_form_name_variants(tmp_path: Path) -> None:
    base = {"id": "a", "text": "a red sun", "kind": "VM"}
    jsonl = read_prompts(write(tmp_path / "a.jsonl", base, VARIANT))
    table = tmp_path / "b.csv"
    table.write_text(
        "id,caption,type,variant_of,axis\n"
        "a,a red sun,MV,,\n"
        "a-fr,un soleil rouge,,a,translation\n"
        "a-sea,a red sea,,a,neighbour\n"
    )
    assert read_prompts(table)[:2] == jsonl
    assert [(p.kind, p.variant_of, p.axis, p.group) for p in read_prompts(table, memorized=True)] == [
        ("VM", None, None, "VM"), (None, "a", "translation", "translation"), (None, "a", "neighbour", "neighbour"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({**VARIANT, "axis": "translated"}, "'translated' is no axis of a variant. Did you mean 'translation'"),
        ({**VARIANT, "axis": None}, "variant_of is 'a' and axis ''; give both"),
        ({**VARIANT, "variant_of": ""}, "variant_of is '' and axis 'translation'; give both"),
        ({**VARIANT, "kind": "VM"}, "is a translation of 'a', and of kind VM; leave the kind empty"),
    ],
)
def test_half_a_variant_is_an_error(tmp_path: Path, line: dict[str, Any], told: str) -> None:
    with pytest.raises(PromptError, match=rf"list.jsonl, line 1: .*{told}"):
        read_prompts(write(tmp_path / "list.jsonl", line))


def test_wordings_are_compared_with_the_training_images_of_their_prompt() -> None:
    paraphrase = Prompt("a-1", "the sun in red", variant_of="a", axis="paraphrase")
    own = Prompt("a-2", "sun, red", references=(OTHER,), variant_of="a", axis="paraphrase")
    neighbour = Prompt("a-3", "a red sea", variant_of="a", axis="neighbour")
    general = Prompt("b", "a mug")
    found = with_originals([paraphrase, own, neighbour, general, BASE])
    assert [prompt.references for prompt in found] == [(PICTURE,), (OTHER,), (), (), (PICTURE,)]
    assert [prompt.text for prompt in found] == ["the sun in red", "sun, red", "a red sea", "a mug", "a red sun"]


def test_variants_of_what_is_not_there_are_errors() -> None:
    lost = Prompt("b-1", "x", variant_of="aa", axis="neighbour")
    with pytest.raises(
        PromptError, match=r"'b-1' is a neighbour of 'aa', which is no prompt of the run\. Did you mean 'a'"
    ):
        with_originals([BASE, lost])
    first = Prompt("a-1", "x", variant_of="a", axis="paraphrase")
    second = Prompt("a-2", "y", variant_of="a-1", axis="translation")
    with pytest.raises(PromptError, match="itself a paraphrase; name the prompt that it varies, 'a'"):
        with_originals([BASE, first, second])


def test_a_limit_leaves_out_variants_of_prompts_beyond_it(tmp_path: Path) -> None:
    bases = [{"id": name, "text": f"prompt {name}"} for name in "abc"]
    variants = [{"id": f"{n}-1", "text": f"wording {n}", "variant_of": n, "axis": "paraphrase"} for n in "cba"]
    files = [str(write(tmp_path / "a.jsonl", *bases)), str(write(tmp_path / "b.jsonl", *variants))]
    assert [p.id for p in read_listed(PromptSettings(files))] == ["a", "b", "c", "c-1", "b-1", "a-1"]
    assert [p.id for p in read_listed(PromptSettings(files, limit=2))] == ["a", "b", "b-1"]
    with pytest.raises(PromptError, match="'c-1' is a paraphrase of 'c', which is no prompt of the run"):
        read_listed(PromptSettings(files[1:]))


def test_variants_change_the_digest_and_other_prompts_keep_theirs() -> None:
    assert prompts_digest([BASE]) == digest([["a", "a red sun", "VM"]])
    variant = Prompt("a-1", "x", variant_of="a", axis="paraphrase")
    others = [variant._replace(axis="neighbour"), variant._replace(variant_of="b"), Prompt("a-1", "x")]
    assert len({prompts_digest([prompt]) for prompt in (variant, *others)}) == 4
