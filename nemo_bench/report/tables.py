"""The leaderboard: rows, and the same rows as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence

import numpy as np

from nemo_bench.errors import counted
from nemo_bench.records.io import as_json
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import Aggregate, Leaderboard, LeaderboardRow
from nemo_bench.records.statistics import holm, paired

SIGNIFICANCE = (
    "Stars: different from no mitigation on the same prompts and seeds, two-sided paired sign-flip test, "
    "Holm-corrected over the rows of a table; * p < 0.05, ** p < 0.01, *** p < 0.001."
)
"""Meaning of the stars at a mean."""
BEST = (
    "{clear}: best mean among at least two methods of one model, and different from the runner-up (two-sided paired "
    "sign-flip test over prompts, p < 0.05, not corrected). {unclear}: best mean, but not shown to differ from the "
    "runner-up: the difference is too small, the prompts are too few, or single prompts have no value."
)
"""Meaning of a best value."""
SEARCHES = (
    "Search: prompts that passed NeMo's gate, so that neurons were searched; and those of them in which the selection "
    "ran out without meeting its criterion. An edited model has no neurons of general prompts off: what it makes of "
    "these is in the rows of edits for other prompts."
)
"""Meaning of the column of searches."""
FAILED = "Failed: what was not finite; it has no value, and where a mean lacks any it is no best one and has no stars."
"""Meaning of the column of failures."""

_NUMBERS = ("mean", "low", "high", "median", "mad", "prompts")
_PAIRED = ("difference", "low", "high", "p", "prompts", "p_holm")
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "·": r"$\cdot$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--",
}  # fmt: skip


def leaderboard(results: Results) -> list[LeaderboardRow]:
    """One row per group and cell, groups and cells in the order of display."""
    rows = []
    for group in results.groups:
        cells = [cell for cell in results.cells if group in cell.summary.aggregates]
        table = {cell.name: cell.summary.aggregates[group] for cell in cells}
        corrected = {name: dict(row) for name, row in table.items()}
        for key in results.metrics:
            changes = {name: row[key].paired for name, row in table.items() if key in row}
            tested = {name: change for name, change in changes.items() if change}
            for name, p in holm({name: change.p for name, change in tested.items()}).items():
                change = tested[name].model_copy(update={"p_holm": p})
                corrected[name][key] = table[name][key].model_copy(update={"paired": change})
        for cell in cells:
            searched = cell.summary.localization.get(group, {})
            row = LeaderboardRow(
                cell=cell.name,
                label=cell.label,
                model=cell.model,
                method=cell.method,
                prompts=cell.spec.prompts,
                group=group,
                n_prompts=cell.count(group),
                passed_gate=searched.get("passed_gate"),
                exhausted=searched.get("exhausted"),
                metrics=corrected[cell.name],
                failed=cell.failures(group),
                best=_best(results, cell, group),
                cost=cell.summary.cost,
                counts=cell.counts,
            )
            rows.append(row)
    return rows


def _best(results: Results, cell: CellResults, group: str) -> dict[str, float]:
    """Metrics with the best mean among the cells that lack no value, and p of the paired test against the runner-up."""
    best = {}
    comparable = [c for c in results.cells if (c.model, c.spec.prompts) == (cell.model, cell.spec.prompts)]
    for key, info in results.metrics.items():
        means = {
            c.name: c.summary.aggregates[group][key].mean
            for c in comparable
            if key in c.summary.aggregates.get(group, {}) and c.is_complete(group, key)
        }
        if cell.name not in means or len(means) == 1 or info.higher_is_better is None:
            continue
        sign = 1 if info.higher_is_better else -1
        ahead = {name: sign * (means[cell.name] - mean) for name, mean in means.items() if name != cell.name}
        if min(ahead.values()) >= 0 < max(ahead.values()):
            second = min((c for c in comparable if c.name in ahead), key=lambda other: ahead[other.name])
            own = cell.prompt_means(key, [group])
            its = second.prompt_means(key, [group])
            differences = [own[prompt] - its[prompt] for prompt in own if prompt in its]
            best[key] = paired(np.array(differences)).p if differences else 1.0
    return best


def number(results: Results, metric: str, value: float, sign: str = "") -> str:
    """A value of a metric, or a difference of two, as it is shown: counts without needless decimals."""
    text = f"{value:{sign}.{results.places.get(metric, 3)}f}"
    return text.removesuffix(".0") if metric in results.counted else text


def ends(results: Results, row: LeaderboardRow, metric: str) -> tuple[str, str]:
    """Ends of the interval of a mean as they are shown, empty where it has none."""
    value = row.metrics[metric]
    if value.low is None or value.high is None:
        return "", ""
    return number(results, metric, value.low), number(results, metric, value.high)


def fewer(row: LeaderboardRow, value: Aggregate) -> str:
    """The number of prompts with a value where it is not that of the row, such as ``3 prompts``."""
    return "" if value.prompts == row.n_prompts else counted(value.prompts, "prompt")


def _lines(
    results: Results,
    rows: Sequence[LeaderboardRow],
    group: str,
    show_value: Callable[[Results, LeaderboardRow, str], str],
    escape: Callable[[str], str] = str,
) -> list[list[str]]:
    """The table of a group as texts: its titles, then a line for each row."""
    some_failed = any(row.failed.total for row in rows)
    of_group = [row for row in rows if row.group == group]
    some_searched = any(row.searches for row in of_group)
    titles = [escape(f"{info.title} {info.arrow}".strip()) for info in results.metrics.values()]
    lines = [["Method", *titles, *["Failed"] * some_failed, *["Search"] * some_searched]]
    for row in of_group:
        values = [show_value(results, row, key) if key in row.metrics else escape("–") for key in results.metrics]
        failed = [escape(str(row.failed) or "–")] * some_failed
        searches = [escape(row.searches or "–")] * some_searched
        lines.append([escape(row.label), *values, *failed, *searches])
    return lines


def markdown_table(lines: Sequence[Sequence[str]], aligned: Sequence[str]) -> str:
    """A table in Markdown.

    Args:
        lines: Titles, then the rows.
        aligned: What stands between both for each column, such as ``---:``.
    """
    texts = [lines[0], aligned, *lines[1:]]
    return "".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |\n" for line in texts)


def markdown(results: Results, rows: Sequence[LeaderboardRow]) -> str:
    """The leaderboard as a Markdown document, one table per group."""
    parts = [f"# {results.name}\n"]
    for group in results.own_groups:
        lines = _lines(results, rows, group, _markdown)
        aligned = ["---" if title in ("Method", "Search") else "---:" for title in lines[0]]
        heading = f"## {results.heading(group)} ({results.meaning(group)})"
        parts.append(f"{heading}\n\n{markdown_table(lines, aligned)}")
    parts.append(f"{_legend(rows)}\n".replace("*", r"\*"))
    if results.unfinished:
        listed = "".join(f"- {name}: {why}\n" for name, why in results.unfinished.items())
        parts.append(f"Not finished:\n\n{listed}\n{results.advice}\n")
    return "\n".join(parts)


def _markdown(results: Results, row: LeaderboardRow, key: str) -> str:
    mean = number(results, key, row.metrics[key].mean)
    if key in row.best:
        mean = f"**{mean}**" if row.is_clear(key) else f"*{mean}*"
    low, high = ends(results, row, key)
    few = fewer(row, row.metrics[key])
    interval = f" [{low}, {high}]{few and f', {few}'}" if low else ""
    return mean + r"\*" * len(row.stars(key)) + interval


def latex(results: Results, rows: Sequence[LeaderboardRow]) -> str:
    r"""The leaderboard as LaTeX, one ``table`` per group; needs booktabs and graphicx.

    Rows are in the order of the run and columns in that of :attr:`Results.metrics`, as on the page. A table wider than
    the line is made smaller: delete the columns that a paper does without.
    """
    listed = ", ".join(info.title for info in results.metrics.values())
    parts = [
        "% Needs \\usepackage{booktabs,graphicx}. One table a group; rows in the order of the run.\n"
        f"% Columns: {' '.join(listed.split())}.\n"
    ]
    for group in results.own_groups:
        lines = _lines(results, rows, group, _latex, tex)
        aligned = "".join("l" if title in ("Method", "Search") else "r" for title in lines[0])
        head, *body = (f"    {' & '.join(line)} \\\\\n" for line in lines)
        name = f"{results.name}, {results.heading(group)} ({results.meaning(group)})"
        parts.append(
            "\\begin{table}\n  \\centering\n"
            f"  \\caption{{{tex(f'{name}. {_legend(rows)}')}}}\n"
            f"  \\label{{tab:{re.sub('[^0-9A-Za-z]+', '-', f'{results.name}-{group}').strip('-')}}}\n"
            "  \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
            f"  \\begin{{tabular}}{{{aligned}}}\n"
            f"    \\toprule\n{head}    \\midrule\n{''.join(body)}"
            "    \\bottomrule\n  \\end{tabular}}\n\\end{table}\n"
        )
    return "\n".join(parts)


def tex(text: str) -> str:
    """Any text on one line as LaTeX that shows it."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex(results: Results, row: LeaderboardRow, key: str) -> str:
    mean = number(results, key, row.metrics[key].mean)
    if key in row.best:
        mean = rf"\mathbf{{{mean}}}" if row.is_clear(key) else rf"\mathit{{{mean}}}"
    stars = f"^{{{row.stars(key)}}}" if row.stars(key) else ""
    low, high = ends(results, row, key)
    few = fewer(row, row.metrics[key]).replace(" ", "~")
    few = rf",\,\mathrm{{{few}}}" if few else ""
    interval = rf"_{{[{low},\,{high}]{few}}}" if low else ""
    return f"${mean}{stars}{interval}$"


def _legend(rows: Sequence[LeaderboardRow]) -> str:
    parts = ["Mean over prompts with its 95% bootstrap interval. ↓ lower is better, ↑ higher is better."]
    if any(row.best for row in rows):
        parts.append(BEST.format(clear="Bold", unclear="Italic"))
    if any(row.searches for row in rows):
        parts.append(SEARCHES)
    if any(row.is_tested for row in rows):
        parts.append(SIGNIFICANCE)
    if any(row.failed.total for row in rows):
        parts.append(FAILED)
    return " ".join(parts)


def csv_text(results: Results, rows: Sequence[LeaderboardRow]) -> str:
    """The leaderboard as CSV: one line per group and cell, every number in full, what is absent empty.

    ``prompts`` is the prompt list, ``n_prompts`` its number of prompts in the group; ``passed_gate`` and ``exhausted``
    are as in :class:`nemo_bench.records.schema.Summary`.
    """
    costs = list(dict.fromkeys(key for cell in results.cells for key in cell.summary.cost))
    counts = [key for key in dict.fromkeys(k for cell in results.cells for k in cell.counts) if key != "prompts"]
    of_metric = [*_NUMBERS, *(f"paired_{name}" for name in _PAIRED), "failed"]
    about = ["cell", "label", "model", "method", "prompts", "group", "n_prompts", "passed_gate", "exhausted"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*about, *(f"{key}_{name}" for key in results.metrics for name in of_metric), *costs, *counts])
    for row in rows:
        values: list[object] = [getattr(row, name) for name in about]
        for key in results.metrics:
            value = row.metrics.get(key)
            values += [getattr(value, name, None) for name in _NUMBERS]
            values += [getattr(value.paired if value else None, name, None) for name in _PAIRED]
            values.append(row.failed.metrics.get(key, 0))
        writer.writerow([*values, *map(row.cost.get, costs), *map(row.counts.get, counts)])
    return buffer.getvalue()


def json_text(results: Results, rows: Sequence[LeaderboardRow]) -> str:
    """The leaderboard as JSON: metrics, rows with every number in full, and unfinished cells."""
    content = Leaderboard(
        name=results.name, metrics=results.metrics, rows=list(rows), unfinished=dict(results.unfinished)
    )
    return as_json(content, indent=1) + "\n"
