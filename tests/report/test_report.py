"""Writing the files of a report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_bench.records.results import load_results
from nemo_bench.report import write_report


def test_the_same_records_give_the_same_bytes(run: Path, page: str) -> None:
    files = sorted(path for path in run.iterdir() if path.is_file() and path.name != "run.json")
    assert [path.name for path in files] == [
        "leaderboard.csv",
        "leaderboard.json",
        "leaderboard.md",
        "leaderboard.tex",
        "report.html",
    ]
    before = [path.read_bytes() for path in files]
    write_report(load_results(run))
    assert [path.read_bytes() for path in files] == before


def test_a_report_cut_off_leaves_the_former_one(default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (default / "report.html").write_text("former")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(load_results(default))
    assert (default / "report.html").read_text() == "former"
    assert not [path for path in default.iterdir() if path.suffix in (".tmp", ".part")]


def test_a_finished_table_is_shown_without_a_library_for_plots_or_models(default: Path) -> None:
    code = (
        "import sys\n"
        "from nemo_bench.records.results import load_results\n"
        "from nemo_bench.report.console import show\n"
        "from nemo_bench.report.terminal import terminal_table\n"
        "show(terminal_table(load_results(sys.argv[1])))\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(default)], capture_output=True, text=True, check=True)
    assert "No mitigation" in done.stdout
    assert not {"matplotlib", "jinja2", "torch", "lightning", "wandb"} & set(done.stdout.splitlines()[-1].split())
