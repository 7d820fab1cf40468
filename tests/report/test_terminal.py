"""The command line's output: any encoding, any width."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from fake_results import write_fake_results
from nemo_bench.cli import main


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results that were made up."""
    return write_fake_results(tmp_path / "default")


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
    encoding: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = shown(["report", str(results)], encoding, monkeypatch)
    assert status == 0
    assert "ssim" in said
    assert ("v" if encoding != "utf-8" else "↓") in said.replace("variant", "").split()
    assert "95% interval" in said
    assert (results / "report.html").read_text(encoding="utf-8")
    status, said = shown(["report", str(results.parent / "größe ☃")], encoding, monkeypatch)
    assert status == 1
    assert "größe ☃".encode(encoding, "backslashreplace").decode(encoding) in said
