"""The command line's output: any encoding, any width."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Column, Table

from nemo_bench.cli import main
from nemo_bench.config import options
from nemo_bench.records.results import load_results
from nemo_bench.report.console import fitting
from nemo_bench.report.tables import leaderboard
from nemo_bench.report.terminal import terminal_table


def shown(words: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Status and output of a process whose streams have an encoding."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["nemo-bench", *words])
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        status = main()
        said = b""
        for stream in streams.values():
            stream.flush()
            said += stream.buffer.getvalue()  # type: ignore[attr-defined]
    return status, said.decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_output_that_is_not_utf_8_is_written_in_look_alikes(
    encoding: str, default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = shown(["report", str(default)], encoding, monkeypatch)
    assert status == 0
    assert "ssim" in said
    assert ("v" if encoding != "utf-8" else "↓") in said.replace("variant", "").split()
    assert "95% interval" in said
    assert (default / "report.html").read_text(encoding="utf-8")
    status, said = shown(["report", str(default.parent / "größe ☃")], encoding, monkeypatch)
    assert status == 1
    assert "größe ☃".encode(encoding, "backslashreplace").decode(encoding) in said


def printed(table: Table, width: int) -> str:
    """A table in a terminal of a width."""
    console = Console(width=width, file=io.StringIO())
    console.print(*fitting(table, console))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [25, 40, 60, 80, 200])
def test_a_narrow_terminal_cuts_no_number_of_the_leaderboard(width: int, default: Path) -> None:
    table = terminal_table(load_results(default))
    whole = re.findall(r"\d*\.\d+", printed(table, 1000))
    found = printed(table, width)
    assert len(whole) > 40
    assert sorted(re.findall(r"\d*\.\d+", found)) == sorted(whole)
    assert "…" not in found
    assert max(map(len, found.splitlines())) <= width


@given(st.lists(st.lists(st.integers(0, 10**9), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(16, 100))
def test_a_table_that_is_split_shows_every_column_once_beside_the_names_of_its_rows(
    rows: list[list[int]], width: int
) -> None:
    table = Table(Column("name"), *(Column(f"c{n}", no_wrap=True) for n in range(4)), title="of", caption="end")
    for number, row in enumerate(rows):
        table.add_row(f"row{number}", *map(str, row))
    found = printed(table, width)
    words = re.findall(r"\w+", found)
    parts = words.count("name")
    assert (words.count("of"), words.count("end")) == (1, 1)
    assert [words.count(f"c{n}") for n in range(4)] == [1] * 4
    assert [words.count(f"row{n}") for n in range(len(rows))] == [parts] * len(rows)
    assert sorted(word for word in words if word.isdigit()) == sorted(str(value) for row in rows for value in row)


def test_the_terminal_table_keeps_every_number_in_80_columns(default: Path) -> None:
    results = load_results(default)
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(terminal_table(results))
    text = buffer.getvalue()
    for row in (row for row in leaderboard(results) if row.group != "all"):
        assert f"{row.metrics['alignment'].mean:.3f}" in text
        assert f"{row.metrics['fid'].mean:.1f}" in text
    assert "2 more metrics in leaderboard.md" in text
    assert "…" not in text


@pytest.mark.parametrize("group", ["method", "detector", None])
def test_the_listing_shows_names_in_full_and_no_stumps(
    group: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["ls", *([group] if group else [])]) == 0
    shown = capsys.readouterr().out
    for kind in [group] if group else ["model", "method", "detector", "prompts", "metrics", "experiment"]:
        assert set(options(kind)) <= set(shown.split())
    assert "@" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_listing_of_a_narrow_terminal_has_each_summary_beside_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["ls"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^static_transition +method", shown, re.MULTILINE)
    assert re.search(r"^static_transition +(method +)?no guidance before a", shown, re.MULTILINE)
