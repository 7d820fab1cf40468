"""Heat maps against masks, by hand and against plain counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_bench.metrics.regions import (
    THRESHOLDS,
    Counts,
    average_precision,
    enlarged,
    masked_distance,
    span,
    split_iou,
)

ROW = np.array([[0.0, 1.0, 1.0, 1.0, 0.0]])


def test_overlap_by_hand() -> None:
    """Marked {1, 2, 3}, memorized {2, 3, 4}: two of four; the rest {0, 4} and {0, 1} share one of three."""
    counts = Counts.of(ROW, np.array([[False, False, True, True, True]]))
    assert counts.iou[50] == 2 / 4
    assert counts.rest_iou[50] == 1 / 3
    assert counts.share == counts.iou[0] == 3 / 5  # below the lowest value everything is marked
    assert counts.rest_iou[0] == 0
    assert counts.iou[100] == 0  # nothing is above the largest value
    assert counts.best == 0


def test_nothing_marked_of_nothing_memorized_is_right() -> None:
    nothing = Counts.of(np.zeros((1, 5)), np.zeros((1, 5), np.bool_))
    assert (nothing.iou[1], nothing.rest_iou[1], nothing.iou[0]) == (1, 1, 0)


@given(st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=20))
def test_counts_are_those_of_marking_at_each_threshold(pixels: list[tuple[int, bool]]) -> None:
    heat = np.array([[value / 100 for value, _ in pixels]])
    truth = np.array([[own for _, own in pixels]])
    counts = Counts.of(heat, truth)
    for at, threshold in enumerate(THRESHOLDS):
        marked = heat > threshold
        assert counts.memorized[at] == (marked & truth).sum()
        assert counts.other[at] == (marked & ~truth).sum()


def test_each_half_is_marked_at_the_threshold_of_the_other() -> None:
    """Right of the first prompt is all above 0, of the second what is above 0.5."""
    first = Counts.of(np.array([[0.0, 0.3, 0.3, 0.3]]), np.array([[False, True, True, True]]))
    second = Counts.of(np.array([[0.0, 0.5, 0.5, 1.0]]), np.array([[False, False, False, True]]))
    assert (first.iou.max(), second.iou.max()) == (1, 1)
    assert THRESHOLDS[first.best] < 0.01
    assert 0.49 < THRESHOLDS[second.best] < 0.52
    # Of the first nothing of 3 is marked, of the second 3 where 1 is right.
    assert split_iou([[first], [second]]) == 1 / (3 + 3)
    assert split_iou([[first], [first], [first]]) == 1
    assert split_iou([[first], []]) is None


def test_average_precision_by_hand() -> None:
    """Hits at ranks 1, 3 and 4: (1 + 2/3 + 3/4) / 3; values may be of any size, and equal ones share a rank."""
    truth = np.array([[True, False], [True, True]])
    assert average_precision(np.array([[9e5, 20.0], [3.0, -1.0]]), truth) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert average_precision(np.ones((2, 2)), truth) == 3 / 4


def test_maps_are_enlarged_between_their_values_and_share_a_scale() -> None:
    heat = torch.tensor([[[0.0, math.e - 1]], [[3.0, 3.0]]])
    maps = enlarged(heat, (2, 4))
    assert maps.shape == (2, 2, 4)
    np.testing.assert_allclose(np.expm1(maps[0]) / (math.e - 1), [[0, 0.25, 0.75, 1]] * 2, atol=1e-12)
    np.testing.assert_allclose(maps[1], math.log(4))
    assert span(maps) == pytest.approx((0, math.log(4)))


def test_distance_is_that_within_the_mask_to_the_nearest() -> None:
    image = torch.zeros(3, 1, 2)
    references = torch.tensor([[[0.3, 9.0]], [[0.5, 0.0]]])[:, None].expand(2, 3, 1, 2)
    assert masked_distance(image, references, np.array([[True, False]])) == pytest.approx(0.3)
    assert masked_distance(image, references, np.array([[True, True]])) == pytest.approx(math.sqrt(0.125))
