"""Words of the command line and YAML files: text stays text."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cell_configs import one_cell
from nemo_bench.config import (
    grid,
)
from nemo_bench.config.overrides import read, shell_word

TYPED = ["2026_11_29", "1e3", "1_0", "0x10", "007", "1.", "-0", "true", "No", "nan", "inf"]
"""Names that look like something else."""


@pytest.mark.parametrize("text", TYPED)
def test_text_that_looks_like_a_number_stays_text(text: str, tmp_path: Path) -> None:
    settings = one_cell(f"root={text}", f"logger.entity='{text}'", f"prompts.files=[{text},a.csv]").settings
    assert (settings.root, settings.logger.entity, settings.prompts.files) == (text, text, [text, "a.csv"])
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("_target_: nemo_bench.methods.SavedNeurons\nfile: a.csv\n")
    (choice,) = grid(["method=mine", f"method.file={text}"], tmp_path)
    assert choice.settings.method["file"] == text


def test_text_that_looks_like_a_number_stays_text_in_sweeps_and_grids(study: Path) -> None:
    assert [choice.settings.root for choice in grid([f"root={','.join(TYPED)}", "method=none"])] == TYPED
    assert [choice.settings.root for choice in grid(["root=choice(1_0,1e3)", "method=none"])] == ["1_0", "1e3"]
    (study / "experiment" / "study.yaml").write_text("# @package _global_\ngrid: [method=none name=1_0]\n")
    assert grid(["experiment=study"], study)[0].settings.name == "1_0"
    assert [choice.settings.seeds for choice in grid(["seeds=1_0,2", "method=none"])] == [10, 2]


def test_null_is_none_where_text_is_optional() -> None:
    settings = one_cell("real_images=null", "model.revision=NULL", "name=null").settings
    assert (settings.real_images, settings.model.revision, settings.name) == (None, None, "null")


@pytest.mark.parametrize("text", TYPED)
def test_yaml_file_of_the_user_keeps_its_text(text: str, tmp_path: Path) -> None:
    for group in ("experiment", "model", "prompts"):
        (tmp_path / group).mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\nname: {text}\nseeds: 1_0\nmodel: {{revision: {text}}}\nreal_images: null\n"
    )
    (tmp_path / "prompts" / "mine.yaml").write_text(f"files: [{text}, b.csv]\nlimit: 3\n")
    settings = one_cell("experiment=mine", "prompts=mine", conf=tmp_path).settings
    assert (settings.name, settings.model.revision, settings.seeds) == (text, text, 10)
    assert (settings.real_images, settings.prompts.limit) == (None, 3)
    assert settings.prompts.files[0] == text


HOME = str(Path.home())


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("root=~/results", f"{HOME}/results"),
        ("root='~/results'", f"{HOME}/results"),
        ("root=a~b", "a~b"),
        ("root=my results", "my results"),
        ("root=results (new)", "results (new)"),
        ("root=it's", "it's"),
        ("root=a=b&c;d!#^`<>", "a=b&c;d!#^`<>"),
        ("root=größe/☃", "größe/☃"),
        ("root=[old] x", "[old] x"),
        ("root=a$b", "a$b"),
        (r"root=C:\new\x", r"C:\new\x"),
        ("root=${name}", "default"),
        ("prompts.files=my prompts.csv", ["my prompts.csv"]),
        ("prompts.files=[my prompts.csv,~/ö.csv, 'a,b.csv' ]", ["my prompts.csv", "~/ö.csv", "a,b.csv"]),
    ],
)
def test_special_characters_need_no_quotes(word: str, found: str | list[str]) -> None:
    settings = one_cell(word).settings
    assert (settings.root if word.startswith("root") else settings.prompts.files) == found


@pytest.mark.parametrize("key", ["files", "shared_from"])
def test_single_prompt_file_needs_no_brackets(key: str) -> None:
    assert getattr(one_cell(f"prompts.{key}=a.csv").settings.prompts, key) == ["a.csv"]


@given(st.text())
@example("${name}")
@example("\\\\${name}\\")
@example("'\"'\\\"")
@example("a\nb")
def test_quoted_text_is_read_back(text: str) -> None:
    (word,) = shlex.split(shell_word("root", text))
    key, value = read(word).key_or_group, read(word).value()
    assert key == "root"
    assert OmegaConf.create({"root": value, "name": "x"}).root == text


@pytest.mark.parametrize(
    "text", ["${name}", "\\${name}", "'\"'\\\"", "a,b", "[x]", "{a: 1}", " x ", "1_0", "\\", "range(1,2)"]
)
def test_quoted_text_reaches_the_settings(text: str) -> None:
    (word,) = shlex.split(shell_word("root", text))
    assert one_cell(word).settings.root == text
