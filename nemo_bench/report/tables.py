"""The leaderboard: rows, and the same rows as Markdown, CSV, JSON and for the terminal."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.markup import escape
from rich.table import Table

from nemo_bench.aggregate import GROUPS
from nemo_bench.report.data import Aggregate, Cell, MetricInfo, Results

_ZERO = re.compile(r"\b0\.(?=\d{3})")  # left out of intervals so that the table fits 80 columns


@dataclass(frozen=True)
class Row:
    """One cell and one group of prompts.

    Attributes:
        cell: The cell.
        group: ``"VM"``, ``"TM"``, ``"general"`` or ``"all"``.
        values: Aggregates by metric; a metric without meaning for the group is absent.
        best: Metrics in which the cell is best among the cells of the same model, prompts and group.
    """

    cell: Cell
    group: str
    values: Mapping[str, Aggregate]
    best: frozenset[str]


def leaderboard(results: Results) -> list[Row]:
    """One row per group and cell, groups and cells in the order of display."""
    return [
        Row(cell, group, cell.aggregates[group], frozenset(_best(results, cell, group)))
        for group in results.groups
        for cell in results.cells
        if cell.aggregates.get(group)
    ]


def decimals(results: Results, metric: str) -> int:
    """Decimal places that suit a metric in this run: three for values below two, else one."""
    found = [scores[metric] for cell in results.cells for scores in cell.aggregates.values() if metric in scores]
    return 3 if max((abs(value.mean) for value in found), default=0.0) < 2 else 1


def markdown_table(rows: Sequence[Row], metrics: Mapping[str, MetricInfo], places: Mapping[str, int]) -> str:
    """A Markdown table of some rows: mean and interval, the best in bold.

    Args:
        rows: Rows of one group.
        metrics: Columns.
        places: Decimal places of every column.
    """
    titles = [f"{info.title} {info.arrow}".strip() for info in metrics.values()]
    lines = [["Method", *titles], ["---", *["---:"] * len(metrics)]]
    for row in rows:
        line = [row.cell.label]
        for key in metrics:
            value, digits = row.values.get(key), places[key]
            mark = "**" if key in row.best else ""
            line.append(
                f"{mark}{value.mean:.{digits}f}{mark} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
                if value
                else "–"
            )
        lines.append(line)
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def markdown(results: Results) -> str:
    """The leaderboard as a Markdown document, one table per group."""
    places = {key: decimals(results, key) for key in results.metrics}
    rows = leaderboard(results)
    parts = [f"# {results.name}\n"]
    for group in results.groups:
        table = markdown_table([row for row in rows if row.group == group], results.metrics, places)
        parts.append(f"## {group} ({GROUPS[group]})\n\n{table}")
    parts.append(
        "Mean over prompts with its 95% bootstrap interval. ↓ lower is better, ↑ higher is better; "
        "bold is best among the methods of one model.\n"
    )
    if results.unfinished:
        parts.append("Not finished:\n\n" + "".join(f"- {name}: {why}\n" for name, why in results.unfinished.items()))
    return "\n".join(parts)


def csv_text(results: Results) -> str:
    """The leaderboard as CSV: one line per group and cell, every number in full."""
    fields = ("mean", "low", "high", "median", "mad", "prompts")
    costs = list(dict.fromkeys(key for cell in results.cells for key in cell.cost))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [f"{key}_{name}" for key in results.metrics for name in fields]
    writer.writerow(["cell", "label", "model", "method", "prompts", "group", *names, *costs])
    for row in leaderboard(results):
        cell = row.cell
        values = [getattr(row.values.get(key), name, "") for key in results.metrics for name in fields]
        cost = [cell.cost.get(key, "") for key in costs]
        writer.writerow([cell.name, cell.label, cell.model, cell.method, cell.prompt_list, row.group, *values, *cost])
    return buffer.getvalue()


def json_text(results: Results) -> str:
    """The leaderboard as JSON: metrics, rows with every number in full, and unfinished cells."""
    rows = [
        {
            "cell": row.cell.name,
            "label": row.cell.label,
            "model": row.cell.model,
            "method": row.cell.method,
            "prompts": row.cell.prompt_list,
            "group": row.group,
            "metrics": {key: asdict(value) for key, value in row.values.items()},
            "best": [key for key in results.metrics if key in row.best],
            "cost": dict(row.cell.cost),
        }
        for row in leaderboard(results)
    ]
    metrics = {key: {k: v for k, v in asdict(info).items() if k != "key"} for key, info in results.metrics.items()}
    content = {
        "schema": 1,
        "name": results.name,
        "metrics": metrics,
        "rows": rows,
        "unfinished": dict(results.unfinished),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def terminal_table(results: Results) -> Table:
    """The leaderboard for the terminal: mean, and its interval below; the best is bold."""
    caption = "mean, 95% interval · bold: best of a model"
    table = Table(title=escape(results.name), caption=caption, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("method")
    for key, info in results.metrics.items():
        table.add_column(escape(f"{key.replace('_', ' ')} {info.arrow}".strip().replace(" ", "\n")), justify="right")
    rows = leaderboard(results)
    for group in results.groups:
        table.add_row()
        table.add_row(f"[bold]{group}[/bold]")
        for row in (row for row in rows if row.group == group):
            values = [_terminal(row, key, decimals(results, key)) for key in results.metrics]
            table.add_row(escape(row.cell.label), *values)
    for name, why in results.unfinished.items():
        table.add_row(f"[yellow]{escape(name)}: {why}[/yellow]")
    return table


def _terminal(row: Row, key: str, places: int) -> str:
    value = row.values.get(key)
    if not value:
        return "[dim]–[/dim]"
    mean = f"[bold green]{value.mean:.{places}f}[/bold green]" if key in row.best else f"{value.mean:.{places}f}"
    ends = (f"{end:.{places}f}" for end in (value.low, value.high))
    return f"{mean}\n[dim]{'–'.join(_ZERO.sub('.', end) for end in ends)}[/dim]"


def _best(results: Results, cell: Cell, group: str) -> list[str]:
    rivals = [c for c in results.cells if (c.model, c.prompt_list) == (cell.model, cell.prompt_list)]
    found = []
    for key, info in results.metrics.items():
        means = [scores[key].mean for rival in rivals if key in (scores := rival.aggregates.get(group, {}))]
        own = cell.aggregates[group].get(key)
        if own and info.higher_is_better is not None and len(set(means)) > 1:
            wanted = max(means) if info.higher_is_better else min(means)
            found += [key] if own.mean == wanted else []
    return found
