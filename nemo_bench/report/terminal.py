"""Tables of results for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from nemo_bench.errors import counted
from nemo_bench.records.results import DetectorResults, Results
from nemo_bench.records.schema import LeaderboardRow, LocalizerTable, MetricInfo, RegionTable, SimilarityTable
from nemo_bench.records.store import remake
from nemo_bench.report.audit import CellAudit
from nemo_bench.report.copies import pairs_of, unchanged_lines
from nemo_bench.report.detection import COLUMNS, comparable, count_of, texts
from nemo_bench.report.localizers import sections, shown_measures, value_text
from nemo_bench.report.regions import gaps
from nemo_bench.report.regions import sections as region_sections
from nemo_bench.report.regions import titles as region_titles
from nemo_bench.report.tables import ends, fewer, leaderboard, mean

_METRICS = 6  # that fit 80 characters
_SHORT = {
    "recall_at_true_number": "R@n",
    "average_precision": "AP",
    "training_similarity": "SSIM",
    "memorization_rate": "Mem.",
    "memorization_score": "Score",
    "general_loss": "Gen. loss",
    "row_passes": "Passes",
    "seconds": "s",
}
"""Short titles of measures of localizers."""
_ZERO = re.compile(r"\b0\.(?=\d{3})")  # left out of intervals so that the table fits 80 columns


def _table(names: str, numbers: Iterable[str], **look: Any) -> Table:
    """A table whose first column names the rows, and whose others are never broken."""
    table = Table(names, **look)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def terminal_table(results: Results) -> Table:
    """The leaderboard for the terminal: mean, and its interval below; the best is bold.

    Of many metrics it shows the first of every family; the files hold all of them.
    """
    shown: Mapping[str, MetricInfo] = results.metrics
    caption = "mean, 95% interval · green: best of a model; bold: different from the runner-up, paired p < 0.05"
    if len(shown) > _METRICS:
        shown = {key: results.metrics[key] for key in results.leading.values()}
        caption += f"\n{len(results.metrics) - len(shown)} more metrics in leaderboard.md"
    for name, why in results.unfinished.items():
        caption += f"\n[yellow]not finished: {escape(f'{name}: {why}')}[/yellow]"
    if results.unfinished:
        caption += f"\n{results.advice}"
    for cell in results.cells:
        if cell.lost_images:
            lost = f"{cell.label}: images that are gone or cut since they were scored: {cell.lost_images}"
            caption += f"\n[yellow]{escape(f'{lost}; {remake(cell.folder)}')}[/yellow]"
    headings = (f"{key.replace('_', ' ')} {info.arrow}".strip().replace(" ", "\n") for key, info in shown.items())
    table = _table(
        "method", map(escape, headings), title=escape(results.name), caption=caption, box=None, padding=(0, 2, 0, 0),
        pad_edge=False,
    )  # fmt: skip
    rows = leaderboard(results)
    for group in results.own_groups:
        table.add_row()
        table.add_row(f"[bold]{results.heading(group)}[/bold]")
        for row in (row for row in rows if row.group == group):
            values = [_value(results, row, key) if key in row.metrics else "[dim]–[/dim]" for key in shown]
            notes = [f"[yellow]failed: {row.failed}[/yellow]"] if row.failed.total else []
            notes += [f"[dim]{row.searches}[/dim]"] if row.searches else []
            notes += [f"[dim]collateral {row.collateral}[/dim]"] if row.collateral else []
            table.add_row("\n".join([escape(row.label), *notes]), *values)
    return table


def _value(results: Results, row: LeaderboardRow, key: str) -> str:
    low, high = ends(results, row, key)
    lines = [mean(results, row, key, "[bold green]{}[/bold green]", "[green]{}[/green]")]
    lines += [f"[dim]{_ZERO.sub('.', low)}–{_ZERO.sub('.', high)}[/dim]"] if low else []
    lines += [f"[dim]{few}[/dim]"] if (few := fewer(row, key)) else []
    return "\n".join(lines)


def terminal_detection(detectors: Sequence[DetectorResults]) -> list[Table]:
    """The table of detectors for the terminal, one for each model and its prompts; single kinds are on the page."""
    columns = [key for key in COLUMNS if key not in ("VM", "TM")]
    tables = []
    for heading, group in comparable(detectors):
        title = f"{escape(heading)}: {count_of(group[0])}"
        shown = (COLUMNS[key][0] for key in columns)
        table = _table("Detector", shown, title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for detector in group:
            failed = f"{detector.failed} of {len(detector.prompts)}"
            note = f"\n[yellow]failed: {failed} prompts[/yellow]" if detector.failed else ""
            table.add_row(f"{escape(detector.label)}{note}", *(texts(detector)[key] for key in columns))
        tables.append(table)
    return tables


def terminal_localizers(table: LocalizerTable) -> list[Table]:
    """Localizers for the terminal, a table for each comparison and group: mean, and its interval below."""
    tables = []
    for heading, rows in sections(table):
        measures = shown_measures(table, rows)
        titles = (f"{_SHORT.get(key, info.title)} {info.arrow}".strip() for key, info in measures.items())
        title = escape(heading)
        shown = _table("Localizer", titles, title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for row in rows:
            texts = (value_text(row, key) for key in measures)
            cells = (f"{mean}\n[dim]{_ZERO.sub('.', interval)}[/dim]" if interval else mean for mean, interval in texts)
            failed = f"\n[yellow]failed: {counted(row.failed, 'prompt')}[/yellow]" if row.failed else ""
            shown.add_row(f"{escape(row.label)}{failed}", *cells)
        shown.caption = f"stars: different from {escape(table.against[rows[0].comparison])}"
        tables.append(shown)
    return tables


def terminal_regions(table: RegionTable) -> list[Table]:
    """Localizers of regions for the terminal, a table for each set of images."""
    tables = []
    for heading, lines in region_sections(table):
        first, *others = region_titles()
        shown = _table(first, others, title=escape(heading), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for line in lines:
            shown.add_row(*map(escape, line))
        shown.caption = escape("\n".join(gaps(table))) or None
        tables.append(shown)
    return tables


def terminal_similarity(table: SimilarityTable) -> Table:
    """Metrics of similarity for the terminal: unchanged images."""
    (first, *titles), *lines = unchanged_lines(table)
    title = escape("; ".join(pairs_of(table)))
    shown = _table(first, titles, title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for line in lines:
        shown.add_row(*map(escape, line))
    return shown


def terminal_audits(audits: Sequence[CellAudit]) -> list[Table | str]:
    """Audits for the terminal: a table for each, and what it says."""
    parts: list[Table | str] = []
    for shown in audits:
        groups = shown.audit.groups
        names = {"memorized": "training images", "control": "controls"}
        counts = ", ".join(f"{groups[group]} {word}" for group, word in names.items() if group in groups)
        headings = (heading.replace(": ", "\n") for heading in shown.headings)
        title = escape(f"{shown.title} ({counts})")
        table = _table("", headings, title=title, title_justify="left", box=None, pad_edge=False)
        for metric, cells in shown.rows:
            table.add_row(escape(metric), *cells)
        parts += [table, *(escape(f"{text}\n") for text in shown.sentences)]
    return parts
