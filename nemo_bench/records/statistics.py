"""From scores in records to the numbers of a table."""

from __future__ import annotations

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
    "all": "every group",
}
"""Groups of prompts in tables, and what they are."""
RESAMPLES = 2000
FLIPS = 10000
"""Sign patterns that a permutation test draws where there are too many to take all."""
ALL_FLIPS = 13
"""Numbers of prompts up to which it takes all."""
TOGETHER = 1 << 20
"""Values drawn at a time."""
TOP = 3
ABOVE = 0.5
"""Images, and similarity, of the numbers that MemBench gives."""

_K = TypeVar("_K", bound=Hashable)
Scores = dict[str, dict[str, list[float]]]
"""Values by metric and prompt."""


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
    by_metric = _scores(lines)
    differences = _differences(lines, unmitigated)
    table: dict[str, dict[str, Aggregate]] = {}
    for (group, members), (metric, by_prompt) in product(_groups(prompts).items(), by_metric.items()):
        scores = [by_prompt[i] for i in members if i in by_prompt]
        if scores:
            changes = [np.mean(differences[metric][i]) for i in members if i in differences.get(metric, {})]
            test = paired(np.array(changes)) if changes else None
            table.setdefault(group, {})[metric] = _summary(scores, test)
    return table


def _groups(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    return {group: [p.id for p in prompts if group in ("all", p.group)] for group in GROUPS}


def _scores(records: Iterable[ScoreRecord]) -> Scores:
    values: Scores = {}
    for record in records:
        for metric, value in record.scores.items():
            values.setdefault(metric, {}).setdefault(record.prompt, []).append(value)
    return values


def _differences(records: Iterable[ScoreRecord], unmitigated: Iterable[ScoreRecord]) -> Scores:
    """Scores minus those of the same prompt and seed, for what both have."""
    others = {(record.prompt, record.seed): record.scores for record in unmitigated}
    values: Scores = {}
    for record in records:
        other = others.get((record.prompt, record.seed), {})
        for metric in record.scores.keys() & other.keys():
            difference = record.scores[metric] - other[metric]
            values.setdefault(metric, {}).setdefault(record.prompt, []).append(difference)
    return values


def _summary(scores: Sequence[Sequence[float]], change: Paired | None) -> Aggregate:
    means = np.array([np.mean(s) for s in scores])
    medians = np.array([np.median(s) for s in scores])
    low, high = bootstrap_interval(means)
    median, mad = _median(medians)
    mean = float(means.mean())
    return Aggregate(mean=mean, low=low, high=high, median=median, mad=mad, prompts=len(scores), paired=change)


def _median(values: NDArray[Any]) -> tuple[float, float]:
    median = float(np.median(values))
    return median, float(np.median(np.abs(values - median)))


def bootstrap_interval(values: NDArray[Any], level: float = 0.95, *, of_median: bool = False) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean; the same values always give the same interval.

    Args:
        values: One value a prompt, (N,).
        level: Share of the resampled means inside.
        of_median: Take the median in place of the mean.

    Returns:
        Lower and upper end.
    """
    random, statistic = np.random.default_rng(0), np.median if of_median else np.mean
    rows = (random.integers(len(values), size=(part, len(values))) for part in _parts(RESAMPLES, len(values)))
    drawn = np.concatenate([statistic(values[some], axis=1) for some in rows])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _parts(rows: int, columns: int) -> Iterator[int]:
    """Numbers of rows that are drawn together, so that memory does not grow with the number of prompts."""
    size = max(1, TOGETHER // columns)
    yield from (min(size, rows - start) for start in range(0, rows, size))


def paired(differences: NDArray[Any]) -> Paired:
    """Tests whether a method changes a metric: a sign-flip permutation test over prompts.

    If the method changed nothing, the sign of each prompt's difference would be a matter of chance; p is the share of
    sign patterns whose mean difference is at least as far from 0 as the one found. All patterns are taken where they
    are few, else some are drawn, the same every time, and the one found counts as drawn too.

    Args:
        differences: Score with the method minus score without mitigation, each prompt's mean over seeds, (N,).

    Returns:
        The mean difference, with its interval over prompts and p.
    """
    count = len(differences)
    if count <= ALL_FLIPS:
        signs, drawn = iter([np.array(list(product((1.0, -1.0), repeat=count)))]), 0
    else:
        random, drawn = np.random.default_rng(0), 1
        signs = (random.choice((1.0, -1.0), size=(part, count)) for part in _parts(FLIPS, count))
    means = np.concatenate([np.abs(some @ differences) / count for some in signs])
    extreme = int((means >= abs(differences.mean()) * (1 - 1e-9)).sum())
    low, high = bootstrap_interval(differences)
    p = (extreme + drawn) / (len(means) + drawn)
    return Paired(difference=float(differences.mean()), low=low, high=high, p=p, prompts=count)


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
            ("max", np.max),
            (f"top {TOP}", lambda values: np.sort(values)[-TOP:].mean()),
            (f"above {ABOVE}", lambda values: np.mean(np.array(values) > ABOVE)),
        )
    }
    found = {
        "nemo": Preset(
            title="Finding NeMo",
            definition="median over the images of a prompt, then median ± median absolute deviation over prompts; "
            "verbatim and template prompts apart",
            citation="Hintersdorf et al. 2024, section 4",
            rows=_rows({key: _reduce(scores[key], np.median) for key in medians}, apart, of_median=True),
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
            rows=_rows({key: _reduce(scores[key], np.mean) for key in (*of_training, *aligned)}, groups),
        ),
    }
    return {name: preset for name, preset in found.items() if preset.rows}


def _reduce(by_prompt: Mapping[str, Sequence[float]], statistic: Callable[..., Any]) -> dict[str, float]:
    return {prompt: float(statistic(values)) for prompt, values in by_prompt.items()}


def _rows(
    columns: Mapping[str, Mapping[str, float]], groups: Mapping[str, Sequence[str]], *, of_median: bool = False
) -> dict[str, dict[str, Statistic]]:
    rows: dict[str, dict[str, Statistic]] = {}
    for group, members in groups.items():
        for key, by_prompt in columns.items():
            values = np.array([by_prompt[i] for i in members if i in by_prompt])
            if len(values):
                low, high = bootstrap_interval(values, of_median=of_median)
                value, spread = _median(values) if of_median else (float(values.mean()), None)
                entry = Statistic(value=value, low=low, high=high, spread=spread, prompts=len(values))
                rows.setdefault(group, {})[key] = entry
    return rows
