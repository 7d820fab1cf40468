"""Detection against counts by hand, for any scores."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_bench.errors import ModelError
from nemo_bench.metrics import detection
from nemo_bench.metrics.roc import best_threshold, rates

SCORES = st.lists(st.integers(-5, 5).map(lambda n: n * 1000.0), min_size=1, max_size=12)


def points(memorized: list[float], other: list[float]) -> list[tuple[float, float]]:
    """The ROC curve: the shares of other and of memorized prompts at or above every threshold, the highest first."""
    limits = [np.inf, *sorted({*memorized, *other}, reverse=True)]
    return [(float(np.mean(np.array(other) >= t)), float(np.mean(np.array(memorized) >= t))) for t in limits]


def area(curve: list[list[float]]) -> float:
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve))


@given(SCORES, SCORES)
def test_all_numbers_follow_their_definitions(memorized: list[float], other: list[float]) -> None:
    found = detection(memorized, other)
    curve = points(memorized, other)
    right = [(m > o) + 0.5 * (m == o) for m in memorized for o in other]
    assert found["auc"] == pytest.approx(np.mean(right), abs=1e-6)
    assert found["auc_low"] - 1e-9 <= np.mean(right) <= found["auc_high"] + 1e-9
    assert found["tpr_at_1_fpr_below"] == pytest.approx(max(t for f, t in curve if f < 0.01), abs=1e-6)
    nearest = min((abs(f - 0.01), f) for f, _ in curve)[1]
    assert found["tpr_at_1_fpr_nearest"] == pytest.approx(max(t for f, t in curve if f == nearest), abs=1e-6)
    assert found["best_accuracy"] == pytest.approx(max((t + 1 - f) / 2 for f, t in curve), abs=1e-6)
    total, precision = 0.0, 0.0
    for (_, before), limit in zip(curve, sorted({*memorized, *other}, reverse=True), strict=False):
        hits, flagged = sum(m >= limit for m in memorized), sum(s >= limit for s in (*memorized, *other))
        total += (hits / len(memorized) - before) * hits / flagged
        precision = hits / flagged
    assert found["average_precision"] == pytest.approx(total, abs=1e-6)
    assert 0 < precision < 1
    assert (found["memorized"], found["other"]) == (len(memorized), len(other))


@given(SCORES, SCORES)
def test_the_curve_keeps_the_area_and_only_corners(memorized: list[float], other: list[float]) -> None:
    found = detection(memorized, other)
    curve = found["curve"]
    assert (curve[0], curve[-1]) == ([0, 0], [1, 1])
    assert {(f, t) for f, t in curve} <= {(round(f, 6), round(t, 6)) for f, t in points(memorized, other)}
    assert area(curve) == pytest.approx(found["auc"], abs=1e-5)
    for a, b, c in zip(curve, curve[1:], curve[2:], strict=False):
        assert not a[0] == b[0] == c[0]
        assert not a[1] == b[1] == c[1]


def test_a_long_curve_is_thinned() -> None:
    numbers = np.random.default_rng(0)
    found = detection(numbers.normal(1, 1, 2000).tolist(), numbers.normal(0, 1, 2000).tolist())
    curve = found["curve"]
    assert (curve[0], curve[-1], len(curve)) == ([0, 0], [1, 1], 200)
    assert area(curve) == pytest.approx(found["auc"], abs=2e-3)


def test_the_two_definitions_of_the_true_positive_rate_differ() -> None:
    other = [float(n) for n in range(60)]
    # One of 60 is 1.67%: nothing but 0% is below 1%, and 1.67% is nearer to it.
    found = detection([100.0, 58.5, 57.5, 0.5], other)
    assert (found["tpr_at_1_fpr_below"], found["tpr_at_1_fpr_nearest"]) == (0.25, 0.5)


def test_a_perfect_detector_has_a_rate_of_one_except_at_the_first_of_the_nearest_points() -> None:
    found = detection([2.0, 3.0], [0.0, 1.0])
    assert (found["tpr_at_1_fpr_below"], found["tpr_at_1_fpr_nearest"], found["tpr_at_1_fpr_first"]) == (1, 1, 0)


def drawn(others: int) -> tuple[list[float], list[float]]:
    """Scores to one decimal, so that there are ties."""
    numbers = np.random.RandomState(others)
    return [np.round(numbers.normal(at, 1, n), 1).tolist() for at, n in ((1.5, 25), (0, others))]  # type: ignore[return-value]


FIRST = {40: 0.0, 60: 0.2, 100: 0.0, 150: 0.24, 250: 0.16, 500: 0.24}
"""By number of other prompts, what scikit-learn 1.9.1 gives for the scores above:
fpr, tpr, _ = roc_curve([1] * 25 + [0] * others, [*memorized, *other]); tpr[numpy.argmin(numpy.abs(fpr - 0.01))]"""


@pytest.mark.parametrize("others", FIRST)
def test_the_first_of_the_nearest_points_agrees_with_scikit_learn(others: int) -> None:
    assert detection(*drawn(others))["tpr_at_1_fpr_first"] == pytest.approx(FIRST[others], abs=1e-12)


def test_the_two_readings_of_nearest_differ_on_small_sets() -> None:
    # One of 100 is 1%: with that mistake there are two catches before one more, and the mistake comes with none.
    found = detection([9.0, 8.0, 6.0, 5.0], [7.0, *[0.0] * 99])
    assert (found["tpr_at_1_fpr_nearest"], found["tpr_at_1_fpr_first"]) == (1.0, 0.5)


@given(SCORES, st.lists(st.integers(-5, 5).map(lambda n: n * 1000.0), min_size=1, max_size=50))
def test_with_few_other_prompts_the_first_of_the_nearest_points_is_the_origin(
    memorized: list[float], other: list[float]
) -> None:
    assert detection(memorized, other)["tpr_at_1_fpr_first"] == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error(wrong: float) -> None:
    with pytest.raises(ModelError, match=r"1 of 3 scores are not finite.*model\.dtype=float32"):
        detection([1.0, wrong], [0.0])


def test_scores_far_from_zero_are_not_rounded_together() -> None:
    # torchmetrics takes such scores for logits.
    assert detection([1000.0, 1001.0], [998.0, 999.0])["auc"] == 1
    assert detection([1e-9, 2e-9], [0.0, 5e-10])["tpr_at_1_fpr_below"] == 1


def test_the_interval_agrees_with_a_bootstrap_of_prompts() -> None:
    numbers = np.random.default_rng(3)
    memorized, other = numbers.normal(1, 1, 40), numbers.normal(0, 1, 50)
    found = detection(memorized.tolist(), other.tolist())
    areas = []
    for _ in range(2000):
        m, o = numbers.choice(memorized, 40), numbers.choice(other, 50)
        areas.append((m[:, None] > o).mean() + 0.5 * (m[:, None] == o).mean())
    assert (found["auc_low"], found["auc_high"]) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=0.012)
    assert found == detection(memorized.tolist(), other.tolist())


def test_thresholds_and_rates_by_hand() -> None:
    memorized, other = [0.9, 0.5, 0.4], [0.1, 0.2, 0.45]
    # Above 0.45 to 0.5 two in three are found and nothing else; above 0.2 to 0.4 all are, and one in three others.
    assert best_threshold(memorized, other) == pytest.approx(0.475)
    assert rates(memorized, other, 0.475) == (2 / 3, 0.0)
    assert rates(memorized, other, 0.3) == (1.0, 1 / 3)
    assert rates(memorized, other, 0.45) == (2 / 3, 0.0)  # what is just at the threshold is not above it
    assert best_threshold([1.0], [2.0]) < 1  # nothing is better than calling all memorized


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=12), st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=12))
def test_no_threshold_is_better_than_the_best(memorized: list[float], other: list[float]) -> None:
    hits, mistakes = rates(memorized, other, best_threshold(memorized, other))
    gains = [t - f for f, t in points(memorized, other)]
    assert hits - mistakes == pytest.approx(max(gains))
