"""Figures of localizers: what is left of memorization and what it costs, and where true neurons are ranked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from nemo_bench.records.schema import Aggregate, LocalizerRow, LocalizerTable
from nemo_bench.report.plots import Plot
from nemo_bench.report.svg import INK, nth_look, style, svg

_LEFT = "training_similarity"
_COST = "general_loss"
_PASSES = "row_passes"


def figures(table: LocalizerTable, rows: Sequence[LocalizerRow], name: str, heading: str) -> list[Plot]:
    """Figures of localizers over the same prompts; ``name`` begins the names of all."""
    with style():
        plots = [
            _agreement(table, rows, f"{name}-found", heading),
            _tradeoff(table, rows, f"{name}-left", heading, _COST),
            _tradeoff(table, rows, f"{name}-passes", heading, _PASSES),
        ]
    return [plot for plot in plots if plot]


def _tradeoff(table: LocalizerTable, rows: Sequence[LocalizerRow], name: str, heading: str, up: str) -> Plot | None:
    """What is left of memorization, against what general prompts lose or against cost."""
    shown = [(nth_look(i), row) for i, row in enumerate(rows) if {_LEFT, up} <= row.values.keys()]
    if not shown:
        return None
    figure = Figure(figsize=(5.0, 4.4 + 0.2 * math.ceil(len(rows) / 2)), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="both")
    axes.margins(0.14)
    if up == _PASSES:
        axes.set_yscale("symlog", linthresh=10)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    for look, row in shown:
        x, y = row.values[_LEFT], row.values[up]
        axes.hlines(y.mean, *_interval(x), colors=look.color, linewidth=1.1, alpha=0.55)
        axes.vlines(x.mean, *_interval(y), colors=look.color, linewidth=1.1, alpha=0.55)
        axes.plot(x.mean, y.mean, look.marker, color=look.color, ms=7, label=row.label, linestyle="none")
    before = next((row.values[_LEFT].mean for row in rows if row.localizer == "none" and _LEFT in row.values), None)
    if before is not None:
        axes.axvline(before, color=INK, linewidth=0.9, alpha=0.5, linestyle=(0, (4, 3)))
    if up == _PASSES:
        axes.set_ylim(bottom=-2)  # of localizers without a pass the marks are whole
    info, upward = table.measures[_LEFT], table.measures[up]
    axes.set_xlabel(f"{info.title} (← better)")
    axes.set_ylabel(f"{upward.title} (← better)")
    figure.legend(loc="outside lower left", ncols=2, fontsize="small")
    title = "What is left, and what general prompts lose" if up == _COST else "What is left, and what it takes"
    caption = "Lines are 95% bootstrap intervals over prompts; dashed: with nothing switched off."
    return Plot("localizers", name, title, caption, svg(figure, name, f"{title}: {heading}"))


def _interval(value: Aggregate) -> tuple[float, float]:
    """Its ends; the mean where there is no interval."""
    if value.low is None or value.high is None:
        return value.mean, value.mean
    return value.low, value.high


def _agreement(table: LocalizerTable, rows: Sequence[LocalizerRow], name: str, heading: str) -> Plot | None:
    """How many of the true neurons are found."""
    keys = [key for key in ("recall", "precision", "average_precision") if key in table.measures]
    shown = [(nth_look(i), row) for i, row in enumerate(rows) if any(key in row.values for key in keys)]
    if not shown:
        return None
    figure = Figure(figsize=(7.0, 1.2 + 0.3 * len(shown)), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        axes.grid(axis="x")
        axes.set_title(table.measures[key].title)
        axes.set_xlim(-0.03, 1.03)
        for place, (look, row) in enumerate(shown):
            if value := row.values.get(key):
                axes.barh(place, value.mean, 0.62, color=look.color, alpha=0.3, linewidth=0)
                axes.hlines(place, *_interval(value), colors=look.color, linewidth=1.6)
                axes.plot(value.mean, place, look.marker, color=look.color, ms=5, mew=0)
        axes.set_yticks(range(len(shown)), [row.label for _, row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    title = "True neurons found"
    caption = "Means over prompts whose neurons are known; lines are 95% bootstrap intervals."
    return Plot("localizers", name, title, caption, svg(figure, name, f"{title}: {heading}"))
