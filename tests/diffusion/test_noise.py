"""Results computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_bench.diffusion.noise import (
    end_attention,
    masked_magnitude,
    mean_cosine,
    norms,
    score_difference,
    tiled_distance,
    unit,
)


def test_norms_are_of_rows() -> None:
    assert norms(torch.tensor([[[3.0], [4.0]], [[0.0], [2.0]]])).tolist() == [5.0, 2.0]


def test_units_have_length_one_and_zeros_stay() -> None:
    torch.testing.assert_close(unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_a_masked_magnitude_is_worked_out_by_hand() -> None:
    # Two channels, two positions; the mask leaves half of the first: sqrt(1.5^2 + 2^2) / 0.25.
    added = torch.tensor([[[[3.0, 7.0]], [[4.0, 9.0]]]])
    assert float(masked_magnitude(added, torch.tensor([[[0.5, 0.0]]]))) == pytest.approx(10)
    # A mask that is even everywhere changes nothing, whatever its height; each row has a mean of its own.
    masks = torch.tensor([[[0.2, 0.2]], [[0.0, 1.0]]])
    both = masked_magnitude(added.repeat(2, 1, 1, 1), masks).tolist()
    assert both == pytest.approx([float(added.norm()), 2 * math.hypot(7, 9)])


def test_an_angle_is_taken_over_channels_and_averaged_over_positions() -> None:
    one = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])
    other = torch.tensor([[[[1.0, 3.0]], [[1.0, -4.0]]]])
    assert float(mean_cosine(one, other)) == pytest.approx((math.sqrt(0.5) - 0.8) / 2)


def test_attention_to_the_end_is_that_of_each_prompts_last_token() -> None:
    # Two layers, two images, positions of a latent of 1 by 2, three tokens; the first prompt has only begin and end.
    one = torch.tensor([[[0.1, 0.2, 0.7], [0.3, 0.4, 0.3]]] * 2)
    other = torch.tensor([[[0.1, 0.6, 0.3], [0.0, 0.0, 1.0]]] * 2)
    found = end_attention([one, other], [2, 3], (1, 2))
    torch.testing.assert_close(found, torch.tensor([[[0.4, 0.2]], [[0.5, 0.65]]]))


def test_scores_differ_by_the_noise_over_its_level() -> None:
    assert score_difference(torch.tensor([3.0]), 0.5).tolist() == [-6.0]


def test_tiled_distance_is_that_of_the_worst_tile() -> None:
    a, b = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    b[0, :, 2:4, 4:6] = 0.5  # one whole tile of 4x4 tiles
    b[0, 0, 0, 0] = 1.0  # a twelfth of another: root of 1/12
    assert tiled_distance(a, b, 4).tolist() == pytest.approx([0.5])
    assert tiled_distance(a, b, 1).tolist() == pytest.approx([math.sqrt((0.25 * 12 + 1) / 192)])
