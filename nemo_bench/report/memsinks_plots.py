"""Figure of memorization sinks: losses of training images between those of held-out pictures."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from nemo_bench.records.schema import SinksRow
from nemo_bench.report.plots import Plot
from nemo_bench.report.svg import INK, nth_look, style, svg

_LOSS = "training_loss"


def figures(rows: Sequence[SinksRow], general: Sequence[SinksRow], name: str, heading: str) -> list[Plot]:
    """The losses of a group of memorized prompts, and of general prompts in the same cells; none without losses."""
    shown = [row for row in rows if _LOSS in row.values]
    if not shown:
        return []
    held_out = {row.cell: row for row in general if _LOSS in row.values}
    with style():
        figure = Figure(figsize=(7.0, 1.4 + 0.32 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="x")
        color = nth_look(0).color
        for place, row in enumerate(shown):
            for own, is_held_out in ((row, False), (held_out.get(row.cell), True)):
                if own is None:
                    continue
                value = own.values[_LOSS]
                tone = INK if is_held_out else color
                if value.low is not None and value.high is not None:
                    axes.hlines(place, value.low, value.high, colors=tone, linewidth=1.2, alpha=0.6)
                label = ("held-out pictures" if is_held_out else "training images") if place == 0 else None
                fill = "none" if is_held_out else tone
                axes.plot(value.mean, place, "o", color=tone, mfc=fill, ms=6, linestyle="none", label=label)
        axes.set_yticks(range(len(shown)), [row.label for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Training loss")
        figure.legend(loc="outside lower left", ncols=2, fontsize="small")
        title = "Losses of training images and of held-out pictures"
        caption = "Dots are means over prompts, lines 95% bootstrap intervals. What lies between the two was memorized."
        return [Plot("memsinks", name, title, caption, svg(figure, name, f"{title}: {heading}"))]
