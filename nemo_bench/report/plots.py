"""The figures of a report: trade-offs, distributions, neurons and detection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Annotation
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from nemo_bench.records.data import GENERAL
from nemo_bench.records.io import read_file
from nemo_bench.records.results import CellResults, Results, network_order, short_layers
from nemo_bench.records.schema import AxisRow, CalibrationRecord, Roc, StrengthCurve, Strengths, Threshold
from nemo_bench.records.statistics import GROUPS, bootstrap_interval
from nemo_bench.records.store import read_records
from nemo_bench.report.axes import axes_of, measures_of
from nemo_bench.report.selection import COST, MEMORIZED, front, info_of, is_complete, measured, sign, tradeoffs
from nemo_bench.report.svg import INK, Look, looks, nth_look, style, svg
from nemo_bench.report.texts import TEXTS

_DOTS = 40
"""With more prompts their shape is drawn instead of every one of them."""
_LABELS = 8
"""With more points a legend names them, and only those that matter are labelled."""


@dataclass(frozen=True)
class Plot:
    """A figure as an SVG element, for a section of the page; its name is unique there."""

    section: str
    name: str
    title: str
    caption: str
    svg: str


class _Spot(NamedTuple):
    value: float
    low: float
    high: float


def _panel(height: float, lines: Literal["both", "x"] = "both") -> tuple[Figure, Axes]:
    """A figure of one panel with grid lines; its height is in inches."""
    figure = Figure(figsize=(5.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis=lines)
    return figure, axes


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names horizontal rows, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _plot(figure: Figure, section: str, name: str, title: str, caption: str, label: str = "") -> Plot:
    """A figure that is done; the label tells those who can't see it what it shows, where that is not its title."""
    return Plot(section, name, title, caption, svg(figure, name, label or title))


def plots(results: Results) -> list[Plot]:
    """All figures the records of a run allow; figures of the same thing in several models follow each other."""
    with style():
        figures: list[Plot | None] = [*_tradeoffs(results), *_distributions(results)]
        figures += [draw(results, model) for draw in (_counts, _layers, _roc) for model in results.models]
        calibrated: dict[Path, CellResults] = {}
        for cell in results.cells:
            if cell.calibration:
                calibrated.setdefault(cell.calibration, cell)
        figures += [_calibration(results, cell, folder) for folder, cell in calibrated.items()]
    return [plot for plot in figures if plot]


def _title(results: Results, words: str, model: str) -> str:
    return f"{words}: {model}" if len(results.models) > 1 else words


def _axis(results: Results, key: str) -> str:
    """Title of a metric, and where on its axis better values lie."""
    info = info_of(results, key)
    if info.higher_is_better is None:
        return info.title
    # Text of a vertical axis is turned to the left, and its arrows with it.
    return f"{info.title} ({'better →' if info.higher_is_better else '← better'})"


def axis_figures(results: Results) -> list[Plot]:
    """The first measure of variants of prompts beside what it is compared with, a figure for each axis."""
    found = []
    rows = axes_of(results)
    with style():
        for axis in dict.fromkeys(row.axis for row in rows):
            key = measures_of(results, axis)[0]
            own = [row for row in rows if row.axis == axis and key in row.values]
            if own:
                found.append(_axis_figure(results, own, key))
    return found


def _axis_figure(results: Results, rows: Sequence[AxisRow], key: str) -> Plot:
    figure, axes = _panel(1.1 + 0.42 * len(rows), "x")
    known = looks(results.cells)
    short = {cell.name: cell.short for cell in results.cells}
    is_neighbour = rows[0].axis == "neighbour"
    for place, row in enumerate(rows):
        value, look = row.values[key], known[short[row.cell]]
        spots = (value.before, value.variant) if is_neighbour else (value.original, value.variant)
        for number, spot in enumerate(spots):
            if spot is not None and spot.low is not None and spot.high is not None:
                at = place - 0.15 + 0.3 * number
                face = "none" if (number == 0) == is_neighbour else look.color
                axes.hlines(at, spot.low, spot.high, colors=look.color, linewidth=1.2, alpha=0.6)
                axes.plot(spot.mean, at, look.marker, color=look.color, mfc=face, ms=6)
    _name_rows(axes, [row.label for row in rows])
    axes.set_xlabel(_axis(results, key), loc="right")  # names of metrics may be longer than the axis
    axis = rows[0].axis
    title = f"{GROUPS[axis][0].upper()}{GROUPS[axis][1:]}"
    caption = TEXTS["axes"]["neighbours" if is_neighbour else "figure"]
    return _plot(figure, "axes", f"axis-{axis}", title, caption)


def _tradeoffs(results: Results) -> list[Plot]:
    figures: list[Plot] = []
    for number, (family, across, up) in enumerate(tradeoffs(results)):
        spots = {
            cell.name: (x, y)
            for cell in results.cells
            if (x := _measure(results, cell, across)) and (y := _measure(results, cell, up))
        }  # fmt: skip
        for i, model in enumerate(results.models):
            cells = [cell for cell in results.cells if cell.model == model and cell.name in spots]
            if len(cells) > 1:
                title = _title(results, f"Memorization and {family}", model)
                figures.append(_tradeoff(results, cells, spots, (across, up), f"tradeoff-{number}-{i}", title))
    return figures


def _measure(results: Results, cell: CellResults, key: str) -> _Spot | None:
    """A metric of a cell over memorized prompts, with its interval; without one for costs and for whole sets."""
    values = measured(results, cell, key)
    if not values:
        return None
    mean = float(np.mean(values))
    has_interval = key != COST and results.metrics[key].per != "set"
    return _Spot(mean, *(bootstrap_interval(np.array(values)) if has_interval else (mean, mean)))


def _tradeoff(
    results: Results,
    cells: Sequence[CellResults],
    spots: Mapping[str, tuple[_Spot, _Spot]],
    keys: tuple[str, str],
    name: str,
    title: str,
) -> Plot:
    signs = [sign(results, key) for key in keys]
    values = [(spots[cell.name][0].value, spots[cell.name][1].value) for cell in cells]
    # What failed may be what would have been bad.
    complete = [i for i, cell in enumerate(cells) if all(is_complete(results, cell, key) for key in keys)]
    complete = complete or list(range(len(cells)))
    best = [complete[i] for i in front([(signs[0] * values[i][0], signs[1] * values[i][1]) for i in complete])]
    many = len(cells) > _LABELS
    rows = math.ceil(len(cells) / 2) if many else 0
    figure, axes = _panel(4.2 + 0.2 * rows)
    axes.margins(0.16)
    if keys[1] == COST and max(y.value for _, y in spots.values()) > 10 * min(y.value for _, y in spots.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    known = looks(results.cells)
    for place, cell in enumerate(cells):
        look = known[cell.short]
        x, y = spots[cell.name]
        axes.hlines(y.value, x.low, x.high, colors=look.color, linewidth=1.1, alpha=0.55)
        axes.vlines(x.value, y.low, y.high, colors=look.color, linewidth=1.1, alpha=0.55)
        face = look.color if place in best else "none"
        axes.plot(*values[place], look.marker, color=look.color, mfc=face, ms=7, label=cell.short, linestyle="none")
    # The same span for every model, so that figures side by side can be compared.
    axes.update_datalim([corner for x, y in spots.values() for corner in zip(x[1:], y[1:], strict=True)])
    axes.autoscale_view()
    axes.set_xlabel(_axis(results, keys[0]))
    axes.set_ylabel(_axis(results, keys[1]))
    if many:
        figure.legend(loc="outside lower left", ncols=2, fontsize="small")
    named = [i for i, cell in enumerate(cells) if not many or i in best or cell.method == "none"]
    _label(figure, axes, [(cells[i].short, *values[i]) for i in named])
    _draw_front(axes, [values[i] for i in best])
    listed = "; ".join(cells[i].short for i in best)
    caption = (
        f"Filled marks and the dashed line are the Pareto front: {listed}. Means are over memorized prompts; "
        "lines are 95% bootstrap intervals."
    )
    if left_out := [cell.short for i, cell in enumerate(cells) if i not in complete]:
        caption += f" Left out of the front, since images or scores failed: {'; '.join(left_out)}."
    return _plot(figure, "tradeoffs", name, title, caption, f"{title}. Pareto front: {listed}")


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Draws the steps of a Pareto front, whose points are in its order."""
    corners = [point for one, other in pairwise(points) for point in (one, (other[0], one[1]))]
    axes.plot(*zip(*corners, points[-1], strict=True), color=INK, linewidth=0.9, alpha=0.45, linestyle=(0, (4, 3)))


def strength_curves(results: Results, strengths: Strengths) -> list[Plot]:
    """Methods from mild to strong, a figure for each model and list of prompts."""
    figures = []
    with style():
        for model in results.models:
            for prompts in results.prompt_lists:
                curves = [c for c in strengths.curves if (c.model, c.prompts) == (model, prompts)]
                if any(point.memorized for curve in curves for point in curve.points):
                    name = f"strengths-{results.models.index(model)}-{results.prompt_lists.index(prompts)}"
                    words = "Strengths" if len(results.prompt_lists) == 1 else f"Strengths, {prompts}"
                    figures.append(_strengths(results, strengths, curves, name, _title(results, words, model)))
    return figures


def _strengths(results: Results, strengths: Strengths, curves: Sequence[StrengthCurve], name: str, title: str) -> Plot:
    figure, axes = _panel(4.4 + 0.2 * math.ceil(len(curves) / 2))
    axes.margins(0.12)
    named: dict[str, tuple[float, float]] = {}  # the mildest of a method on the front
    best: list[tuple[float, float]] = []
    for number, curve in enumerate(curves):
        look = nth_look(number)
        known = [(p, (p.memorized.mean, p.alignment.mean)) for p in curve.points if p.memorized and p.alignment]
        line, label = [place for _, place in known], curve.label
        if not known:
            continue
        axes.plot(*zip(*line, strict=True), color=look.color, linewidth=1.1, alpha=0.6)
        for order, (point, place) in enumerate(known):
            face = look.color if point.is_on_front else "none"
            size = 5 + 3 * order / max(1, len(known) - 1)
            axes.plot(*place, look.marker, color=look.color, mfc=face, ms=size, label=label, linestyle="none")
            label = "_"  # in the legend once
            if point.cell == curve.chosen:
                axes.plot(*place, "o", color=look.color, mfc="none", ms=13, mew=0.8, linestyle="none")
            if point.is_on_front:
                best.append(place)
            if point.is_on_front or curve.method == "none":
                named.setdefault(curve.label, place)
    axes.set_xlabel(_axis(results, strengths.memorized))
    axes.set_ylabel(_axis(results, strengths.alignment))
    figure.legend(loc="outside lower left", ncols=2, fontsize="small")
    if len(curves) <= _LABELS:  # the names of many would leave the axes no room
        _label(figure, axes, [(label, *place) for label, place in named.items()])
    if best:
        _draw_front(axes, sorted(best))
    caption = (
        "A line is a method, its marks are larger the stronger it is, and the ringed one is chosen. Filled marks and "
        "the dashed line are the Pareto front. Means are over the memorized prompts that no setting was chosen by."
    )
    return _plot(figure, "strengths", name, title, caption)


def _label(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes a label beside each point, near it, where it covers the fewest labels, points and error bars."""
    FigureCanvasAgg(figure)  # keeps its renderer; else each label that is measured makes one as large as the figure
    figure.draw_without_rendering()
    marks = [artist.get_window_extent().padded(3) for artist in (*axes.lines, *axes.collections)]
    labels: list[Bbox] = []
    for text, x, y in points:
        options: list[tuple[float, int, Annotation]] = []
        for order, (dy, dx) in enumerate(product((9, -9, 33, -33, 57, -57), (9, -9))):
            ha, va = ("left" if dx > 0 else "right"), ("bottom" if dy > 0 else "top")
            note = axes.annotate(text, (x, y), (dx / 2, dy / 2), textcoords="offset points", ha=ha, va=va)
            area = note.get_window_extent()
            size = area.width * area.height
            outside, far = size - _overlap(area, axes.bbox), size * abs(dy) / 200  # a line of text further is 0.12
            hidden, unreadable = (sum(_overlap(area, other) for other in others) for others in (marks, labels))
            options.append((outside + far + hidden + 10 * unreadable, order, note))
        *others, (_, _, kept) = sorted(options, key=lambda option: option[:2], reverse=True)
        for _, _, note in others:
            note.remove()
        labels.append(kept.get_window_extent())


def _overlap(a: Bbox, b: Bbox) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def _distributions(results: Results) -> list[Plot | None]:
    keys = [key for family, key in results.leading.items() if family not in ("quality", "localization")]
    keys = [key for key in keys if results.metrics[key].per != "set"]
    return [_distribution(results, key, model) for key in keys for model in results.models]


def _distribution(results: Results, key: str, model: str) -> Plot | None:
    values = {
        (cell.name, group): list(cell.prompt_means(key, [group]).values())
        for cell in results.cells
        for group in (*MEMORIZED, GENERAL)
    }
    cells = [cell for cell in results.cells if cell.model == model]
    groups = [group for group in (*MEMORIZED, GENERAL) if any(values[cell.name, group] for cell in cells)]
    if not set(groups) & set(MEMORIZED):
        return None
    figure = Figure(figsize=(5.0, 0.9 + max(1.2, 0.46 * len(cells))), layout="constrained")
    known = looks(results.cells)
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        axes.grid(axis="x")
        axes.set_title(group)
        for place, cell in enumerate(cells):
            if numbers := values[cell.name, group]:
                _strip(axes, place, numbers, known[cell.short])
        _name_rows(axes, [cell.short for cell in cells])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4 - min(len(groups), 2), steps=[1, 2, 2.5, 4, 5, 10]))
    every = [value for numbers in values.values() for value in numbers]
    margin = 0.04 * (max(every) - min(every)) or 0.1
    panels[0].set_xlim(min(every) - margin, max(every) + margin)
    figure.supxlabel(_axis(results, key), fontsize="medium")
    drawn = "a dot is a prompt" if max(map(len, values.values())) <= _DOTS else "the shape counts prompts"
    caption = f"Means over the images of each prompt: {drawn}, the line is the median, the band the middle half."
    title = _title(results, results.metrics[key].title, model)
    name = f"distribution-{key}-{results.models.index(model)}"
    return _plot(figure, "distributions", name, title, caption, f"{title}: spread over prompts by method")


def _strip(axes: Axes, place: float, numbers: Sequence[float], look: Look) -> None:
    first, median, third = np.percentile(numbers, [25, 50, 75])
    axes.barh(place, third - first, 0.5, first, color=look.color, alpha=0.18, linewidth=0)
    axes.vlines(median, place - 0.25, place + 0.25, colors=look.color, linewidth=2)
    if len(numbers) > _DOTS:
        counts, edges = np.histogram(numbers, bins=32)
        height = 0.38 * np.append(counts, 0) / counts.max()
        axes.fill_between(edges, place - height, place + height, color=look.color, alpha=0.4, linewidth=0, step="post")
    else:
        spread = np.random.default_rng(0).uniform(-0.16, 0.16, len(numbers))
        axes.plot(numbers, place + spread, look.marker, color=look.color, alpha=0.75, ms=4, mew=0)


def _blocked(results: Results, model: str) -> tuple[list[str], list[tuple[CellResults, NDArray[np.int64]]]]:
    """Layers of a model in network order, and neurons by prompt and layer of each cell that blocked any.

    Memorized prompts count (all prompts where none is known to be).
    """
    cells = [cell for cell in results.cells if cell.model == model]
    layers = network_order({layer for cell in cells for layer in cell.layers})
    blocked: list[tuple[CellResults, NDArray[np.int64]]] = []
    for cell in cells:
        prompts = [prompt for prompt in cell.prompts if prompt.kind] or cell.prompts
        rows = [[len(cell.outcomes[prompt.id].neurons.get(layer, ())) for layer in layers] for prompt in prompts]
        counts = np.array(rows, np.int64).reshape(len(prompts), len(layers))
        if counts.any():
            blocked.append((cell, counts))
    return layers, blocked


def _counts(results: Results, model: str) -> Plot | None:
    _, cells = _blocked(results, model)
    if not cells:
        return None
    figure, axes = _panel(3.4 + 0.2 * math.ceil(len(cells) / 2))
    known = looks(results.cells)
    for cell, counts in cells:
        look, totals = known[cell.short], np.sort(counts.sum(axis=1))
        axes.step(
            [0, *totals], np.arange(len(totals) + 1) / len(totals), look.color, marker=look.marker, ms=5, mew=0,
            markevery=max(1, len(totals) // 6), where="post", linewidth=1.3, label=cell.short,
        )  # fmt: skip
    axes.set_xscale("symlog", linthresh=10)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("Neurons blocked (logarithmic above 10)")
    axes.set_ylabel("Prompts with at most as many")
    figure.legend(loc="outside upper left", ncols=2)
    name, title = f"counts-{results.models.index(model)}", _title(results, "Neurons per prompt", model)
    caption = "Share of memorized prompts by the largest number of neurons blocked."
    return _plot(figure, "neurons", name, title, caption)


def _layers(results: Results, model: str) -> Plot | None:
    layers, cells = _blocked(results, model)
    if not cells:
        return None
    row = min(max(0.3, 0.09 * len(cells)), 0.6)
    height = 1.0 + row * len(layers) + 0.2 * math.ceil(len(cells) / 2)
    figure, axes = _panel(max(2.4, height), "x")
    size = 0.8 / len(cells)
    known = looks(results.cells)
    for number, (cell, counts) in enumerate(cells):
        look = known[cell.short]
        places = np.arange(len(layers)) - 0.4 + size * (number + 0.5)
        axes.barh(places, counts.mean(axis=0), size * 0.9, color=look.color, alpha=0.3, linewidth=0)
        first, third = np.percentile(counts, [25, 75], axis=0)
        axes.hlines(places, first, third, colors=look.color, linewidth=1.2)
        axes.plot(
            counts.mean(axis=0), places, look.marker, color=look.color, ms=min(5, 40 * size), mew=0, label=cell.short
        )
    short = short_layers(layers)
    _name_rows(axes, [short[layer] for layer in layers])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("Neurons blocked per prompt")
    figure.legend(loc="outside upper left", ncols=2)
    name, title = f"layers-{results.models.index(model)}", _title(results, "Neurons by layer", model)
    caption = "Value layers in network order: mean over memorized prompts, and the middle half of them as a line."
    return _plot(figure, "neurons", name, title, caption)


def _roc(results: Results, model: str) -> Plot | None:
    """Detectors without mitigation; of every cell where that was not run."""
    cells = [cell for cell in results.cells if cell.model == model and cell.summary.detection]
    cells = [cell for cell in cells if cell.method == "none"] or cells
    detectors = [(cell, roc) for cell in cells for roc in cell.summary.detection.values() if roc.curve]
    if not detectors:
        return None
    figure, axes = _panel(4.6)
    several = len(cells) > 1
    _draw_curves(axes, [(f"{roc.title}, {cell.short}" if several else roc.title, roc) for cell, roc in detectors])
    axes.legend(loc="lower right")
    name, title = f"roc-{results.models.index(model)}", _title(results, "Detection of memorized prompts", model)
    caption = "One curve a detector, over the prompts known to be memorized and the others; dotted is chance."
    return _plot(figure, "detection", name, title, caption)


def detector_curves(detectors: Sequence[tuple[str, Roc]], name: str, prompts: str) -> str:
    """ROC curves of detectors, label and measures of each, over the same prompts as an SVG element."""
    with style():
        figure = Figure(figsize=(9.0, 4.8), layout=ConstrainedLayoutEngine(h_pad=0.12))
        axes, legend = figure.subplots(1, 2, width_ratios=[1.1, 1])
        _draw_curves(axes, detectors, clip=False)
        legend.axis("off")
        legend.legend(*axes.get_legend_handles_labels(), loc="center left")
        return svg(figure, name, f"ROC curves of detectors, {prompts}")


def _draw_curves(axes: Axes, detectors: Sequence[tuple[str, Roc]], *, clip: bool = True) -> None:
    axes.grid(visible=True)  # twice without an argument is off again
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.4, linestyle=":")
    axes.axvline(0.01, color=INK, linewidth=0.8, alpha=0.4, linestyle="--")
    for number, (label, roc) in enumerate(detectors):
        look = nth_look(number)
        axes.plot(
            *zip(*roc.curve, strict=True), color=look.color, marker=look.marker, markevery=0.2, ms=5,
            label=f"{label}: AUC {roc.auc:.3f}", clip_on=clip,
        )  # fmt: skip
    axes.set_xlabel("False positive rate (dashed: 1%)")
    axes.set_ylabel("True positive rate")
    axes.set_aspect("equal")


def _calibration(results: Results, calibrated: CellResults, folder: Path) -> Plot | None:
    threshold = read_file(folder / "threshold.json", Threshold)
    tau = threshold.threshold
    records = read_records(folder, CalibrationRecord).values()
    pairs = [pair for record in records for pair in record.pairs or () if math.isfinite(pair)]
    if tau is None or not pairs:
        return None
    # Without mitigation prompts are scored by the protocol of the paper.
    same = (threshold.protocol, threshold.similarity) == ("paper", "fixed")
    comparable = [cell for cell in results.cells if same and _shares_scores(cell, calibrated)]
    plain = [cell for cell in comparable if cell.method == "none"]
    rows: dict[str, dict[tuple[str, str], float]] = {group: {} for group in MEMORIZED}
    for cell, group, key in product(plain, MEMORIZED, results.keys_of("memorization_score")):
        rows[group] |= {(cell.spec.prompts, i): v for i, v in cell.prompt_means(key, [group]).items()}
    groups = [group for group in MEMORIZED if rows[group]]
    heights = [2.0, *([0.3 + 0.45 * len(groups)] if groups else [])]
    figure = Figure(figsize=(5.0, 0.9 + sum(heights)), layout="constrained")
    top, *below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    top.set_title("General prompts, pairs of seeds")
    top.hist(pairs, bins=40, weights=np.full(len(pairs), 100 / len(pairs)), color=INK, alpha=0.35)
    top.set_ylabel("% of pairs")
    top.yaxis.set_major_locator(MaxNLocator(3))
    at = top.get_xaxis_transform()
    top.annotate(f"threshold {tau:.3f}", (tau, 1), (5, 0), at, "offset points", va="top")
    for axes in below:
        axes.set_title("Memorized prompts, nothing mitigated")
        for place, group in enumerate(groups):
            _strip(axes, place, list(rows[group].values()), looks(results.cells)[plain[0].short])
        _name_rows(axes, groups)
        axes.spines["left"].set_visible(False)
    for axes in (top, *below):
        axes.grid(axis="x")
        axes.axvline(tau, color=INK, linewidth=1.2, linestyle="--")
    (below or [top])[-1].set_xlabel("Similarity of noise differences (more memorized →)")
    name = f"calibration-{results.cells.index(calibrated)}"
    title = f"Threshold: {calibrated.model}" + (f", {threshold.protocol} protocol" * (threshold.protocol != "paper"))
    caption = "The dashed line is the threshold, mean plus one standard deviation of the pairs of general prompts."
    if groups:
        caption += " Dots are memorized prompts, each the mean over its pairs, with their median and middle half."
    if threshold.failed:
        caption += f" {threshold.failed} general prompts failed: their noise differences are not finite."
    return _plot(figure, "detection", name, title, caption)


def _shares_scores(cell: CellResults, other: CellResults) -> bool:
    """Whether noise differences of two cells were made and compared alike."""
    return cell.model == other.model and all(
        cell.spec.settings.get(key) == other.spec.settings.get(key) for key in ("model", "localize_seeds")
    )
