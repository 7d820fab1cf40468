"""The numbers of a table in the plain way: every interval and every test draws for itself, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_bench.records.data import Prompt
from nemo_bench.records.schema import Aggregate, Paired, ScoreRecord, Statistic
from nemo_bench.records.statistics import ALL_FLIPS, FLIPS, GROUPS, RESAMPLES

Scores = dict[str, dict[str, list[float]]]


def parts(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Shapes of what is drawn, some megabytes at a time."""
    size = max(1, 2**20 // columns)
    return ((min(size, rows - start), columns) for start in range(0, rows, size))


def interval(values: NDArray[Any], statistic: Callable[..., Any] = np.mean) -> tuple[float, float]:
    """Percentile bootstrap interval of one column."""
    random, count = np.random.default_rng(0), len(values)
    drawn = [statistic(values[random.integers(count, size=shape)], axis=1) for shape in parts(RESAMPLES, count)]
    low, high = np.quantile(np.concatenate(drawn), [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return float(low), float(high)


def test_of(differences: NDArray[Any]) -> Paired:
    """Sign-flip permutation test of one column."""
    random, count = np.random.default_rng(0), len(differences)
    drawn = int(count > ALL_FLIPS)
    if drawn:
        patterns = (random.choice((1.0, -1.0), size=shape) for shape in parts(FLIPS, count))
    else:
        patterns = iter([np.array(list(product((1.0, -1.0), repeat=count)))])
    means = np.concatenate([np.abs(signs @ differences) / count for signs in patterns])
    extreme = int((means >= abs(differences.mean()) * (1 - 1e-9)).sum())
    low, high = interval(differences)
    p = (extreme + drawn) / (len(means) + drawn)
    return Paired(difference=float(differences.mean()), low=low, high=high, p=p, prompts=count)


test_of.__test__ = False  # type: ignore[attr-defined] # a permutation test, none of pytest's


def scores_of(records: Iterable[ScoreRecord], others: Iterable[ScoreRecord] | None = None) -> Scores:
    """Values by metric and prompt, less those of other records of the same prompts and seeds where given."""
    before = {(record.prompt, record.seed): record.scores for record in others or ()}
    found: Scores = {}
    for record in records:
        subtracted = before.get((record.prompt, record.seed), {})
        for metric, value in record.scores.items():
            if others is None or metric in subtracted:
                found.setdefault(metric, {}).setdefault(record.prompt, []).append(value - subtracted.get(metric, 0.0))
    return found


def groups_of(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """Ids of prompts by group of a table."""
    return {group: [prompt.id for prompt in prompts if group in ("all", prompt.group)] for group in GROUPS}


def aggregate(
    records: Sequence[ScoreRecord], prompts: Sequence[Prompt], unmitigated: Sequence[ScoreRecord]
) -> dict[str, dict[str, Aggregate]]:
    """What :func:`nemo_bench.records.statistics.aggregate` gives."""
    differences = scores_of(records, unmitigated)
    table: dict[str, dict[str, Aggregate]] = {}
    for (group, members), (metric, by_prompt) in product(groups_of(prompts).items(), scores_of(records).items()):
        scores = [by_prompt[i] for i in members if i in by_prompt]
        if not scores:
            continue
        changes = [np.mean(differences[metric][i]) for i in members if i in differences.get(metric, {})]
        means = np.array([np.mean(values) for values in scores])
        medians = np.array([np.median(values) for values in scores])
        low, high = interval(means)
        table.setdefault(group, {})[metric] = Aggregate(
            mean=float(means.mean()),
            low=low,
            high=high,
            median=float(np.median(medians)),
            mad=float(np.median(np.abs(medians - np.median(medians)))),
            prompts=len(scores),
            paired=test_of(np.array(changes)) if changes else None,
        )
    return table


def presets(
    records: Sequence[ScoreRecord], prompts: Sequence[Prompt], of_training: Sequence[str], aligned: Sequence[str]
) -> dict[str, dict[str, dict[str, Statistic]]]:
    """The rows that :func:`nemo_bench.records.statistics.presets` gives, where every metric is in that of NeMo.

    Args:
        records: Scores.
        prompts: Their prompts.
        of_training: Metrics that compare images with training images, larger for more alike.
        aligned: Metrics of alignment.
    """
    scores, groups = scores_of(records), groups_of(prompts)
    apart = {group: members for group, members in groups.items() if group != "all"}
    membench: Mapping[str, Callable[[list[float]], Any]] = {
        "max": max,
        "top 3": lambda values: np.mean(sorted(values)[-3:]),
        "above 0.5": lambda values: np.mean([value > 0.5 for value in values]),
    }
    return {
        "nemo": _rows({key: (scores[key], np.median) for key in scores}, apart, np.median),
        "membench": _rows(
            {f"{key}, {name}": (scores[key], reduce) for key, (name, reduce) in product(of_training, membench.items())},
            groups,
        ),
        "wen": _rows({key: (scores[key], np.mean) for key in (*of_training, *aligned)}, groups),
    }


def _rows(
    columns: Mapping[str, tuple[Mapping[str, list[float]], Callable[[list[float]], Any]]],
    groups: Mapping[str, Sequence[str]],
    statistic: Callable[..., Any] = np.mean,
) -> dict[str, dict[str, Statistic]]:
    rows: dict[str, dict[str, Statistic]] = {}
    for (group, members), (key, (by_prompt, reduce)) in product(groups.items(), columns.items()):
        values = np.array([reduce(by_prompt[i]) for i in members if i in by_prompt])
        if len(values):
            value, (low, high) = float(statistic(values)), interval(values, statistic)
            spread = float(np.median(np.abs(values - value))) if statistic is np.median else None
            found = Statistic(value=value, low=low, high=high, spread=spread, prompts=len(values))
            rows.setdefault(group, {})[key] = found
    return rows
