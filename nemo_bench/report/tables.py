"""The leaderboard: rows, and the same rows as Markdown, LaTeX, CSV, JSON and for the terminal."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TypeVar

from rich.markup import escape
from rich.table import Table

from nemo_bench.aggregate import GROUPS
from nemo_bench.report.data import Aggregate, Cell, MetricInfo, Results

SIGNIFICANCE = (
    "Stars: different from no mitigation on the same prompts and seeds, two-sided paired sign-flip test, "
    "Holm-corrected over the rows of a table; * p < 0.05, ** p < 0.01, *** p < 0.001."
)
"""What the stars at a mean say."""

_LEVELS = (0.05, 0.01, 0.001)
_NUMBERS = ("mean", "low", "high", "median", "mad", "prompts")
_DIFFERENCE = ("difference", "low", "high", "p", "prompts")
_COLUMNS = 6  # metrics that fit 80 characters, and a page
_ZERO = re.compile(r"\b0\.(?=\d{3})")  # left out of intervals so that the table fits 80 columns
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "·": r"$\cdot$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--",
}  # fmt: skip
_K = TypeVar("_K", bound=Hashable)


@dataclass(frozen=True)
class Row:
    """One cell and one group of prompts.

    Attributes:
        cell: The cell.
        group: ``"VM"``, ``"TM"``, ``"general"`` or ``"all"``.
        values: Aggregates by metric; a metric without meaning for the group is absent.
        best: Metrics in which the cell is best among the cells of the same model, prompts and group.
        corrected: p of the paired test against no mitigation by metric, corrected by Holm over the rows of its group.
    """

    cell: Cell
    group: str
    values: Mapping[str, Aggregate]
    best: frozenset[str]
    corrected: Mapping[str, float]

    def stars(self, metric: str) -> str:
        """One star for each level in :data:`SIGNIFICANCE` that the corrected p of a metric is below."""
        p = self.corrected.get(metric, 1.0)
        return "*" * sum(p < level for level in _LEVELS)


def leaderboard(results: Results) -> list[Row]:
    """One row per group and cell, groups and cells in the order of display."""
    rows = []
    for group in results.groups:
        cells = [cell for cell in results.cells if cell.aggregates.get(group)]
        corrected: dict[str, dict[str, float]] = {cell.name: {} for cell in cells}
        for key in results.metrics:
            values = {cell.name: cell.aggregates[group].get(key) for cell in cells}
            for name, p in holm({n: v.paired.p for n, v in values.items() if v and v.paired}).items():
                corrected[name][key] = p
        rows += [
            Row(cell, group, cell.aggregates[group], frozenset(_best(results, cell, group)), corrected[cell.name])
            for cell in cells
        ]
    return rows


def holm(ps: Mapping[_K, float]) -> dict[_K, float]:
    """Values of p corrected for testing all of them (Holm 1979).

    Example:
        >>> holm({"a": 0.01, "b": 0.03, "c": 0.04})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    found: dict[_K, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        largest = max(largest, min(1.0, ps[name] * (len(ps) - place)))
        found[name] = largest
    return found


def decimals(results: Results, metric: str) -> int:
    """Decimal places that suit a metric in this run: three for values below two, else one."""
    found = [scores[metric] for cell in results.cells for scores in cell.aggregates.values() if metric in scores]
    return 3 if max((abs(value.mean) for value in found), default=0.0) < 2 else 1


def markdown(results: Results) -> str:
    """The leaderboard as a Markdown document, one table per group."""
    rows = leaderboard(results)
    titles = [f"{info.title} {info.arrow}".strip() for info in results.metrics.values()]
    parts = [f"# {results.name}\n"]
    for group in results.groups:
        lines = [["Method", *titles], ["---", *["---:"] * len(titles)]]
        for row in (row for row in rows if row.group == group):
            lines.append([row.cell.label, *(_markdown(row, key, decimals(results, key)) for key in results.metrics)])
        table = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
        parts.append(f"## {group} ({GROUPS[group]})\n\n{table}")
    parts.append(f"{_legend(rows)}\n".replace("*", r"\*"))
    if results.unfinished:
        parts.append("Not finished:\n\n" + "".join(f"- {name}: {why}\n" for name, why in results.unfinished.items()))
    return "\n".join(parts)


def _markdown(row: Row, key: str, places: int) -> str:
    value = row.values.get(key)
    if not value:
        return "–"
    mean = f"**{value.mean:.{places}f}**" if key in row.best else f"{value.mean:.{places}f}"
    interval = "" if value.low is None else f" [{value.low:.{places}f}, {value.high:.{places}f}]"
    return mean + r"\*" * len(row.stars(key)) + interval


def latex(results: Results) -> str:
    r"""The leaderboard as LaTeX, one ``table`` per group (and family, of many metrics); needs booktabs."""
    rows = leaderboard(results)
    blocks = {"": list(results.metrics)}
    if len(results.metrics) > _COLUMNS:
        families = dict.fromkeys(info.family for info in results.metrics.values())
        blocks = {family: [k for k, info in results.metrics.items() if info.family == family] for family in families}
    parts = ["% Needs \\usepackage{booktabs}. Subscripts are 95% bootstrap intervals over prompts.\n"]
    for group, (family, keys) in product(results.groups, blocks.items()):
        lines = [
            ["Method", *(tex(f"{results.metrics[key].title} {results.metrics[key].arrow}".strip()) for key in keys)]
        ]
        for row in (row for row in rows if row.group == group and any(key in row.values for key in keys)):
            lines.append([tex(row.cell.label), *(_latex(row, key, decimals(results, key)) for key in keys)])
        if len(lines) > 1:
            head, *body = (f"    {' & '.join(line)} \\\\\n" for line in lines)
            name = f"{results.name}, {group} ({GROUPS[group]}){f', {family}' if family else ''}"
            parts.append(
                "\\begin{table}\n  \\centering\n"
                f"  \\caption{{{tex(f'{name}. {_legend(rows)}')}}}\n"
                f"  \\label{{tab:{re.sub('[^0-9A-Za-z]+', '-', f'{results.name}-{group}-{family}').strip('-')}}}\n"
                f"  \\begin{{tabular}}{{l{'r' * len(keys)}}}\n    \\toprule\n{head}    \\midrule\n{''.join(body)}"
                "    \\bottomrule\n  \\end{tabular}\n\\end{table}\n"
            )
    return "\n".join(parts)


def tex(text: str) -> str:
    """Any text on one line as LaTeX that shows it."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex(row: Row, key: str, places: int) -> str:
    value = row.values.get(key)
    if not value:
        return "--"
    mean = rf"\mathbf{{{value.mean:.{places}f}}}" if key in row.best else f"{value.mean:.{places}f}"
    stars = f"^{{{row.stars(key)}}}" if row.stars(key) else ""
    interval = "" if value.low is None else rf"_{{[{value.low:.{places}f},\,{value.high:.{places}f}]}}"
    return f"${mean}{stars}{interval}$"


def _legend(rows: Sequence[Row]) -> str:
    legend = (
        "Mean over prompts with its 95% bootstrap interval. ↓ lower is better, ↑ higher is better; bold is best among "
        "the methods of one model."
    )
    return f"{legend} {SIGNIFICANCE}" if any(row.corrected for row in rows) else legend


def csv_text(results: Results) -> str:
    """The leaderboard as CSV: one line per group and cell, every number in full, what is absent empty."""
    costs = list(dict.fromkeys(key for cell in results.cells for key in cell.cost))
    counts = list(dict.fromkeys(key for cell in results.cells for key in cell.counts))
    names = [
        f"{key}_{name}"
        for key in results.metrics
        for name in (*_NUMBERS, *(f"paired_{name}" for name in _DIFFERENCE), "paired_p_holm")
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["cell", "label", "model", "method", "prompts", "group", *names, *costs, *counts])
    for row in leaderboard(results):
        cell = row.cell
        values: list[object] = [cell.name, cell.label, cell.model, cell.method, cell.prompt_list, row.group]
        for key in results.metrics:
            value = row.values.get(key)
            values += [getattr(value, name, None) for name in _NUMBERS]
            values += [getattr(value.paired if value else None, name, None) for name in _DIFFERENCE]
            values.append(row.corrected.get(key))
        values += [cell.cost.get(key) for key in costs] + [cell.counts.get(key) for key in counts]
        writer.writerow(values)
    return buffer.getvalue()


def json_text(results: Results) -> str:
    """The leaderboard as JSON: metrics, rows with every number in full, and unfinished cells."""
    rows = []
    for row in leaderboard(results):
        cell = row.cell
        metrics = {key: asdict(value) for key, value in row.values.items()}
        for key, p in row.corrected.items():
            metrics[key]["paired"]["p_holm"] = p
        rows.append({
            "cell": cell.name,
            "label": cell.label,
            "model": cell.model,
            "method": cell.method,
            "prompts": cell.prompt_list,
            "group": row.group,
            "metrics": metrics,
            "best": [key for key in results.metrics if key in row.best],
            "cost": dict(cell.cost),
            "counts": dict(cell.counts),
        })  # fmt: skip
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
    """The leaderboard for the terminal: mean, and its interval below; the best is bold.

    Of many metrics it shows the first of every family; the files hold all of them.
    """
    shown: Mapping[str, MetricInfo] = results.metrics
    caption = "mean, 95% interval · bold: best of a model"
    if len(shown) > _COLUMNS:
        shown = {key: results.metrics[key] for key in results.leading.values()}
        caption += f"\n{len(results.metrics) - len(shown)} more metrics in leaderboard.md"
    table = Table(title=escape(results.name), caption=caption, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("method")
    for key, info in shown.items():
        table.add_column(escape(f"{key.replace('_', ' ')} {info.arrow}".strip().replace(" ", "\n")), justify="right")
    rows = leaderboard(results)
    for group in results.groups:
        table.add_row()
        table.add_row(f"[bold]{group}[/bold]")
        for row in (row for row in rows if row.group == group):
            values = [_terminal(row, key, decimals(results, key)) for key in shown]
            table.add_row(escape(row.cell.label), *values)
    for name, why in results.unfinished.items():
        table.add_row(f"[yellow]{escape(name)}: {why}[/yellow]")
    return table


def _terminal(row: Row, key: str, places: int) -> str:
    value = row.values.get(key)
    if not value:
        return "[dim]–[/dim]"
    mean = f"[bold green]{value.mean:.{places}f}[/bold green]" if key in row.best else f"{value.mean:.{places}f}"
    if value.low is None or value.high is None:
        return mean
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
