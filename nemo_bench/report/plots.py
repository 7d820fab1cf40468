"""Figures as inline SVG that follows the colours of the page around it.

Axes and text are drawn in a stand-in colour that becomes ``currentColor``, so a figure reads on light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from nemo_bench.aggregate import GROUPS, bootstrap_interval
from nemo_bench.report.data import Cell, Results, load_calibration, network_order, short_layers

MEMORIZED = ("VM", "TM")
"""Groups of prompts whose training images are known."""

_INK = "#010203"
PALETTE = {"vermilion": "#d55e00", "blue": "#0072b2", "green": "#009e73", "purple": "#cc79a7", "orange": "#e69f00"}
"""Okabe and Ito (2008) without the hues too pale on white; their black is the colour of the text."""

_COLORS = (_INK, *PALETTE.values())
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo_bench",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        name: Unique on the page.
        title: A few words.
        caption: How to read it.
        svg: The SVG element.
    """

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Look:
    """Colour and marker (matplotlib's) and the marker as a character; one look per method."""

    color: str
    marker: str
    glyph: str

    @property
    def css(self) -> str:
        """The colour on the page, which defines one variable for each name in :data:`PALETTE`."""
        return _page_colors(self.color)


def looks(results: Results) -> dict[str, Look]:
    """The look of every method, by its name, in order of appearance."""
    methods = dict.fromkeys(cell.method for cell in results.cells)
    return {name: Look(_COLORS[i % len(_COLORS)], *_MARKERS[i % len(_MARKERS)]) for i, name in enumerate(methods)}


def plots(results: Results) -> list[Plot]:
    """All figures the records of a run allow."""
    with matplotlib.style.context(["default", _STYLE]):
        found = [_tradeoff(results), _distribution(results)]
        found += [_layers(results, model) for model in dict.fromkeys(cell.model for cell in results.cells)]
        calibrated = {cell.calibration: cell for cell in results.cells[::-1] if cell.calibration}
        found += [_calibration(results, cell, folder) for folder, cell in list(calibrated.items())[::-1]]
    return [plot for plot in found if plot]


def _mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and both ends of its interval."""
    return float(np.mean(values)), *bootstrap_interval(np.array(values))


def _tradeoff(results: Results) -> Plot | None:
    points = []
    for cell in results.cells:
        ssim, alignment = (list(cell.prompt_means(key, MEMORIZED).values()) for key in ("ssim", "alignment"))
        if ssim and alignment:
            points.append((cell, _mean(ssim), _mean(alignment)))
    if not points:
        return None
    figure = Figure(figsize=(5.0, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid()
    axes.margins(0.16)
    for cell, (x, left, right), (y, low, high) in points:
        style = looks(results)[cell.method]
        axes.hlines(y, left, right, colors=style.color, linewidth=1.1, alpha=0.55)
        axes.vlines(x, low, high, colors=style.color, linewidth=1.1, alpha=0.55)
        axes.plot([x], [y], style.marker, color=style.color, markersize=7)
    axes.set_xlabel(f"{results.metrics['ssim'].title} (← better)")
    axes.set_ylabel(f"{results.metrics['alignment'].title} (better →)")
    _label(figure, axes, [(cell.label, x, y) for cell, (x, _, _), (y, _, _) in points])
    caption = "Means over the memorized prompts (VM and TM) with 95% bootstrap intervals; up and left is good."
    return Plot("tradeoff", "Memorization and alignment", caption, _svg(figure, "tradeoff", "Trade-off of methods"))


def _label(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes a label beside each point, on the side where it covers the fewest labels, points and error bars."""
    figure.draw_without_rendering()
    taken = [artist.get_window_extent().padded(3) for artist in (*axes.lines, *axes.collections)]
    for text, x, y in points:
        options: list[tuple[float, int, Annotation]] = []
        for order, (dy, dx) in enumerate(product((9, -9), (9, -9))):
            ha, va = ("left" if dx > 0 else "right"), ("bottom" if dy > 0 else "top")
            note = axes.annotate(text, (x, y), (dx / 2, dy / 2), textcoords="offset points", ha=ha, va=va)
            area = note.get_window_extent()
            outside = area.width * area.height - _overlap(area, axes.bbox)
            options.append((outside + sum(_overlap(area, other) for other in taken), order, note))
        *others, (_, _, kept) = sorted(options, key=lambda option: option[:2], reverse=True)
        for _, _, note in others:
            note.remove()
        taken.append(kept.get_window_extent())


def _overlap(a: Bbox, b: Bbox) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def _distribution(results: Results) -> Plot | None:
    values = {
        group: [list(cell.prompt_means("ssim", [group]).values()) for cell in results.cells] for group in MEMORIZED
    }
    groups = [group for group in MEMORIZED if any(values[group])]
    if not groups:
        return None
    figure = Figure(figsize=(5.0, max(2.4, 0.9 + 0.62 * len(results.cells))), layout="constrained")
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        axes.grid(axis="x")
        axes.set_title(f"{group}, {GROUPS[group]}")
        for place, (cell, numbers) in enumerate(zip(results.cells, values[group], strict=True)):
            if numbers:
                _strip(axes, place, numbers, looks(results)[cell.method])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    panels[0].set_yticks(range(len(results.cells)), [cell.label for cell in results.cells])
    panels[0].set_ylim(len(results.cells) - 0.5, -0.5)
    figure.supxlabel(f"{results.metrics['ssim'].title} (← better)", fontsize="medium")
    caption = "One dot a prompt, the mean over its images; the line is the median, the band the middle half."
    name = "SSIM to the training image by method"
    return Plot("distribution", "Spread over prompts", caption, _svg(figure, "distribution", name))


def _strip(axes: Axes, place: float, numbers: Sequence[float], style: Look) -> None:
    first, median, third = np.percentile(numbers, [25, 50, 75])
    axes.barh(place, third - first, 0.5, first, color=style.color, alpha=0.18, linewidth=0)
    axes.vlines(median, place - 0.25, place + 0.25, colors=style.color, linewidth=2)
    spread = np.random.default_rng(0).uniform(-0.16, 0.16, len(numbers))
    axes.plot(numbers, place + spread, style.marker, color=style.color, alpha=0.75, markersize=4, markeredgewidth=0)


def _layers(results: Results, model: str) -> Plot | None:
    cells = [cell for cell in results.cells if cell.model == model]
    layers = network_order({layer for cell in cells for layer in cell.layers})
    counts = [(cell, found) for cell in cells if (found := _counts(cell, layers)).any()]
    if not counts:
        return None
    figure = Figure(figsize=(5.0, max(2.4, 1.0 + 0.3 * len(layers))), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="x")
    size = 0.8 / len(counts)
    for number, (cell, found) in enumerate(counts):
        style = looks(results)[cell.method]
        places = np.arange(len(layers)) - 0.4 + size * (number + 0.5)
        axes.barh(places, found.mean(axis=0), size * 0.9, color=style.color, alpha=0.35, linewidth=0, label=cell.label)
        used = found > 0
        jitter = np.random.default_rng(0).uniform(-0.35 * size, 0.35 * size, found.shape)
        x, y = found[used], (places + jitter)[used]
        axes.plot(x, y, style.marker, color=style.color, alpha=0.5, markersize=3, markeredgewidth=0)
    short = short_layers(layers)
    axes.set_yticks(range(len(layers)), [short[layer] for layer in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("Neurons blocked per prompt")
    figure.legend(loc="outside upper left", ncols=2)
    name = f"layers-{[cell.model for cell in results.cells].index(model)}"
    title = f"Neurons by layer: {model}"
    caption = "Value layers in network order. Bars are means over memorized prompts, marks are prompts."
    return Plot(name, title, caption, _svg(figure, name, title))


def _counts(cell: Cell, layers: Sequence[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Number of neurons, prompts x layers, for the memorized prompts (all prompts where none is known to be)."""
    prompts = [prompt for prompt in cell.prompts if prompt.kind] or cell.prompts
    rows = [[len(cell.outcomes[prompt.id].neurons.get(layer, ())) for layer in layers] for prompt in prompts]
    return np.array(rows, np.int64).reshape(len(prompts), len(layers))


def _calibration(results: Results, calibrated: Cell, folder: Path) -> Plot:
    found = load_calibration(folder)
    # Without mitigation prompts are scored by the protocol of the paper.
    comparable = [cell for cell in results.cells if found.protocol == "paper" and _shares_scores(cell, calibrated)]
    plain = [cell for cell in comparable if cell.method == "none"]
    rows: dict[str, dict[tuple[str, str], float]] = {group: {} for group in MEMORIZED}
    for cell, group in product(plain, MEMORIZED):
        rows[group] |= {(cell.prompt_list, i): v for i, v in cell.prompt_means("memorization", [group]).items()}
    groups = [group for group in MEMORIZED if rows[group]]
    heights = [2.0, *([0.3 + 0.45 * len(groups)] if groups else [])]
    figure = Figure(figsize=(5.0, 0.9 + sum(heights)), layout="constrained")
    top, *below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    top.set_title("General prompts, pairs of seeds")
    top.hist(found.pairs, bins=40, weights=np.full(len(found.pairs), 100 / len(found.pairs)), color=_INK, alpha=0.35)
    top.set_ylabel("% of pairs")
    top.yaxis.set_major_locator(MaxNLocator(3))
    at = top.get_xaxis_transform()
    top.annotate(f"threshold {found.threshold:.3f}", (found.threshold, 1), (5, 0), at, "offset points", va="top")
    for axes in below:
        axes.set_title("Memorized prompts, nothing mitigated")
        for place, group in enumerate(groups):
            _strip(axes, place, list(rows[group].values()), looks(results)[plain[0].method])
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    for axes in (top, *below):
        axes.grid(axis="x")
        axes.axvline(found.threshold, color=_INK, linewidth=1.2, linestyle="--")
    (below or [top])[-1].set_xlabel("Similarity of noise differences (more memorized →)")
    name = f"calibration-{results.cells.index(calibrated)}"
    title = f"Threshold: {calibrated.model}" + (f", {found.protocol} protocol" * (found.protocol != "paper"))
    caption = "The dashed line is the threshold, mean plus one standard deviation of the pairs of general prompts."
    if groups:
        caption += " Dots are memorized prompts, each the mean over its pairs, with their median and middle half."
    return Plot(name, title, caption, _svg(figure, name, title))


def _shares_scores(cell: Cell, other: Cell) -> bool:
    """Whether noise differences of two cells were made and compared alike."""
    return cell.model == other.model and all(
        cell.settings.get(key) == other.settings.get(key) for key in ("model", "localize_seeds")
    )


def _svg(figure: Figure, name: str, label: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_METADATA)
    svg = buffer.getvalue().decode()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    for pattern, put in _rules(name):
        body = re.sub(pattern, put, body, flags=re.DOTALL)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{_page_colors(body.strip())}'


def _rules(name: str) -> Iterable[tuple[str, str]]:
    """What to rewrite so that figures share a page: no style for everything, ids of their own."""
    return (
        (r"<style.*?</style>", ""),
        (r"<!--.*?-->\s*", ""),
        (r'\bid="', f'id="{name}-'),
        (r'xlink:href="#', f'href="#{name}-'),
        (r"url\(#", f"url(#{name}-"),
    )


def _page_colors(text: str) -> str:
    for name, color in PALETTE.items():
        text = text.replace(color, f"var(--{name})")
    return text.replace(_INK, "currentColor")
