"""Tables, plots and one self-contained page, made from the records of a run.

Example:
    >>> files = write_report(load_results(Path("results/default")))  # doctest: +SKIP
    >>> files.html  # doctest: +SKIP
    PosixPath('results/default/report.html')
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_bench.records.io import write_text
from nemo_bench.records.results import Results
from nemo_bench.report.tables import csv_text, json_text, latex, leaderboard, markdown

__all__ = ["ReportFiles", "leaderboard", "write_report"]


REPORT_FILES = ("report.html", "leaderboard.md", "leaderboard.tex", "leaderboard.csv", "leaderboard.json")
"""Files that a report consists of."""


@dataclass(frozen=True)
class ReportFiles:
    """Files of the report of a run."""

    html: Path
    markdown: Path
    latex: Path
    csv: Path
    json: Path


def write_report(results: Results) -> ReportFiles:
    """Writes ``report.html`` and ``leaderboard.{md,tex,csv,json}`` into the folder of a run, each whole or not at all.

    Args:
        results: From :func:`nemo_bench.records.results.load_results`.

    Returns:
        The files; the same records give the same bytes.
    """
    from nemo_bench.report.html import page  # matplotlib is slow to import

    rows = leaderboard(results)
    texts = (
        page(results, rows),
        markdown(results, rows),
        latex(results, rows),
        csv_text(results, rows),
        json_text(results, rows),
    )
    for name, text in zip(REPORT_FILES, texts, strict=True):
        write_text(results.folder / name, text)
    return ReportFiles(*(results.folder / name for name in REPORT_FILES))
