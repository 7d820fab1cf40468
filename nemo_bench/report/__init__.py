"""Tables, plots and one self-contained page, made from the records of a run.

Example:
    >>> files = write_report(Path("results/default"))  # doctest: +SKIP
    >>> files.html  # doctest: +SKIP
    PosixPath('results/default/report.html')
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nemo_bench.report.audit import audit_section
from nemo_bench.report.data import Results, load_results
from nemo_bench.report.html import page
from nemo_bench.report.tables import Row, csv_text, json_text, latex, leaderboard, markdown, terminal_table

__all__ = ["ReportFiles", "Results", "Row", "leaderboard", "load_results", "terminal_table", "write_report"]


@dataclass(frozen=True)
class ReportFiles:
    """Where the report of a run lies."""

    html: Path
    markdown: Path
    latex: Path
    csv: Path
    json: Path


def write_report(folder: Path | str) -> ReportFiles:
    """Writes ``report.html`` and ``leaderboard.{md,tex,csv,json}`` into the folder of a run, each whole or not at all.

    Args:
        folder: Such as ``results/default``.

    Returns:
        The files written; the same records give the same bytes.

    Raises:
        StoreError: The folder holds no run, or no cell of it is finished.
    """
    folder = Path(folder)
    results = load_results(folder)
    rows = leaderboard(results)
    contents = {
        "report.html": page(results, rows, audit_section(results)),
        "leaderboard.md": markdown(results, rows),
        "leaderboard.tex": latex(results, rows),
        "leaderboard.csv": csv_text(results, rows),
        "leaderboard.json": json_text(results, rows),
    }
    return ReportFiles(*(_write(folder / name, text) for name, text in contents.items()))


def _write(path: Path, text: str) -> Path:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path
