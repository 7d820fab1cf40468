"""Figures of metrics of similarity against pairs that are known to be copies or not."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nemo_bench.records.schema import SimilarityTable
from nemo_bench.report.copies import rows_of, transformations
from nemo_bench.report.svg import INK, style, svg
from nemo_bench.report.texts import TEXTS

CHANCE = 0.5
"""Area under the ROC curve of a metric that tells nothing apart."""


def heat_map(table: SimilarityTable) -> str:
    """Areas under the ROC curve, metric by transformation, as an SVG element."""
    names = transformations(table)
    metrics = [row.metric for row in rows_of(table, names[0])]
    areas = {(row.metric, row.transformation): row.roc.auc for row in table.rows}
    with style():
        figure = Figure(figsize=(2.2 + 0.62 * len(names), 1.5 + 0.42 * len(metrics)), layout="constrained")
        axes = figure.add_subplot()
        for y, metric in enumerate(metrics):
            for x, name in enumerate(names):
                area = areas[metric, name]
                color = TEXTS["palette"]["blue" if area >= CHANCE else "vermilion"]
                strength = 0.05 + 0.6 * abs(area - CHANCE) / CHANCE
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, alpha=strength, linewidth=0))
                axes.text(x, y, f"{area:.2f}", ha="center", va="center", color=INK, fontsize="small")
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axes.set_yticks(range(len(metrics)), [table.metrics[metric].title for metric in metrics])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, "areas", "Area under the ROC curve by metric and transformation")
