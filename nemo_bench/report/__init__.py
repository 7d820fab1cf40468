"""Tables, plots and one self-contained page, made from the records of a run.

Example:
    >>> write_report(load_results(Path("results/default")))  # doctest: +SKIP
    PosixPath('results/default/report.html')
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_bench.records.results import Results

__all__ = ["REPORT_FILES", "write_report"]

REPORT_FILES = ("report.html", "leaderboard.md", "leaderboard.tex", "leaderboard.csv", "leaderboard.json")
"""Files that a report consists of."""


def write_report(results: Results) -> Path:
    """Writes :data:`REPORT_FILES` into the folder of a run, each whole or not at all.

    Args:
        results: From :func:`nemo_bench.records.results.load_results`.

    Returns:
        The page; the same records give the same bytes in every file.
    """
    from nemo_bench.records.io import write_text  # records and matplotlib are slow to import
    from nemo_bench.report.html import page
    from nemo_bench.report.tables import csv_text, json_text, latex, leaderboard, markdown

    rows = leaderboard(results)
    texts = [make(results, rows) for make in (page, markdown, latex, csv_text, json_text)]
    for name, text in zip(REPORT_FILES, texts, strict=True):
        write_text(results.folder / name, text)
    return results.folder / REPORT_FILES[0]
