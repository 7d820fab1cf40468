"""From scores in records to the numbers of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nemo_bench.types import GENERAL, Prompt, Record

GROUPS = {"VM": "verbatim", "TM": "template", GENERAL: "not memorized", "all": "every group"}
"""Groups of prompts in tables, and what they are."""
RESAMPLES = 2000


def aggregate(records: Iterable[Record], prompts: Sequence[Prompt]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean with a bootstrap interval, and median with median absolute deviation, over prompts.

    A prompt counts once however many images it has: with the mean of its scores for the mean, with their median for
    the median (Hintersdorf et al. 2024, section 4).

    Args:
        records: Lines of the score stage.
        prompts: The prompts they belong to.

    Returns:
        By group (VM, TM, general, all) and metric: mean, low, high (95% interval over prompts), median, mad, prompts.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for metric, value in record["scores"].items():
            values.setdefault(metric, {}).setdefault(record["prompt"], []).append(value)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for group in GROUPS:
        members = [p.id for p in prompts if group in ("all", p.group)]
        row = {}
        for metric, by_prompt in values.items():
            scores = [by_prompt[i] for i in members if i in by_prompt]
            if scores:
                row[metric] = _summary(scores)
        if row:
            table[group] = row
    return table


def _summary(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    means = np.array([np.mean(s) for s in scores])
    medians = np.array([np.median(s) for s in scores])
    low, high = bootstrap_interval(means)
    median = float(np.median(medians))
    return {
        "mean": float(means.mean()),
        "low": low,
        "high": high,
        "median": median,
        "mad": float(np.median(np.abs(medians - median))),
        "prompts": len(scores),
    }


def bootstrap_interval(values: np.ndarray[Any, Any], level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean; the same values always give the same interval.

    Args:
        values: One value a prompt, (N,).
        level: Share of the resampled means inside.

    Returns:
        Lower and upper end.
    """
    rows = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[rows].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
