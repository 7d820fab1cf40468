"""The leaderboard: rows, and the same rows as Markdown, LaTeX, CSV, JSON and for the terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from rich.markup import escape
from rich.table import Table

from nemo_bench.errors import counted
from nemo_bench.records.io import as_json
from nemo_bench.records.statistics import paired
from nemo_bench.records.store import made_again
from nemo_bench.report.data import Aggregate, Cell, Failures, MetricInfo, Results

SIGNIFICANCE = (
    "Stars: different from no mitigation on the same prompts and seeds, two-sided paired sign-flip test, "
    "Holm-corrected over the rows of a table; * p < 0.05, ** p < 0.01, *** p < 0.001."
)
"""What the stars at a mean say."""
BEST = (
    "{clear}: best mean among at least two methods of one model, and different from the runner-up (two-sided paired "
    "sign-flip test over prompts, p < 0.05, not corrected). {unclear}: best mean, but not shown to differ from the "
    "runner-up: the difference is too small, the prompts are too few, or single prompts have no value."
)
"""What it says that a value is best."""
SEARCHES = (
    "Search: prompts that passed NeMo's gate, so that neurons were searched; and those of them in which the selection "
    "ran out without meeting its criterion. An edited model has no neurons of general prompts off: what it makes of "
    "these is in the rows of edits for other prompts."
)
"""What the words on the search say."""

FAILED = "Failed: what was not finite; it has no value, and where a mean lacks any it is no best one and has no stars."
"""What the column of failures says."""

_LEVELS = (0.05, 0.01, 0.001)
_NUMBERS = ("mean", "low", "high", "median", "mad", "prompts")
_SEARCHED = ("passed_gate", "exhausted")
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
        best: Metrics in which the cell has the best mean among the cells of the same model, prompts and group, with p
            of the paired test against the runner-up: 1 where there is nothing to pair.
        corrected: p of the paired test against no mitigation by metric, corrected by Holm over the rows of its group.
    """

    cell: Cell
    group: str
    values: Mapping[str, Aggregate]
    best: Mapping[str, float]
    corrected: Mapping[str, float]

    @property
    def failed(self) -> str:
        """What failed, such as ``3 images``; empty where nothing did."""
        return str(self.cell.failures.get(self.group, ""))

    def is_clear(self, metric: str) -> bool:
        """Whether the cell is the best in a metric, and differs from the runner-up; see :data:`BEST`."""
        return self.best.get(metric, 1.0) < _LEVELS[0]

    def stars(self, metric: str) -> str:
        """One star for each level in :data:`SIGNIFICANCE` that the corrected p of a metric is below.

        None where images or scores failed: those that are left may differ because of what is missing.
        """
        p = self.corrected.get(metric, 1.0) if self.cell.is_complete(self.group, metric) else 1.0
        return "*" * sum(p < level for level in _LEVELS)


def leaderboard(results: Results) -> list[Row]:
    """One row per group and cell, groups and cells in the order of display."""
    rows = []
    for group in results.groups:
        cells = [cell for cell in results.cells if group in cell.aggregates]
        corrected: dict[str, dict[str, float]] = {cell.name: {} for cell in cells}
        for key in results.metrics:
            values = {cell.name: cell.aggregates[group].get(key) for cell in cells}
            for name, p in holm({n: v.paired.p for n, v in values.items() if v and v.paired}).items():
                corrected[name][key] = p
        rows += [
            Row(cell, group, cell.aggregates[group], _best(results, cell, group), corrected[cell.name])
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


def number(results: Results, metric: str, value: float, sign: str = "") -> str:
    """A value of a metric, or a difference of two, as it is shown: counts without needless decimals."""
    text = f"{value:{sign}.{results.places.get(metric, 3)}f}"
    return text.removesuffix(".0") if metric in results.counted else text


def markdown(results: Results, rows: Sequence[Row]) -> str:
    """The leaderboard as a Markdown document, one table per group."""
    some_failed = any(row.failed for row in rows)
    titles = [f"{info.title} {info.arrow}".strip() for info in results.metrics.values()] + ["Failed"] * some_failed
    parts = [f"# {results.name}\n"]
    for group in results.own_groups:
        searched = _searched(results, group)
        lines = [["Method", *titles, *searched], ["---", *["---:"] * len(titles), *["---"] * len(searched)]]
        for row in (row for row in rows if row.group == group):
            values = [_markdown(results, row, key) for key in results.metrics]
            search = [row.cell.searches(group) or "–" for _ in searched]
            lines.append([row.cell.label, *values, *[row.failed or "–"] * some_failed, *search])
        table = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
        parts.append(f"## {results.heading(group)} ({results.meaning(group)})\n\n{table}")
    parts.append(f"{_legend(rows)}\n".replace("*", r"\*"))
    if results.unfinished:
        listed = "".join(f"- {name}: {why}\n" for name, why in results.unfinished.items())
        parts.append(f"Not finished:\n\n{listed}\n{results.advice}\n")
    return "\n".join(parts)


def _searched(results: Results, group: str) -> list[str]:
    """Title of the column on searches, where any cell made some."""
    return ["Search"] if any(cell.searches(group) for cell in results.cells) else []


def _markdown(results: Results, row: Row, key: str) -> str:
    value = row.values.get(key)
    if not value:
        return "–"
    mean = number(results, key, value.mean)
    if key in row.best:
        mean = f"**{mean}**" if row.is_clear(key) else f"*{mean}*"
    low, high = ends(results, row, key)
    few = fewer(row, value)
    interval = f" [{low}, {high}]{few and f', {few}'}" if low else ""
    return mean + r"\*" * len(row.stars(key)) + interval


def latex(results: Results, rows: Sequence[Row]) -> str:
    r"""The leaderboard as LaTeX, one ``table`` per group; needs booktabs and graphicx.

    Rows are in the order of the run and columns in that of :attr:`Results.metrics`, as on the page. A table wider than
    the line is made smaller: delete the columns that a paper does without.
    """
    listed = ", ".join(info.title for info in results.metrics.values())
    parts = [
        "% Needs \\usepackage{booktabs,graphicx}. One table a group; rows in the order of the run.\n"
        f"% Columns: {' '.join(listed.split())}.\n"
    ]
    some_failed = any(row.failed for row in rows)
    titles = [tex(f"{info.title} {info.arrow}".strip()) for info in results.metrics.values()] + ["Failed"] * some_failed
    for group in results.own_groups:
        searched = _searched(results, group)
        lines = [["Method", *titles, *searched]]
        for row in (row for row in rows if row.group == group):
            values = [_latex(results, row, key) for key in results.metrics]
            search = [row.cell.searches(group) or "--" for _ in searched]
            lines.append([tex(row.cell.label), *values, *[row.failed or "--"] * some_failed, *search])
        head, *body = (f"    {' & '.join(line)} \\\\\n" for line in lines)
        name = f"{results.name}, {results.heading(group)} ({results.meaning(group)})"
        parts.append(
            "\\begin{table}\n  \\centering\n"
            f"  \\caption{{{tex(f'{name}. {_legend(rows)}')}}}\n"
            f"  \\label{{tab:{re.sub('[^0-9A-Za-z]+', '-', f'{results.name}-{group}').strip('-')}}}\n"
            "  \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
            f"  \\begin{{tabular}}{{l{'r' * len(titles)}{'l' * len(searched)}}}\n"
            f"    \\toprule\n{head}    \\midrule\n{''.join(body)}"
            "    \\bottomrule\n  \\end{tabular}}\n\\end{table}\n"
        )
    return "\n".join(parts)


def tex(text: str) -> str:
    """Any text on one line as LaTeX that shows it."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex(results: Results, row: Row, key: str) -> str:
    value = row.values.get(key)
    if not value:
        return "--"
    mean = number(results, key, value.mean)
    if key in row.best:
        mean = rf"\mathbf{{{mean}}}" if row.is_clear(key) else rf"\mathit{{{mean}}}"
    stars = f"^{{{row.stars(key)}}}" if row.stars(key) else ""
    low, high = ends(results, row, key)
    few = fewer(row, value).replace(" ", "~")
    few = rf",\,\mathrm{{{few}}}" if few else ""
    interval = rf"_{{[{low},\,{high}]{few}}}" if low else ""
    return f"${mean}{stars}{interval}$"


def ends(results: Results, row: Row, metric: str) -> tuple[str, str]:
    """Ends of the interval of a mean as they are shown, empty where it has none."""
    value = row.values[metric]
    if value.low is None or value.high is None:
        return "", ""
    return number(results, metric, value.low), number(results, metric, value.high)


def fewer(row: Row, value: Aggregate) -> str:
    """The number of prompts with a value where it is not that of the row, such as ``3 prompts``."""
    return "" if value.prompts == row.cell.count(row.group) else counted(value.prompts, "prompt")


def _legend(rows: Sequence[Row]) -> str:
    words = "Mean over prompts with its 95% bootstrap interval. ↓ lower is better, ↑ higher is better."
    legend = f"{words} {BEST.format(clear='Bold', unclear='Italic')}" if any(row.best for row in rows) else words
    if any(row.cell.searches(row.group) for row in rows):
        legend = f"{legend} {SEARCHES}"
    legend = f"{legend} {SIGNIFICANCE}" if any(row.corrected for row in rows) else legend
    return f"{legend} {FAILED}" if any(row.failed for row in rows) else legend


def csv_text(results: Results, rows: Sequence[Row]) -> str:
    """The leaderboard as CSV: one line per group and cell, every number in full, what is absent empty.

    ``prompts`` is the list of prompts, ``n_prompts`` how many of it are of the group; ``passed_gate`` and ``exhausted``
    are as in :attr:`nemo_bench.report.data.Cell.localization`.
    """
    costs = list(dict.fromkeys(key for cell in results.cells for key in cell.cost))
    counts = [key for key in dict.fromkeys(k for cell in results.cells for k in cell.counts) if key != "prompts"]
    names = [
        f"{key}_{name}"
        for key in results.metrics
        for name in (*_NUMBERS, *(f"paired_{name}" for name in _DIFFERENCE), "paired_p_holm", "failed")
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    about = ["cell", "label", "model", "method", "prompts", "group", "n_prompts", *_SEARCHED]
    writer.writerow([*about, *names, *costs, *counts])
    for row in rows:
        cell = row.cell
        values: list[object] = [cell.name, cell.label, cell.model, cell.method, cell.prompt_list, row.group]
        values.append(cell.count(row.group))
        values += [cell.localization.get(row.group, {}).get(key) for key in _SEARCHED]
        for key in results.metrics:
            value = row.values.get(key)
            values += [getattr(value, name, None) for name in _NUMBERS]
            values += [getattr(value.paired if value else None, name, None) for name in _DIFFERENCE]
            values += [row.corrected.get(key), cell.failures.get(row.group, Failures()).metrics.get(key, 0)]
        values += [cell.cost.get(key) for key in costs] + [cell.counts.get(key) for key in counts]
        writer.writerow(values)
    return buffer.getvalue()


def json_text(results: Results, rows: Sequence[Row]) -> str:
    """The leaderboard as JSON: metrics, rows with every number in full, and unfinished cells."""
    lines = []
    for row in rows:
        cell = row.cell
        metrics = {key: asdict(value) for key, value in row.values.items()}
        for key, p in row.corrected.items():
            metrics[key]["paired"]["p_holm"] = p
        lines.append({
            "cell": cell.name,
            "label": cell.label,
            "model": cell.model,
            "method": cell.method,
            "prompts": cell.prompt_list,
            "group": row.group,
            "n_prompts": cell.count(row.group),
            **{key: cell.localization.get(row.group, {}).get(key) for key in _SEARCHED},
            "metrics": metrics,
            "failed": asdict(cell.failures.get(row.group, Failures())),
            "best": list(row.best),
            "best_p": dict(row.best),
            "cost": dict(cell.cost),
            "counts": dict(cell.counts),
        })  # fmt: skip
    metrics = {key: {k: v for k, v in asdict(info).items() if k != "key"} for key, info in results.metrics.items()}
    content = {
        "schema": 1,
        "name": results.name,
        "metrics": metrics,
        "rows": lines,
        "unfinished": dict(results.unfinished),
    }
    return as_json(content, indent=1) + "\n"


def terminal_table(results: Results) -> Table:
    """The leaderboard for the terminal: mean, and its interval below; the best is bold.

    Of many metrics it shows the first of every family; the files hold all of them.
    """
    shown: Mapping[str, MetricInfo] = results.metrics
    caption = "mean, 95% interval · green: best of a model; bold: different from the runner-up, paired p < 0.05"
    if len(shown) > _COLUMNS:
        shown = {key: results.metrics[key] for key in results.leading.values()}
        caption += f"\n{len(results.metrics) - len(shown)} more metrics in leaderboard.md"
    for name, why in results.unfinished.items():
        caption += f"\n[yellow]not finished: {escape(f'{name}: {why}')}[/yellow]"
    if results.unfinished:
        caption += f"\n{results.advice}"
    for cell in (cell for cell in results.cells if "lost_images" in cell.counts):
        lost = f"{cell.label}: images that are gone or cut since they were scored: {cell.counts['lost_images']}"
        caption += f"\n[yellow]{escape(f'{lost}; {made_again(results.folder / cell.name)}')}[/yellow]"
    table = Table(title=escape(results.name), caption=caption, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("method")
    for key, info in shown.items():
        table.add_column(
            escape(f"{key.replace('_', ' ')} {info.arrow}".strip().replace(" ", "\n")), justify="right", no_wrap=True
        )
    rows = leaderboard(results)
    for group in results.own_groups:
        table.add_row()
        table.add_row(f"[bold]{results.heading(group)}[/bold]")
        for row in (row for row in rows if row.group == group):
            values = [_terminal(results, row, key) for key in shown]
            notes = [f"[yellow]failed: {row.failed}[/yellow]"] if row.failed else []
            notes += [f"[dim]{words}[/dim]"] if (words := row.cell.searches(group)) else []
            table.add_row("\n".join([escape(row.cell.label), *notes]), *values)
    return table


def _terminal(results: Results, row: Row, key: str) -> str:
    value = row.values.get(key)
    if not value:
        return "[dim]–[/dim]"
    mean = number(results, key, value.mean)
    if key in row.best:
        mean = f"[bold green]{mean}[/bold green]" if row.is_clear(key) else f"[green]{mean}[/green]"
    low, high = ends(results, row, key)
    lines = [mean]
    lines += [f"[dim]{_ZERO.sub('.', low)}–{_ZERO.sub('.', high)}[/dim]"] if low else []
    lines += [f"[dim]{few}[/dim]"] if (few := fewer(row, value)) else []
    return "\n".join(lines)


def _best(results: Results, cell: Cell, group: str) -> dict[str, float]:
    """Metrics with the best mean among the cells that lack no value, and p of the paired test against the runner-up."""
    found = {}
    rivals = [
        other for other in results.cells
        if other is not cell and (other.model, other.prompt_list) == (cell.model, cell.prompt_list)
    ]  # fmt: skip
    for key, info in results.metrics.items():
        complete = [c for c in (cell, *rivals) if key in c.aggregates.get(group, {}) and c.is_complete(group, key)]
        others = complete[1:]
        if complete[:1] != [cell] or info.higher_is_better is None or not others:
            continue
        sign = 1 if info.higher_is_better else -1
        ahead = {o.name: sign * (cell.aggregates[group][key].mean - o.aggregates[group][key].mean) for o in others}
        if min(ahead.values()) >= 0 < max(ahead.values()):
            second = min(others, key=lambda other: ahead[other.name])
            own, its = cell.prompt_means(key, [group]), second.prompt_means(key, [group])
            differences = [own[prompt] - its[prompt] for prompt in own if prompt in its]
            found[key] = float(paired(np.array(differences))["p"]) if differences else 1.0
    return found
