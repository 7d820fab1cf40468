"""Diversity and the Vendi score, by hand and by numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from all_metrics import CLIP
from nemo_bench.metrics import SSIM, Diversity, PixelDistance, Vendi

Rows = list[tuple[float, ...]]


@pytest.mark.parametrize(
    ("rows", "mean", "median"),
    [
        ([(1.0, 0.0), (1.0, 0.0), (1.0, 0.0)], [0.0], [0.0]),
        ([(1.0, 0.0), (-1.0, 0.0)], [2.0], [2.0]),
        ([(1.0, 0.0), (0.0, 1.0), (5.0, 0.0)], [2 / 3], [1.0]),
        ([(1.0, 0.0), (3.0, 4.0)], [0.4], [0.4]),
        ([(1.0, 0.0)], [], []),
    ],
)
def test_diversity_is_one_minus_the_cosine_of_pairs(rows: Rows, mean: list[float], median: list[float]) -> None:
    images = torch.tensor(rows)
    assert Diversity(CLIP).score(images).tolist() == pytest.approx(mean, abs=1e-6)
    assert Diversity(CLIP, "median").score(images).tolist() == pytest.approx(median, abs=1e-6)


def test_diversity_by_a_distance_is_the_distance() -> None:
    shades = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 8, 8)
    metric = Diversity(PixelDistance())
    assert metric.score(shades).item() == pytest.approx(2 / 3)
    assert (metric.lower, metric.upper) == (0, 1)
    assert (Diversity(SSIM()).lower, Diversity(SSIM()).upper) == (0, 2)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1.0, 0.0, 0.0)] * 4, 1.0),
        ([(2.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 9.0)], 3.0),
        ([(1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 0.0)], 2.0),
        ([(1.0, 0.0, 0.0)], 1.0),
    ],
)
def test_the_vendi_score_counts_different_images(rows: Rows, expected: float) -> None:
    assert Vendi(CLIP).score(torch.tensor(rows)).item() == pytest.approx(expected, abs=1e-6)


def test_the_vendi_score_follows_its_definition() -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    vectors = rows.double().numpy()
    kernel = vectors @ vectors.T / np.outer(np.linalg.norm(vectors, axis=1), np.linalg.norm(vectors, axis=1))
    shares = np.linalg.svd(kernel / 6, compute_uv=False)
    shares = shares[shares > 1e-12]
    assert Vendi(CLIP).score(rows).item() == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
