"""Similarities and the nearest of many pictures, against all pairs compared by torchmetrics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from nemo_bench.metrics import SSIM, ssim
from nemo_bench.metrics.ssim import BLOCK, Local, SSIMPool, block_statistics, bound


def scenes(count: int, seed: int, height: int, width: int) -> Tensor:
    """Pictures that are plain, smooth, noisy and, from the fourth on, noisy copies of one another."""
    numbers = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for number in range(count):
        noise = torch.rand(3, height, width, generator=numbers)
        share = torch.rand(1, generator=numbers)
        coarse = torch.rand(1, 3, 3, 3, generator=numbers)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)
        kinds = (noise[:, :1, :1].expand_as(noise), smooth, noise, None)
        base = kinds[number % 4]
        made.append(share * noise + (1 - share) * made[-2] if base is None else base)
    return torch.stack(made)


def all_pairs(images: Tensor, pictures: Tensor) -> Tensor:
    """Similarities by torchmetrics, (N, M), in double precision."""
    a, b = images.double().repeat_interleave(len(pictures), 0), pictures.double().repeat(len(images), 1, 1, 1)
    values = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.reshape(len(images), len(pictures)).float()


ROUNDING = ssim.SLACK
"""In a plain picture float32 means err by 1e-7, the same everywhere, and that is divided by C2; torchmetrics' too."""


CASES = st.tuples(st.integers(0, 10**6), st.integers(12, 30), st.integers(12, 30))


@given(CASES, st.integers(1, 9), st.integers(1, 3), st.integers(1, 20_000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_nearest_picture_and_its_similarity_equal_brute_force(
    case: tuple[int, int, int], count: int, copies: int, values: int, given_some: bool
) -> None:
    pictures = scenes(count, *case)
    images = torch.cat([scenes(4, case[0] + 1, *case[1:]), (pictures[:copies] + 0.05).clamp(max=1)])
    expected = all_pairs(images, pictures)
    known = None
    if given_some:
        known = expected.where(torch.rand(expected.shape, generator=torch.Generator().manual_seed(0)) < 0.3, torch.nan)
    similarity, number = SSIMPool(pictures, values).nearest(images, known)
    torch.testing.assert_close(similarity, expected.amax(1), atol=ROUNDING, rtol=0)
    of_found = expected.gather(1, number[:, None])[:, 0]
    torch.testing.assert_close(of_found, expected.amax(1), atol=ROUNDING, rtol=0)
    if known is None:
        torch.testing.assert_close(similarity, SSIM().compare(images, pictures).amax(1), atol=1e-6, rtol=0)


@given(CASES)
@settings(max_examples=15, deadline=None)
def test_no_block_is_more_similar_than_its_bound(case: tuple[int, int, int]) -> None:
    pictures = scenes(8, *case)
    height, width = case[1:]
    images, others = Local.from_pictures(pictures), block_statistics(Local.from_pictures(pictures))
    for number, statistics in enumerate(others):
        bounds = bound(statistics, others)
        for top in range(0, height, BLOCK):
            # A picture of one block of rows: the bounds of those rows, weighed by their widths, are above its mean.
            rows = slice(top, min(top + BLOCK, height))
            means = ssim.ssim(images.part(torch.tensor([number]), rows), images.part(torch.arange(8), rows))
            widths = torch.tensor([min(BLOCK, width - left) for left in range(0, width, BLOCK)]) / width
            above = (bounds[:, :, top // BLOCK] @ widths).mean(1) - means
            assert above.min() > -ssim.SLACK / 2


def test_hopeless_pictures_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = scenes(40, 0, 64, 64)
    images = (pictures[[2, 6, 10]] + 0.01).clamp(max=1)
    compared = 0

    def counted(a: Local, b: Local) -> Tensor:
        nonlocal compared
        compared += len(a.mean)
        return plain(a, b)

    plain = ssim.ssim
    monkeypatch.setattr(ssim, "ssim", counted)
    pool = SSIMPool(pictures, 64 * 64 * 3)
    assert pool.nearest(images)[1].tolist() == [2, 6, 10]
    assert compared < 12
    compared = 0
    known = torch.full((3, 40), torch.nan)
    known[range(3), [2, 6, 10]] = 0.9999
    similarity, number = pool.nearest(images, known)
    assert similarity.tolist() == pytest.approx([0.9999] * 3)
    assert number.tolist() == [2, 6, 10]
    assert compared == 0
