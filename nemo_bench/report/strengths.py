"""Methods at several strengths: a curve of each, and the setting that is chosen on prompts that are not reported."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from nemo_bench.records.io import digest
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import Aggregate, StrengthCurve, StrengthPoint, Strengths
from nemo_bench.records.statistics import bootstrap_interval
from nemo_bench.report.selection import front

MOST_MEMORIZED = 0.1
"""Largest memorized share, on the prompts to choose by, of a setting that is chosen for its alignment."""
SHARE = 0.5
"""Expected share of the memorized prompts by which settings are chosen; the others are reported."""


_KNOWN: WeakKeyDictionary[Results, Strengths | None] = WeakKeyDictionary()


def chooses(prompt: str) -> bool:
    """Whether a prompt is one to choose settings by, and so not reported; it depends on its id alone."""
    return int(digest(prompt), 16) % 2 == 0


class Scale(NamedTuple):
    """The unit square of a model and its prompts, without mitigation at (1, 0)."""

    memorized: float  #: Memorized share without mitigation.
    alignment: float  #: Alignment without mitigation, of which nothing is lost.
    least: float  #: Alignment with the text of other prompts, where all is lost.

    @classmethod
    def of(cls, unmitigated: Sequence[Sequence[float]] | None, least: float | None) -> Scale | None:
        """The scale by means of each prompt; None where an end is not known, or nothing is between the ends."""
        if not unmitigated or least is None:
            return None
        memorized, alignment = map(fmean, unmitigated)
        return cls(memorized, alignment, least) if memorized > 0 and alignment > least else None

    def place(self, memorized: float, alignment: float) -> tuple[float, float]:
        """Memorized share and lost alignment, as parts of what there is without mitigation.

        Example:
            >>> Scale(memorized=0.8, alignment=0.30, least=0.10).place(0.4, 0.25)
            (0.5, 0.25)
        """
        lost = (self.alignment - alignment) / (self.alignment - self.least)
        return memorized / self.memorized, round(min(1.0, max(0.0, lost)), 12)


class Choice(NamedTuple):
    """The chosen one of several settings."""

    place: int  #: Its index.
    is_within: bool  #: Whether its memorized share is at most :data:`MOST_MEMORIZED`.


def choose(settings: Sequence[tuple[float, float] | None]) -> Choice | None:
    """Chooses a setting by memorized share and alignment, each from mild to strong; None where none has both.

    It is the one of the best alignment among those whose share is at most :data:`MOST_MEMORIZED`; of the least share
    where there are none. Ties go to the other number, then to the milder one.

    Example:
        >>> choose([(0.8, 0.30), (0.1, 0.28), (0.0, 0.25)])
        Choice(place=1, is_within=True)
    """
    known = [(i, *values) for i, values in enumerate(settings) if values]
    within = [(i, share, alignment) for i, share, alignment in known if share <= MOST_MEMORIZED + 1e-9]
    if within:
        return Choice(min(within, key=lambda of: (-of[2], of[1], of[0]))[0], is_within=True)
    if known:
        return Choice(min(known, key=lambda of: (of[1], -of[2], of[0]))[0], is_within=False)
    return None


def area(points: Sequence[tuple[float, float]]) -> float:
    """The part of the unit square in which every point is bettered by one of these, where small is good in both.

    Example:
        >>> area([(0.5, 0.0), (0.0, 0.5)])
        0.75
    """
    total, top = 0.0, 1.0
    for x, y in sorted(points):
        if x < 1 and y < top:
            total += (1 - x) * (top - y)
            top = y
    return total


def strengths_of(results: Results) -> Strengths | None:
    """The curves of a run with ``strengths=true``; None for other runs, and without the metrics that it takes.

    A memorized share is the first metric of the role ``memorization_rate``, alignment the first of its family; both are
    means over memorized prompts that have training images. They are computed once for all tables and figures.
    """
    if results not in _KNOWN:
        _KNOWN[results] = _strengths_of(results)
    return _KNOWN[results]


def _strengths_of(results: Results) -> Strengths | None:
    rates, alignment = results.keys_of("memorization_rate"), results.leading.get("alignment")
    if not rates or not alignment or not any(cell.name in results.run.strengths for cell in results.cells):
        return None
    keys = (rates[0], alignment)
    curves = []
    least: dict[str, dict[str, float]] = {}
    for model in results.models:
        for prompts in results.prompt_lists:
            cells = [cell for cell in results.cells if (cell.model, cell.spec.prompts) == (model, prompts)]
            lowest = _least_alignment(cells, alignment)
            if lowest is not None:
                least.setdefault(model, {})[prompts] = lowest
            curves += _curves(results, cells, keys, lowest)
    return Strengths(
        memorized=keys[0], alignment=keys[1], least_alignment=least, limit=MOST_MEMORIZED, share=SHARE, curves=curves
    )


@dataclass(frozen=True)
class Compared:
    """What of a run at several strengths is compared side by side."""

    cells: frozenset[str]  #: Cells without mitigation, and of each method that of the chosen setting.
    #: Prompts by which no setting was chosen, nor by those that they vary; all that are not memorized are among them.
    prompts: frozenset[str]


def compared(results: Results) -> Compared | None:
    """What of a run is compared side by side; None where that is all of it, as without strengths."""
    strengths = strengths_of(results)
    if strengths is None:
        return None
    cells = {c.chosen or point.cell for c in strengths.curves for point in c.points if c.chosen or c.method == "none"}
    every = [prompt for cell in results.cells for prompt in cell.prompts]
    prompts = {p.id for p in every if not (p.kind or p.variant_of) or not chooses(p.variant_of or p.id)}
    return Compared(frozenset(cells), frozenset(prompts))


def _least_alignment(cells: Sequence[CellResults], key: str) -> float | None:
    """Alignment of unmitigated images with the text of other prompts, over memorized prompts that are reported."""
    for cell in (cell for cell in cells if cell.method == "none"):
        prompts = [prompt.id for prompt in cell.prompts if prompt.kind and not chooses(prompt.id)]
        values = [cell.outcomes[name].shuffled.get(key) for name in prompts]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values):
            return fmean(known)
    return None


def _curves(
    results: Results, cells: Sequence[CellResults], keys: tuple[str, str], least: float | None
) -> list[StrengthCurve]:
    """The curves of cells of one model and list of prompts; nothing is chosen of those without mitigation."""
    ids = {prompt.id for cell in cells for prompt in cell.prompts if prompt.kind}
    scored = {i for i in ids if any(i in cell.outcomes and cell.outcomes[i].values(keys[0]) for cell in cells)}
    own, reported = {i for i in scored if chooses(i)}, {i for i in scored if not chooses(i)}
    to_choose = {cell.name: _means(results, cell, keys, own) for cell in cells}
    shown = {cell.name: _means(results, cell, keys, reported) for cell in cells}
    known = [(name, (fmean(means[0]), -fmean(means[1]))) for name, means in shown.items() if means]
    best = {known[i][0] for i in front([point for _, point in known])}
    curves = []
    for alike in _alike(results, cells):
        strength = results.run.strengths.get(alike[0].name)
        numbers = [(fmean(m[0]), fmean(m[1])) if (m := to_choose[cell.name]) else None for cell in alike]
        choice = choose(numbers) if alike[0].method != "none" else None
        unmitigated = alike[0].name if alike[0].method == "none" else alike[0].summary.unmitigated
        scale = Scale.of(shown.get(unmitigated or ""), least)
        places = [
            scale.place(fmean(s[0]), fmean(s[1])) if scale and (s := shown[cell.name]) else None for cell in alike
        ]
        points = [
            StrengthPoint(
                cell=cell.name,
                value=cell.spec.settings["method"][strength.setting] if strength else None,
                choosing_memorized=fmean(m[0]) if (m := to_choose[cell.name]) else None,
                choosing_alignment=fmean(m[1]) if m else None,
                memorized=_aggregate(s[0]) if (s := shown[cell.name]) else None,
                alignment=_aggregate(s[1]) if s else None,
                score=None if place is None else area([place]),
                is_on_front=cell.name in best,
            )
            for cell, place in zip(alike, places, strict=True)
        ]
        known_places = [place for place in places if place is not None]
        curves.append(
            StrengthCurve(
                label=" · ".join(_common([cell.label.split(" · ") for cell in alike])),
                model=alike[0].model,
                method=alike[0].method,
                prompts=alike[0].spec.prompts,
                setting=strength.setting if strength else None,
                points=points,
                score=points[choice.place].score if choice else None,
                area=area(known_places) if known_places else None,
                chosen=points[choice.place].cell if choice else None,
                is_within=bool(choice and choice.is_within),
                choosing_prompts=len(own),
                prompts_reported=len(reported),
            )
        )
    return curves


def _means(
    results: Results, cell: CellResults, keys: Sequence[str], prompts: Collection[str]
) -> list[list[float]] | None:
    """By metric the mean of each prompt; None where any image or score is missing, and without prompts."""
    means = []
    for key in keys:
        own = []
        for outcome in (cell.outcomes[prompt.id] for prompt in cell.prompts if prompt.id in prompts):
            values = outcome.values(key)
            expected = len(outcome.seeds) if results.metrics[key].per == "image" else 1
            if len(values) != expected:
                return None
            own.append(fmean(values))
        means.append(own)
    return means if all(means) else None


def _alike(results: Results, cells: Sequence[CellResults]) -> list[list[CellResults]]:
    """Cells that differ in strength alone, from mild to strong; those without strengths alone."""
    groups: dict[str, list[tuple[int, CellResults]]] = {}
    for cell in cells:
        strength = results.run.strengths.get(cell.name)
        key, place = cell.name, 0
        if strength:
            settings = cell.spec.settings
            place = strength.values.index(settings["method"][strength.setting])
            others = {**settings, "method": {**settings["method"], strength.setting: None}}
            key = digest([cell.method, strength.setting, others])
        groups.setdefault(key, []).append((place, cell))
    return [[cell for _, cell in sorted(group, key=lambda of: of[0])] for group in groups.values()]


def _common(labels: Sequence[Sequence[str]]) -> list[str]:
    """The words that all labels have."""
    return [word for word in labels[0] if all(word in label for label in labels)]


def _aggregate(means: Sequence[float]) -> Aggregate:
    low, high = bootstrap_interval(np.array(means))
    return Aggregate(mean=fmean(means), low=low, high=high, prompts=len(means))
