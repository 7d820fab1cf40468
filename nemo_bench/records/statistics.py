"""From scores in records to the numbers of a table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemo_bench.records.data import GENERAL, Prompt
from nemo_bench.records.schema import Aggregate, MetricInfo, Paired, Preset, ScoreRecord, Statistic

GROUPS = {
    "VM": "verbatim",
    "TM": "template",
    "memorized": "in which way is not annotated",
    GENERAL: "not memorized",
    "rewording": "memorized prompts in nearly the same words",
    "paraphrase": "memorized prompts in other words",
    "translation": "memorized prompts in another language",
    "neighbour": "general prompts that resemble a memorized one",
    "all": "every group",
}
"""Groups of prompts in tables, and what they are."""
RESAMPLES = 2000
FLIPS = 10000
"""Sign patterns that a permutation test draws where there are too many to take all."""
ALL_FLIPS = 13
"""Numbers of prompts up to which it takes all."""
TOGETHER = 1 << 16
"""Values drawn at a time, few enough to stay in a processor's cache."""
DEVIATIONS = 8
"""Standard deviations around the middle in which the median of a resample is looked for first."""
TOP = 3
ABOVE = 0.5
"""Images, and similarity, of the numbers that MemBench gives."""

_K = TypeVar("_K", bound=Hashable)
Scores = dict[str, dict[str, list[float]]]
"""Values by metric and prompt."""
Statistics = Callable[[NDArray[Any]], NDArray[Any]]
"""Reduces rows, (prompts, values), to a number each."""


def aggregate(
    records: Iterable[ScoreRecord], prompts: Sequence[Prompt], unmitigated: Iterable[ScoreRecord] = ()
) -> dict[str, dict[str, Aggregate]]:
    """Mean with a bootstrap interval, and median with median absolute deviation, over prompts.

    A prompt counts once however many images it has: with the mean of its scores for the mean, with their median for
    the median (Hintersdorf et al. 2024, section 4).

    Args:
        records: Of the score stage.
        prompts: The prompts they belong to.
        unmitigated: Records of the same prompts and seeds without mitigation.

    Returns:
        By group of :data:`GROUPS` and metric.
    """
    lines = list(records)
    groups, scores = _groups(prompts), _scores(lines)
    means, medians = (_columns(_reduced(scores, statistic), groups) for statistic in (_mean, _median_of_row))
    tests = paired_tests(_columns(_reduced(_differences(lines, unmitigated), _mean), groups))
    intervals = bootstrap_intervals(means)
    table: dict[str, dict[str, Aggregate]] = {}
    for (group, metric), values in means.items():
        low, high = intervals[group, metric]
        median, mad = _median(medians[group, metric])
        table.setdefault(group, {})[metric] = Aggregate(
            mean=float(values.mean()),
            low=low,
            high=high,
            median=median,
            mad=mad,
            prompts=len(values),
            paired=tests.get((group, metric)),
        )
    return table


def _groups(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    return {group: [p.id for p in prompts if group in ("all", p.group)] for group in GROUPS}


def _scores(records: Iterable[ScoreRecord]) -> Scores:
    values: Scores = defaultdict(lambda: defaultdict(list))
    for record in records:
        for metric, value in record.scores.items():
            values[metric][record.prompt].append(value)
    return values


def _differences(records: Iterable[ScoreRecord], unmitigated: Iterable[ScoreRecord]) -> Scores:
    """Scores minus those of the same prompt and seed, for what both have."""
    others = {(record.prompt, record.seed): record.scores for record in unmitigated}
    values: Scores = defaultdict(lambda: defaultdict(list))
    for record in records:
        other = others.get((record.prompt, record.seed), {})
        for metric, value in record.scores.items():
            if metric in other:
                values[metric][record.prompt].append(value - other[metric])
    return values


def _mean(rows: NDArray[Any]) -> NDArray[Any]:
    return np.mean(rows, axis=-1)


def _median_of_row(rows: NDArray[Any]) -> NDArray[Any]:
    return np.median(rows, axis=-1)


def _reduced(scores: Scores, statistic: Statistics) -> dict[str, dict[str, float]]:
    """A number a prompt, by metric."""
    return {metric: _reduce(by_prompt, statistic) for metric, by_prompt in scores.items()}


def _reduce(by_prompt: Mapping[str, Sequence[float]], statistic: Statistics) -> dict[str, float]:
    """A number a prompt; prompts with equally many values are rows of one array."""
    lengths: dict[int, list[str]] = defaultdict(list)
    for prompt, values in by_prompt.items():
        lengths[len(values)].append(prompt)
    reduced: dict[str, float] = {}
    for prompts in lengths.values():
        rows = np.array([by_prompt[prompt] for prompt in prompts])
        reduced.update(zip(prompts, statistic(rows).tolist(), strict=True))
    return reduced


def _columns(
    by_metric: Mapping[str, Mapping[str, float]], groups: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], NDArray[Any]]:
    """Numbers of the prompts that have any, (prompts,), by group and metric, without empty ones."""
    columns = {}
    for (group, members), (metric, by_prompt) in product(groups.items(), by_metric.items()):
        if values := [by_prompt[i] for i in members if i in by_prompt]:
            columns[group, metric] = np.array(values)
    return columns


def _median(values: NDArray[Any]) -> tuple[float, float]:
    median = float(np.median(values))
    return median, float(np.median(np.abs(values - median)))


def bootstrap_interval(values: NDArray[Any], level: float = 0.95, *, of_median: bool = False) -> tuple[float, float]:
    """The interval of one column; see :func:`bootstrap_intervals`."""
    return bootstrap_intervals({"": values}, level, of_median=of_median)[""]


def bootstrap_intervals(
    columns: Mapping[_K, NDArray[Any]], level: float = 0.95, *, of_median: bool = False
) -> dict[_K, tuple[float, float]]:
    """Percentile bootstrap intervals of means; the same values always give the same interval.

    What is drawn depends on the number of prompts alone, and is drawn once for all columns that have as many.

    Args:
        columns: One value a prompt, (N,); each N may be another.
        level: Share of the resampled means inside.
        of_median: Take the median in place of the mean.

    Returns:
        Lower and upper end.
    """
    resampled = _resampled_medians if of_median else _resampled_means
    intervals: dict[_K, tuple[float, float]] = {}
    for count, those in _by_length(columns).items():
        random = np.random.default_rng(0)
        rows = (random.integers(count, size=(part, count)) for part in _parts(RESAMPLES, count))
        drawn = np.concatenate(list(resampled(rows, list(those.values()))), axis=1)
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=1).tolist()
        intervals.update(zip(those, zip(low, high, strict=True), strict=True))
    return intervals


def gap_closed(on: Mapping[str, float], off: Mapping[str, float], held_out: Mapping[str, float]) -> Aggregate | None:
    """The part of the gap between two losses that a third one closes: (off - on) / (held out - on) of their means.

    Resampled together are the prompts of ``on`` and ``off``, and with them those of ``held_out`` where they are the
    same, else apart.

    Args:
        on: Loss by prompt where it is low.
        off: Loss of the same prompts where it may have risen.
        held_out: Loss by prompt that it would have without what lowers it.

    Returns:
        The part, with its 95% bootstrap interval; without the interval where the gap is not above 0 in some resample,
        and None where it is not above 0 at all.
    """
    both = [prompt for prompt in on if prompt in off]
    if not both or not held_out:
        return None
    same = all(prompt in held_out for prompt in both)
    others = both if same else [*held_out]
    low, high, top = (np.array([of[p] for p in ids]) for of, ids in ((on, both), (off, both), (held_out, others)))
    if top.mean() <= low.mean():
        return None
    random = np.random.default_rng(0)
    rows = random.integers(len(both), size=(RESAMPLES, len(both)))
    other_rows = rows if same else random.integers(len(others), size=(RESAMPLES, len(others)))
    gaps = top[other_rows].mean(1) - low[rows].mean(1)
    ends: list[float | None] = [None, None]
    if gaps.min() > 0:
        ends = np.quantile((high - low)[rows].mean(1) / gaps, [0.025, 0.975]).tolist()
    value = float((high - low).mean() / (top.mean() - low.mean()))
    return Aggregate(mean=value, low=ends[0], high=ends[1], prompts=len(both))


def _by_length(columns: Mapping[_K, NDArray[Any]]) -> dict[int, dict[_K, NDArray[Any]]]:
    lengths: dict[int, dict[_K, NDArray[Any]]] = defaultdict(dict)
    for key, values in columns.items():
        lengths[len(values)][key] = values
    return lengths


def _resampled_means(rows: Iterable[NDArray[Any]], columns: Sequence[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Means of resamples, (columns, resamples), for each of several parts that say which prompts are in each."""
    for part in rows:
        yield np.array([values.take(part).mean(axis=1) for values in columns])


def _resampled_medians(rows: Iterable[NDArray[Any]], columns: Sequence[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Medians of resamples, in the same form; how often each prompt is in them is counted once for all columns."""
    orders = [np.argsort(values) for values in columns]
    for part in rows:
        resamples, count = part.shape
        places = part + count * np.arange(resamples)[:, None]
        times = np.bincount(places.ravel(), minlength=part.size).reshape(part.shape).astype(float)
        yield np.array([_medians(times, *column) for column in zip(columns, orders, strict=True)])


def _medians(times: NDArray[Any], values: NDArray[Any], order: NDArray[Any]) -> NDArray[Any]:
    """Medians of resamples, without sorting any of them.

    Args:
        times: How often each prompt is in each resample, (resamples, N).
        values: Of the prompts, (N,).
        order: What sorts these values.
    """
    count = len(values)
    middle = (count - 1) // 2, count // 2
    margin = 1 + round(DEVIATIONS * math.sqrt(count) / 2)
    while True:
        low, high = max(0, middle[0] - margin), middle[1] + margin
        is_below = np.zeros(count)
        is_below[order[:low]] = 1
        below = times @ is_below
        reached = below[:, None] + times.take(order[low:high], axis=1).cumsum(axis=1)
        if below.max() <= middle[0] and reached[:, -1].min() > middle[1]:
            break
        margin *= 2
    lower, upper = (values[order[low + (reached <= place).sum(axis=1)]] for place in middle)
    return np.asarray((lower + upper) / 2)


def _parts(rows: int, columns: int) -> Iterator[int]:
    """Numbers of rows that are drawn together, so that memory does not grow with the number of prompts."""
    size = max(1, TOGETHER // columns)
    yield from (min(size, rows - start) for start in range(0, rows, size))


def paired(differences: NDArray[Any]) -> Paired:
    """The test of one column; see :func:`paired_tests`."""
    return paired_tests({"": differences})[""]


def paired_tests(columns: Mapping[_K, NDArray[Any]]) -> dict[_K, Paired]:
    """Tests whether a method changes metrics: a sign-flip permutation test over prompts.

    If the method changed nothing, the sign of each prompt's difference would be a matter of chance; p is the share of
    sign patterns whose mean difference is at least as far from 0 as the one found. All patterns are taken where they
    are few, else some are drawn, the same for all columns of as many prompts, and the one found counts as drawn too.

    Args:
        columns: Score with the method minus score without mitigation, each prompt's mean over seeds, (N,).

    Returns:
        The mean difference, with its interval over prompts and p.
    """
    intervals = bootstrap_intervals(columns)
    tests = {}
    for count, those in _by_length(columns).items():
        limits = {key: abs(differences.mean()) * (1 - 1e-9) for key, differences in those.items()}
        patterns, extreme = 0, dict.fromkeys(those, 0)
        for signs in _signs(count):
            patterns += len(signs)
            for key, differences in those.items():
                extreme[key] += int((np.abs(signs @ differences) / count >= limits[key]).sum())
        drawn = int(count > ALL_FLIPS)
        for key, differences in those.items():
            low, high = intervals[key]
            p = (extreme[key] + drawn) / (patterns + drawn)
            tests[key] = Paired(difference=float(differences.mean()), low=low, high=high, p=p, prompts=count)
    return tests


def _signs(count: int) -> Iterator[NDArray[Any]]:
    """Patterns of signs, (patterns, count): all where they are few, else some that are drawn."""
    if count <= ALL_FLIPS:
        yield np.array(list(product((1.0, -1.0), repeat=count)))
        return
    random, both = np.random.default_rng(0), np.array((1.0, -1.0))
    for part in _parts(FLIPS, count):
        yield both.take(random.integers(2, size=(part, count)))


def holm(ps: Mapping[_K, float]) -> dict[_K, float]:
    """Values of p corrected for testing all of them (Holm 1979).

    Example:
        >>> holm({"a": 0.01, "b": 0.03, "c": 0.04})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    corrected: dict[_K, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        largest = max(largest, min(1.0, ps[name] * (len(ps) - place)))
        corrected[name] = largest
    return corrected


def presets(
    records: Iterable[ScoreRecord], prompts: Sequence[Prompt], metrics: Mapping[str, MetricInfo]
) -> dict[str, Preset]:
    """Numbers aggregated as other papers do, from the records of the score stage.

    Returns:
        By name (nemo, membench, wen), without presets that have no rows. MemBench has three numbers a metric, such as
        ``"ssim, max"``.
    """
    scores = _scores(records)
    images = {key: about for key, about in metrics.items() if about.per == "image" and key in scores}
    of_training = [key for key, about in images.items() if about.measure == "TrainingImage"]
    similarities = [key for key in of_training if not images[key].higher_is_better]
    groups = _groups(prompts)
    apart = {group: members for group, members in groups.items() if group != "all"}
    aligned = [key for key, about in images.items() if about.family == "alignment"]
    # The paper has neither.
    medians = [key for key in scores if metrics[key].measure not in ("MemorizationRate", "NearestTrainingImage")]
    membench = {
        f"{key}, {name}": _reduce(scores[key], statistic)
        for key in similarities
        for name, statistic in (
            ("max", lambda rows: np.max(rows, axis=-1)),
            (f"top {TOP}", lambda rows: _mean(np.sort(rows, axis=-1)[:, -TOP:])),
            (f"above {ABOVE}", lambda rows: _mean(rows > ABOVE)),
        )
    }
    found = {
        "nemo": Preset(
            title="Finding NeMo",
            definition="median over the images of a prompt, then median ± median absolute deviation over prompts; "
            "verbatim and template prompts apart",
            citation="Hintersdorf et al. 2024, section 4",
            rows=_rows({key: _reduce(scores[key], _median_of_row) for key in medians}, apart, of_median=True),
        ),
        "membench": Preset(
            title="MemBench",
            definition="of the similarities of a prompt's images to their best training image: the largest; the "
            f"mean of the {TOP} largest; the share above {ABOVE}; each then the mean over prompts",
            citation="Hong et al. 2024",
            rows=_rows(membench, groups),
        ),
        "wen": Preset(
            title="Wen et al.",
            definition="each image with its best training image, mean over the images of a prompt, then mean over "
            "prompts",
            citation="Wen et al. 2024",
            rows=_rows({key: _reduce(scores[key], _mean) for key in (*of_training, *aligned)}, groups),
        ),
    }
    return {name: preset for name, preset in found.items() if preset.rows}


def _rows(
    by_metric: Mapping[str, Mapping[str, float]], groups: Mapping[str, Sequence[str]], *, of_median: bool = False
) -> dict[str, dict[str, Statistic]]:
    columns = _columns(by_metric, groups)
    intervals = bootstrap_intervals(columns, of_median=of_median)
    rows: dict[str, dict[str, Statistic]] = {}
    for (group, key), values in columns.items():
        low, high = intervals[group, key]
        value, spread = _median(values) if of_median else (float(values.mean()), None)
        entry = Statistic(value=value, low=low, high=high, spread=spread, prompts=len(values))
        rows.setdefault(group, {})[key] = entry
    return rows
