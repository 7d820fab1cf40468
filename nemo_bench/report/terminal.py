"""Tables of results for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from nemo_bench.records.results import DetectorResults, Results
from nemo_bench.records.schema import LeaderboardRow, MetricInfo
from nemo_bench.records.store import remake
from nemo_bench.report.audit import CellAudit
from nemo_bench.report.detection import COLUMNS, comparable, count_of, texts
from nemo_bench.report.tables import ends, fewer, leaderboard, number

_METRICS = 6  # that fit 80 characters
_ZERO = re.compile(r"\b0\.(?=\d{3})")  # left out of intervals so that the table fits 80 columns


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
    table = Table(title=escape(results.name), caption=caption, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("method")
    for key, info in shown.items():
        heading = f"{key.replace('_', ' ')} {info.arrow}".strip().replace(" ", "\n")
        table.add_column(escape(heading), justify="right", no_wrap=True)
    rows = leaderboard(results)
    for group in results.own_groups:
        table.add_row()
        table.add_row(f"[bold]{results.heading(group)}[/bold]")
        for row in (row for row in rows if row.group == group):
            values = [_value(results, row, key) if key in row.metrics else "[dim]–[/dim]" for key in shown]
            notes = [f"[yellow]failed: {row.failed}[/yellow]"] if row.failed.total else []
            notes += [f"[dim]{words}[/dim]"] if (words := row.searches) else []
            table.add_row("\n".join([escape(row.label), *notes]), *values)
    return table


def _value(results: Results, row: LeaderboardRow, key: str) -> str:
    value = row.metrics[key]
    mean = number(results, key, value.mean)
    if key in row.best:
        mean = f"[bold green]{mean}[/bold green]" if row.is_clear(key) else f"[green]{mean}[/green]"
    low, high = ends(results, row, key)
    lines = [mean]
    lines += [f"[dim]{_ZERO.sub('.', low)}–{_ZERO.sub('.', high)}[/dim]"] if low else []
    lines += [f"[dim]{few}[/dim]"] if (few := fewer(row, value)) else []
    return "\n".join(lines)


def terminal_detection(detectors: Sequence[DetectorResults]) -> list[Table]:
    """The table of detectors for the terminal, one for each model and its prompts; single kinds are on the page."""
    columns = [key for key in COLUMNS if key not in ("VM", "TM")]
    tables = []
    for heading, group in comparable(detectors):
        title = f"{escape(heading)}: {count_of(group[0])}"
        table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("Detector")
        for key in columns:
            table.add_column(COLUMNS[key], justify="right", no_wrap=True)
        for detector in group:
            failed = f"{detector.failed} of {len(detector.prompts)}"
            note = f"\n[yellow]failed: {failed} prompts[/yellow]" if detector.failed else ""
            table.add_row(f"{escape(detector.label)}{note}", *(texts(detector)[key] for key in columns))
        tables.append(table)
    return tables


def terminal_audits(audits: Sequence[CellAudit]) -> list[Table | str]:
    """Audits for the terminal: a table for each, and what it says."""
    parts: list[Table | str] = []
    for shown in audits:
        groups = shown.audit.groups
        names = {"memorized": "training images", "control": "controls"}
        counts = ", ".join(f"{groups[group]} {word}" for group, word in names.items() if group in groups)
        table = Table(title=escape(f"{shown.title} ({counts})"), title_justify="left", box=None, pad_edge=False)
        for heading in ("", *shown.headings):
            table.add_column(heading.replace(": ", "\n"), justify="right" if heading else "left", no_wrap=bool(heading))
        for title, cells in shown.rows:
            table.add_row(escape(title), *cells)
        parts += [table, *(escape(f"{text}\n") for text in shown.sentences)]
    return parts
