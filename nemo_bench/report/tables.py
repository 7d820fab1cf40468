"""The leaderboard: rows, and the same rows as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np

from nemo_bench.errors import counted
from nemo_bench.records.io import as_json
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import Aggregate, AxisRow, Collateral, Leaderboard, LeaderboardRow, Paired, Strengths
from nemo_bench.records.statistics import GROUPS, holm, paired
from nemo_bench.report.axes import axes_of, measures_of
from nemo_bench.report.strengths import Compared, compared, strengths_of
from nemo_bench.report.texts import TEXTS

_LEVELS = (0.05, 0.01, 0.001)
_SEARCHED = ("passed_gate", "exhausted")
_ABOUT = ("cell", "label", "model", "method", "prompts", "group", "n_prompts", *_SEARCHED)
_OF_STRENGTH = ("setting", "value", "score", "area", "chosen", "front")
_NUMBERS = [name for name in Aggregate.model_fields if name != "paired"]
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "·": r"$\cdot$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--",
    "−": "$-$",
}  # fmt: skip


def leaderboard(results: Results) -> list[LeaderboardRow]:
    """One row per group and cell, groups and cells in the order of display; p is corrected over the rows of a group."""
    rows = []
    for group in results.groups:
        cells = [cell for cell in results.cells if group in cell.summary.aggregates]
        table = {cell.name: dict(cell.summary.aggregates[group]) for cell in cells}
        best = _best(results, cells, group)
        for key in results.metrics:
            changes = {name: row[key].paired for name, row in table.items() if key in row}
            tested = {name: change for name, change in changes.items() if change}
            for name, p in holm({name: change.p for name, change in tested.items()}).items():
                change = tested[name].model_copy(update={"p_holm": p})
                table[name][key] = table[name][key].model_copy(update={"paired": change})
        rows += [
            LeaderboardRow(
                cell=cell.name,
                label=cell.label,
                model=cell.model,
                method=cell.method,
                prompts=cell.spec.prompts,
                group=group,
                n_prompts=cell.count(group),
                **{key: cell.summary.localization.get(group, {}).get(key) for key in _SEARCHED},
                metrics=table[cell.name],
                failed=cell.failures(group),
                best=best[cell.name],
                cost=cell.summary.cost,
                counts=cell.counts,
                collateral=results.collateral(cell, group),
            )
            for cell in cells
        ]
    return rows


def _best(results: Results, cells: Sequence[CellResults], group: str) -> dict[str, dict[str, float]]:
    """By cell, metrics with the best mean of those that lack no value, and p of the paired test against the runner-up.

    Cells of the same model and prompts are compared; p is 1 where there is nothing to pair. Methods that were fitted on
    training images are left out: they have seen what the others are judged by. At several strengths the chosen setting
    of each method is compared, on prompts that none was chosen by.
    """
    side_by_side = compared(results)
    best: dict[str, dict[str, float]] = {cell.name: {} for cell in cells}
    comparable: dict[tuple[str, str], list[CellResults]] = {}
    for cell in (cell for cell in cells if cell.spec.fitted is None):
        if side_by_side and cell.name not in side_by_side.cells:
            continue
        comparable.setdefault((cell.model, cell.spec.prompts), []).append(cell)
    directed = [(key, info.higher_is_better) for key, info in results.metrics.items()]
    for key, higher in ((key, higher) for key, higher in directed if higher is not None):
        for alike in comparable.values():
            means = {
                cell.name: mean
                for cell in alike
                if cell.is_complete(group, key)
                and (mean := _compared_mean(results, cell, group, key, side_by_side)) is not None
            }
            ranking = sorted((c for c in alike if c.name in means), key=lambda c: means[c.name], reverse=higher)
            if not ranking or means[ranking[0].name] == means[ranking[-1].name]:
                continue
            for place, cell in enumerate(ranking):
                if means[cell.name] != means[ranking[0].name]:
                    break
                own = cell.prompt_means(key, [group])
                its = ranking[0 if place else 1].prompt_means(key, [group])
                prompts = own.keys() & its.keys() & (side_by_side.prompts if side_by_side else own.keys())
                differences = [own[prompt] - its[prompt] for prompt in own if prompt in prompts]
                best[cell.name][key] = paired(np.array(differences)).p if differences else 1.0
    return best


def _compared_mean(
    results: Results, cell: CellResults, group: str, key: str, side_by_side: Compared | None
) -> float | None:
    """The mean that cells are compared by; of a metric of whole sets, which no prompts can be taken from, all count."""
    if side_by_side is None or results.metrics[key].per == "set":
        value = cell.summary.aggregates[group].get(key)
        return value.mean if value else None
    means = [mean for prompt, mean in cell.prompt_means(key, [group]).items() if prompt in side_by_side.prompts]
    return fmean(means) if means else None


def is_clear(row: LeaderboardRow, metric: str) -> bool:
    """Whether the row is the best in a metric, and differs from the runner-up."""
    return row.best.get(metric, 1.0) < _LEVELS[0]


def stars(row: LeaderboardRow, metric: str) -> str:
    """One star for each level of significance above the corrected p of a metric.

    None where images or scores failed: the others may differ because of what is missing.
    """
    change = row.metrics[metric].paired if metric in row.metrics else None
    return starred(change) if change and not row.failed.metrics.get(metric) else ""


def starred(test: Paired) -> str:
    """One star for each level of significance above the corrected p of a test."""
    return "" if test.p_holm is None else "*" * sum(test.p_holm < level for level in _LEVELS)


def number(results: Results, metric: str, value: float, sign: str = "") -> str:
    """A value of a metric, or a difference of two, as it is shown: counts without needless decimals."""
    text = f"{value:{sign}.{results.places.get(metric, 3)}f}"
    return text.removesuffix(".0") if metric in results.counted else text


def mean(results: Results, row: LeaderboardRow, metric: str, clear: str, unclear: str) -> str:
    """The mean of a metric as it is shown, in one of two formats where it is a best one."""
    text = number(results, metric, row.metrics[metric].mean)
    if metric not in row.best:
        return text
    return (clear if is_clear(row, metric) else unclear).format(text)


def ends(results: Results, row: LeaderboardRow, metric: str) -> tuple[str, str]:
    """Ends of the interval of a mean as they are shown, empty where it has none."""
    return _ends(results, metric, row.metrics[metric])


def _ends(results: Results, metric: str, value: Aggregate) -> tuple[str, str]:
    if value.low is None or value.high is None:
        return "", ""
    return number(results, metric, value.low), number(results, metric, value.high)


def fewer(row: LeaderboardRow, metric: str) -> str:
    """The number of prompts with a value where it is not that of the row, such as ``3 prompts``."""
    prompts = row.metrics[metric].prompts
    return "" if prompts == row.n_prompts else counted(prompts, "prompt")


def notes(results: Results, rows: Sequence[LeaderboardRow], clear: str, unclear: str) -> dict[str, str]:
    """What a reader needs to know of these rows, by subject; ``clear`` and ``unclear`` say how best means look."""
    needed = {
        "best": any(row.best for row in rows),
        "searches": any(cell.summary.localization for cell in results.cells),
        "significance": any(value.paired for row in rows for value in row.metrics.values()),
        "strengths": any(row.best for row in rows) and compared(results) is not None,
        "collateral": any(row.collateral for row in rows),
        "failed": any(row.failed.total for row in rows),
    }
    texts = {name: TEXTS["notes"][name] for name, is_needed in needed.items() if is_needed}
    found = {name: text.format(clear=clear, unclear=unclear) for name, text in texts.items()}
    measures = {cell.spec.measures: cell.model for cell in results.cells if cell.spec.measures}
    if measures:
        found["measures"] = " ".join(f"{model}: {measure}." for measure, model in measures.items())
    return found


def _legend(results: Results, rows: Sequence[LeaderboardRow]) -> str:
    first = "Mean over prompts with its 95% bootstrap interval. ↓ lower is better, ↑ higher is better."
    return " ".join([first, *notes(results, rows, "Bold", "Italic").values()])


def _lines(
    results: Results,
    rows: Sequence[LeaderboardRow],
    group: str,
    show_value: Callable[[Results, LeaderboardRow, str], str],
    escape: Callable[[str], str] = str,
) -> list[list[str]]:
    """The table of a group as texts: its titles, then a line for each row."""
    some_failed = any(row.failed.total for row in rows)
    some_searched = any(row.searches for row in rows if row.group == group)
    some_collateral = any(row.collateral for row in rows if row.group == group)
    titles = [escape(f"{info.title} {info.arrow}".strip()) for info in results.metrics.values()]
    others = [*["Collateral"] * some_collateral, *["Failed"] * some_failed, *["Search"] * some_searched]
    lines = [["Method", *titles, *others]]
    for row in (row for row in rows if row.group == group):
        values = [show_value(results, row, key) if key in row.metrics else escape("–") for key in results.metrics]
        failed = [escape(str(row.failed) or "–")] * some_failed
        searched = [escape(row.searches or "–")] * some_searched
        collateral = [escape(str(row.collateral or "–"))] * some_collateral
        lines.append([escape(row.label), *values, *collateral, *failed, *searched])
    return lines


def strength_lines(results: Results, strengths: Strengths, *, only_chosen: bool) -> list[list[str]]:
    """The settings of every method as texts, or no mitigation and the chosen ones: titles, then a line for each."""
    keys = (strengths.memorized, strengths.alignment)
    titles = [f"{results.metrics[key].title} {results.metrics[key].arrow}" for key in keys]
    lines = [
        ["Method", "Setting", "Chosen by: memorized", "Chosen by: alignment", "Score ↑", *titles, "Area ↑", "Front"]
    ]
    for curve in strengths.curves:
        for point in curve.points:
            is_chosen = point.cell == curve.chosen
            if only_chosen and not is_chosen and curve.method != "none":
                continue
            value = "unset" if point.value is None else point.value
            words = [f"{curve.setting} {value}"] if curve.setting else []
            words += ["chosen"] * (is_chosen and not only_chosen)
            words += ["above the limit"] * (is_chosen and not curve.is_within)
            by = (point.choosing_memorized, point.choosing_alignment)
            shown = (point.memorized, point.alignment)
            numbers = ["–" if v is None else number(results, k, v) for k, v in zip(keys, by, strict=True)]
            for key, value in zip(keys, shown, strict=True):
                low, high = ("", "") if value is None else _ends(results, key, value)
                numbers.append(f"{number(results, key, value.mean)} [{low}, {high}]" if value else "–")
            score, area = ("–" if value is None else f"{value:.3f}" for value in (point.score, curve.area))
            front = "yes" if point.is_on_front else "–"
            lines.append([curve.label, ", ".join(words) or "–", *numbers[:2], score, *numbers[2:], area, front])
    return lines


def strengths_note(results: Results, strengths: Strengths) -> str:
    """How settings were chosen, and what the numbers are over."""
    counts = {(curve.choosing_prompts, curve.prompts_reported) for curve in strengths.curves}
    own, others = (" or ".join(map(str, sorted(of))) for of in zip(*counts, strict=True))
    least = [value for of_model in strengths.least_alignment.values() for value in of_model.values()]
    ends = " or ".join(dict.fromkeys(f"{value:.3f}" for value in least))
    return str(TEXTS["strengths"]["note"]).format(
        score=TEXTS["strengths"]["score" if least else "no_score"].format(least=ends),
        alignment=results.metrics[strengths.alignment].title,
        limit=f"{strengths.limit:.0%}",
        share=f"{strengths.share:.0%}",
        own=own,
        others=others,
    )


def axis_tables(results: Results) -> list[tuple[str, list[list[str]]]]:
    """The tables of variants of prompts: a heading, then titles and a line for each cell; none without variants."""
    found = []
    rows = axes_of(results)
    for axis in dict.fromkeys(row.axis for row in rows):
        own = [row for row in rows if row.axis == axis]
        keys = [key for key in measures_of(results, axis) if any(key in row.values for row in own)]
        titles = TEXTS["axes"]["columns"]["neighbour" if axis == "neighbour" else "wording"]
        arrows = {key: f"{results.metrics[key].title} {results.metrics[key].arrow}" for key in keys}
        lines = [["Method", *(f"{arrows[key]}: {title}" for key in keys for title in titles.values())]]
        for row in own:
            cells = [_axis_text(results, row, key, part) for key in keys for part in titles]
            lines.append([row.label, *cells])
        counts = {(row.variants, row.originals) for row in own}
        number_of = " or ".join(f"{counted(few, axis)} of {counted(many, 'prompt')}" for few, many in sorted(counts))
        found.append((f"{GROUPS[axis][0].upper()}{GROUPS[axis][1:]}: {number_of}", lines))
    return found


def _axis_text(results: Results, row: AxisRow, key: str, part: str) -> str:
    """A mean with its interval, or a difference with stars and its interval."""
    value = getattr(row.values.get(key), part, None)
    if value is None:
        return "–"
    if isinstance(value, Paired):
        low, high = number(results, key, value.low, "+"), number(results, key, value.high, "+")
        return f"{number(results, key, value.difference, '+')}{starred(value)} [{low}, {high}]".replace("-", "−")
    low, high = _ends(results, key, value)
    return f"{number(results, key, value.mean)} [{low}, {high}]"


def markdown_table(lines: Sequence[Sequence[str]], aligned: Sequence[str]) -> str:
    """A table in Markdown: titles, what is below each of them, such as ``---:``, and the other lines."""
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
    parts.append(f"{_legend(results, rows)}\n".replace("*", r"\*"))
    if strengths := strengths_of(results):
        lines = strength_lines(results, strengths, only_chosen=True)
        table = markdown_table(lines, ["---", "---", *["---:"] * (len(lines[0]) - 3), "---"])
        parts.append(f"## {TEXTS['strengths']['chosen']}\n\n{table}\n{strengths_note(results, strengths)}\n")
    for heading, lines in axis_tables(results):
        parts.append(f"## {heading}\n\n{markdown_table(lines, ['---', *['---:'] * (len(lines[0]) - 1)])}")
        parts[-1] = parts[-1].replace("*", r"\*")
    if results.unfinished:
        listed = "".join(f"- {name}: {why}\n" for name, why in results.unfinished.items())
        parts.append(f"Not finished:\n\n{listed}\n{results.advice}\n")
    return "\n".join(parts)


def _markdown(results: Results, row: LeaderboardRow, key: str) -> str:
    shown = mean(results, row, key, "**{}**", "*{}*") + r"\*" * len(stars(row, key))
    low, high = ends(results, row, key)
    few = fewer(row, key)
    return f"{shown} [{low}, {high}]{few and f', {few}'}" if low else shown


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
        name = f"{results.name}, {results.heading(group)} ({results.meaning(group)})"
        parts.append(
            _latex_table(
                lines,
                aligned,
                tex(f"{name}. {_legend(results, rows)}"),
                re.sub("[^0-9A-Za-z]+", "-", f"{results.name}-{group}").strip("-"),
            )
        )
    if strengths := strengths_of(results):
        lines = [[tex(text) for text in line] for line in strength_lines(results, strengths, only_chosen=True)]
        caption = f"{results.name}, {TEXTS['strengths']['chosen'].lower()}. {strengths_note(results, strengths)}"
        label = re.sub("[^0-9A-Za-z]+", "-", f"{results.name}-strengths").strip("-")
        parts.append(_latex_table(lines, f"ll{'r' * (len(lines[0]) - 3)}l", tex(caption), label))
    for heading, lines in axis_tables(results):
        label = re.sub("[^0-9A-Za-z]+", "-", f"{results.name}-{heading.partition(':')[0]}").strip("-")
        body = [[tex(text) for text in line] for line in lines]
        caption = tex(f"{results.name}, {heading}. {TEXTS['axes']['note']}")
        parts.append(_latex_table(body, f"l{'r' * (len(lines[0]) - 1)}", caption, label))
    return "\n".join(parts)


def _latex_table(lines: Sequence[Sequence[str]], aligned: str, caption: str, label: str) -> str:
    """Lines of LaTeX, the first of them titles, as a table that is no wider than the text."""
    head, *body = (f"    {' & '.join(line)} \\\\\n" for line in lines)
    return (
        "\\begin{table}\n  \\centering\n"
        f"  \\caption{{{caption}}}\n"
        f"  \\label{{tab:{label}}}\n"
        "  \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
        f"  \\begin{{tabular}}{{{aligned}}}\n"
        f"    \\toprule\n{head}    \\midrule\n{''.join(body)}"
        "    \\bottomrule\n  \\end{tabular}}\n\\end{table}\n"
    )


def tex(text: str) -> str:
    """Any text on one line as LaTeX that shows it."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex(results: Results, row: LeaderboardRow, key: str) -> str:
    shown = mean(results, row, key, r"\mathbf{{{}}}", r"\mathit{{{}}}")
    if above := stars(row, key):
        shown += f"^{{{above}}}"
    low, high = ends(results, row, key)
    few = fewer(row, key).replace(" ", "~")
    few = rf",\,\mathrm{{{few}}}" if few else ""
    return rf"${shown}_{{[{low},\,{high}]{few}}}$" if low else f"${shown}$"


def csv_text(results: Results, rows: Sequence[LeaderboardRow]) -> str:
    """The leaderboard as CSV: one line per group and cell, every number in full, what is absent empty.

    ``prompts`` is the prompt list, ``n_prompts`` its number of prompts in the group; ``passed_gate`` and ``exhausted``
    are as in :class:`nemo_bench.records.schema.Summary`. A run at several strengths has columns ``strength_...``
    as well, as in :class:`nemo_bench.records.schema.StrengthCurve`.
    """
    of_strength = _of_strengths(results)
    costs = list(dict.fromkeys(key for cell in results.cells for key in cell.summary.cost))
    counts = [key for key in dict.fromkeys(k for cell in results.cells for k in cell.counts) if key != "prompts"]
    of_metric = [*_NUMBERS, *(f"paired_{name}" for name in Paired.model_fields), "failed"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    collateral = [*Collateral.model_fields]
    titles = [
        *(f"{key}_{name}" for key in results.metrics for name in of_metric),
        *(f"collateral_{c}" for c in collateral),
        *(f"strength_{name}" for name in _OF_STRENGTH if of_strength),
    ]
    writer.writerow([*_ABOUT, *titles, *costs, *counts])
    for row in rows:
        values: list[object] = [getattr(row, name) for name in _ABOUT]
        for key in results.metrics:
            value = row.metrics.get(key)
            values += [getattr(value, name, None) for name in _NUMBERS]
            values += [getattr(value.paired if value else None, name, None) for name in Paired.model_fields]
            values.append(row.failed.metrics.get(key, 0))
        values += [getattr(row.collateral, name, None) for name in collateral]
        values += of_strength.get(row.cell, [None] * len(_OF_STRENGTH)) if of_strength else []
        writer.writerow([*values, *map(row.cost.get, costs), *map(row.counts.get, counts)])
    return buffer.getvalue()


def _of_strengths(results: Results) -> dict[str, list[object]]:
    """By cell, what the CSV says of its strength; nothing for a run without strengths."""
    strengths = strengths_of(results)
    return {
        point.cell: [
            curve.setting,
            point.value,
            point.score,
            curve.area,
            point.cell == curve.chosen,
            point.is_on_front,
        ]
        for curve in (strengths.curves if strengths else ())
        for point in curve.points
    }


def json_text(results: Results, rows: Sequence[LeaderboardRow]) -> str:
    """The leaderboard as JSON: metrics, rows with every number in full, and unfinished cells."""
    content = Leaderboard(
        name=results.name,
        metrics=results.metrics,
        rows=list(rows),
        unfinished=dict(results.unfinished),
        strengths=strengths_of(results),
        axes=axes_of(results),
    )
    return as_json(content, indent=1) + "\n"
