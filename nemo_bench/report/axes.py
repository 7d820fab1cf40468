"""Variants of prompts: whether a mitigation holds for other wordings, and what it costs prompts that resemble them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, get_args

import numpy as np

from nemo_bench.records.data import Axis
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import Aggregate, AxisRow, AxisValue, Paired
from nemo_bench.records.statistics import bootstrap_interval, holm, paired


def measures_of(results: Results, axis: Axis) -> list[str]:
    """What is measured on an axis: memorized share and similarity to the training image; of neighbours alignment."""
    if axis == "neighbour":
        return [key for family, key in results.leading.items() if family == "alignment"]
    return [keys[0] for role in ("memorization_rate", "training_similarity") if (keys := results.keys_of(role))]


def axes_of(results: Results) -> list[AxisRow]:
    """A row for each axis and cell that has its variants; none where the run has no variants.

    A prompt counts once, with the mean over its variants. Tests are corrected over the rows of an axis.
    """
    rows = []
    for axis in get_args(Axis):
        keys = measures_of(results, axis)
        cells = [cell for cell in results.cells if cell.count(axis)]
        found = [row for cell in cells if (row := _row(results, cell, axis, keys)).values]
        for key in keys:
            found = _corrected(found, key, "gap")
            found = _corrected(found, key, "change")
        rows += found
    return rows


def _row(results: Results, cell: CellResults, axis: Axis, keys: Sequence[str]) -> AxisRow:
    variants = {p.id: str(p.variant_of) for p in cell.prompts if p.axis == axis}
    unmitigated = next((other for other in results.cells if other.name == cell.summary.unmitigated), None)
    values = {}
    for key in keys:
        own = _by_original(cell, key, variants)
        if not own:
            continue
        every = cell.prompt_means(key, ["all"])
        originals = {prompt: every[prompt] for prompt in own if prompt in every and axis != "neighbour"}
        before = _by_original(unmitigated, key, variants) if unmitigated else {}
        values[key] = AxisValue(
            variant=_aggregate(own),
            original=_aggregate(originals) if originals else None,
            before=_aggregate(before) if before else None,
            gap=_difference(own, originals),
            change=_difference(own, before),
        )
    return AxisRow(
        cell=cell.name,
        label=cell.label,
        axis=axis,
        originals=len(set(variants.values())),
        variants=len(variants),
        values=values,
    )


def _by_original(cell: CellResults, key: str, variants: Mapping[str, str]) -> dict[str, float]:
    """The mean over the variants of each prompt."""
    of_prompt: dict[str, list[float]] = {}
    for variant, mean in cell.prompt_means(key, ["all"]).items():
        if variant in variants:
            of_prompt.setdefault(variants[variant], []).append(mean)
    return {prompt: fmean(means) for prompt, means in of_prompt.items()}


def _aggregate(means: Mapping[str, float]) -> Aggregate:
    low, high = bootstrap_interval(np.array([*means.values()]))
    return Aggregate(mean=fmean(means.values()), low=low, high=high, prompts=len(means))


def _difference(own: Mapping[str, float], other: Mapping[str, float]) -> Paired | None:
    both = [own[prompt] - other[prompt] for prompt in own if prompt in other]
    return paired(np.array(both)) if both else None


def _corrected(rows: Sequence[AxisRow], key: str, field: Literal["gap", "change"]) -> list[AxisRow]:
    """The rows with p of one of their tests corrected over all of them."""
    tests = {row.cell: test for row in rows if key in row.values and (test := getattr(row.values[key], field))}
    corrected = holm({cell: test.p for cell, test in tests.items()})
    done = []
    for row in rows:
        if row.cell in tests:
            test = tests[row.cell].model_copy(update={"p_holm": corrected[row.cell]})
            value = row.values[key].model_copy(update={field: test})
            row = row.model_copy(update={"values": {**row.values, key: value}})
        done.append(row)
    return done
