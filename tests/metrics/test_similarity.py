"""Similarities to training images and to unmitigated images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from all_metrics import CLIP, PIXELS, pictures, unit
from nemo_bench.metrics import Change, ImageSpace, MemorizationRate, NearestTrainingImage, PixelDistance, TrainingImage


@pytest.mark.parametrize("space", PIXELS, ids=lambda s: s.title)
def test_images_are_compared_with_their_most_similar_training_image(space: ImageSpace) -> None:
    images, references, pool = pictures(3, 1), pictures(2, 2), pictures(5, 3)
    better = torch.amin if space.is_distance else torch.amax
    for metric, name, others in (
        (TrainingImage(space), "references", references),
        (NearestTrainingImage(space), "pool", pool),
    ):
        values = metric.score(**{"images": images, name: others})
        torch.testing.assert_close(values, better(space.compare(images, others), 1))
        assert metric.higher_is_better is space.is_distance
    images[1] = references[0]
    assert TrainingImage(space).score(images, references)[1].item() == pytest.approx(1 - space.is_distance, abs=1e-5)


@pytest.mark.parametrize("space", PIXELS, ids=lambda s: s.title)
def test_change_compares_images_of_the_same_seed(space: ImageSpace) -> None:
    images = pictures(3, 1)
    swapped = images[[1, 0, 2]]
    values = Change(space).score(images, swapped)
    same = 1 - float(space.is_distance)
    assert values[2].item() == pytest.approx(same, abs=1e-5)
    assert abs(values[0].item() - same) > 0.1
    torch.testing.assert_close(values, space.compare(images, swapped).diagonal())


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=4), st.integers(-3, 3))
def test_rate_of_a_distance_counts_values_below_the_threshold(values: list[int], threshold: int) -> None:
    # A picture of one shade has a distance of its shade to black.
    images = torch.stack([torch.full((3, 4, 4), (value + 4) / 8) for value in values])
    limit = (threshold + 4) / 8
    rate = MemorizationRate(PixelDistance(), limit).score(images, torch.zeros(1, 3, 4, 4))
    assert rate.tolist() == [float(value < threshold) for value in values]
    assert MemorizationRate(PixelDistance(), limit).higher_is_better is False


def test_rate_of_a_similarity_counts_values_above_the_threshold() -> None:
    rows = unit((1.0, 0.0), (0.6, 0.8), (0.0, 1.0))
    rate = MemorizationRate(CLIP, 0.5)
    assert rate.score(rows, rows[:1]).tolist() == [1, 1, 0]
    assert rate.title == "Memorized (CLIP > 0.5)"
    assert MemorizationRate(PixelDistance(), 0.15).title == "Memorized (Pixel distance < 0.15)"
