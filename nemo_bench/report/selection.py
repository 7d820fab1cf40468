"""Which cells a report draws: all of a usual run, and of many those that matter most to its readers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice, zip_longest
from statistics import fmean
from typing import get_args

from nemo_bench.records.data import Kind
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import MetricInfo

MEMORIZED: tuple[str, ...] = get_args(Kind)
"""Groups of prompts whose training images are known."""
COST = "UNet passes per prompt"
"""An axis that is no metric."""
_OF_A_MODEL = 30
"""Cells of a model that are drawn, at most: so many differ in colour and mark."""
_OF_A_RUN = 120


def drawn(results: Results) -> Results:
    """A run without the cells that figures and images leave out; the same run where they show all.

    Of each model there are the first cell without mitigation, then the Pareto fronts of all trade-offs, then the best
    cells by the first metric of every family in turn; models take turns as well. Cells keep their order.
    """
    by_model = [[cell for cell in results.cells if cell.model == model] for model in results.models]
    orders = [cells if len(cells) <= _OF_A_MODEL else _order(results, cells) for cells in by_model]
    chosen = {cell.name for cell in islice(_in_turn([order[:_OF_A_MODEL] for order in orders]), _OF_A_RUN)}
    return replace(results, cells=tuple(cell for cell in results.cells if cell.name in chosen))


def _order(results: Results, cells: Sequence[CellResults]) -> list[CellResults]:
    """Cells of a model, what matters most first; last those of which values are missing, which may be the bad ones."""
    plain = [cell for cell in cells if cell.method == "none"]
    fronts = []
    for _, *keys in tradeoffs(results):
        points = [(cell, [_cost(results, cell, key) for key in keys]) for cell in cells]
        known = [(cell, (x, y)) for cell, (x, y) in points if x is not None and y is not None]
        fronts.append([known[i][0] for i in front([point for _, point in known])])
    rankings = []
    for key in results.leading.values():
        costs = {cell.name: cost for cell in cells if (cost := _cost(results, cell, key)) is not None}
        if results.metrics[key].higher_is_better is not None:
            rankings.append(sorted((c for c in cells if c.name in costs), key=lambda c: costs[c.name]))
    order = [*plain[:1], *_in_turn(fronts), *_in_turn([plain, *rankings]), *cells]
    return list({cell.name: cell for cell in order}.values())


def _in_turn(lists: Iterable[Sequence[CellResults]]) -> Iterable[CellResults]:
    return (cell for row in zip_longest(*lists) for cell in row if cell is not None)


def _cost(results: Results, cell: CellResults, key: str) -> float | None:
    """The mean of a metric over memorized prompts, small where it is good; None where it is not known as a whole."""
    values = measured(results, cell, key)
    if not values or not is_complete(results, cell, key):
        return None
    return sign(results, key) * fmean(values)


def tradeoffs(results: Results) -> list[tuple[str, str, str]]:
    """What less memorization costs: a family or ``cost``, the metric of memorization, and what it is held against."""
    across = results.leading.get("memorization")
    if not across:
        return []
    families = [family for family in ("alignment", "quality") if family in results.leading]
    return [*((family, across, results.leading[family]) for family in families), ("cost", across, COST)]


def info_of(results: Results, key: str) -> MetricInfo:
    """What is known of a metric, or of :data:`COST`."""
    title = "TFLOPs per prompt" if _in_flops(results) else COST
    return MetricInfo(title=title, higher_is_better=False) if key == COST else results.metrics[key]


def _in_flops(results: Results) -> bool:
    """Whether costs are compared in floating point operations: passes of several models are not alike."""
    return len(results.models) > 1 and all("teraflops_per_image" in cell.summary.cost for cell in results.cells)


def sign(results: Results, key: str) -> int:
    """-1 where large values of a metric are good, else 1."""
    return -1 if info_of(results, key).higher_is_better else 1


def measured(results: Results, cell: CellResults, key: str) -> list[float]:
    """A metric of every memorized prompt; a single number for costs and for whole sets; nothing where none is known."""
    if key == COST:
        images = sum(len(outcome.seeds) for outcome in cell.outcomes.values()) / len(cell.outcomes)
        cost = cell.summary.cost
        if _in_flops(results):
            return [images * cost["teraflops_per_image"]]
        passes = cost.get("once_row_passes_per_prompt", 0) + images * cost.get("row_passes_per_image", 0)
        return [passes] if passes else []
    if results.metrics[key].per == "set":
        return [row[key].mean for row in reversed(cell.summary.aggregates.values()) if key in row][:1]
    return list(cell.prompt_means(key, MEMORIZED).values())


def is_complete(results: Results, cell: CellResults, key: str) -> bool:
    """Whether no value of memorized prompts, or of all in a set, failed."""
    groups = ["all"] if info_of(results, key).per == "set" else MEMORIZED
    return all(cell.is_complete(group, key) for group in groups)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The Pareto front: indices of points that no other point improves on, where smaller is better in both coordinates.

    They go from the smallest first coordinate on; of equal points there are all.

    Example:
        >>> front([(1, 3), (2, 2), (3, 2), (3, 1)])
        [0, 1, 3]
    """
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not best or points[i][1] < points[best[-1]][1] or points[i] == points[best[-1]]:
            best.append(i)
    return best
