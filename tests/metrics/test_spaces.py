"""Comparisons of pixels against independent computations with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from all_metrics import pictures
from nemo_bench.errors import ConfigError
from nemo_bench.metrics import SSIM, ImageSpace, MultiscaleSSIM, PixelDistance, TiledDistance, spaces

CPU = torch.device("cpu")


def window(reach: int = 5, sigma: float = 1.5) -> NDArray[np.float64]:
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum())


def smoothed(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means under a Gaussian window of 11 by 11, sigma 1.5, at every pixel; the image is mirrored at its border."""
    padded = np.pad(image, ((0, 0), (5, 5), (5, 5)), mode="reflect")
    _, height, width = image.shape
    rows = sum(weight * padded[:, k : k + height] for k, weight in enumerate(window()))
    return np.asarray(sum(weight * rows[:, :, k : k + width] for k, weight in enumerate(window())))


def terms(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Luminance and contrast-structure of SSIM as Wang et al. 2004 define it, with data range 1, at every pixel."""
    mean_a, mean_b = smoothed(a), smoothed(b)
    var_a, var_b = smoothed(a * a) - mean_a**2, smoothed(b * b) - mean_b**2
    covariance = smoothed(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * covariance + c2) / (var_a + var_b + c2)


def numpy_ssim(a: Tensor, b: Tensor) -> float:
    luminance, contrast = terms(a.double().numpy(), b.double().numpy())
    return float((luminance * contrast).mean())


def numpy_ms_ssim(a: Tensor, b: Tensor, weights: list[float]) -> float:
    """Contrast where the window lies inside, of ever smaller pictures; of the smallest the whole SSIM."""
    x, y, value = a.double().numpy(), b.double().numpy(), 1.0
    for scale, weight in enumerate(weights):
        luminance, contrast = terms(x, y)
        last = scale == len(weights) - 1
        mean = (luminance * contrast).mean() if last else contrast[:, 5:-5, 5:-5].mean()
        value *= max(mean, 0) ** weight
        if last:
            break
        x, y = ((p[:, ::2, ::2] + p[:, 1::2, ::2] + p[:, ::2, 1::2] + p[:, 1::2, 1::2]) / 4 for p in (x, y))
    return value


def numpy_tiled(a: Tensor, b: Tensor, tiles: int) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    height, width = x.shape[1] // tiles, x.shape[2] // tiles
    parts = [
        (slice(None), slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
        for i in range(tiles)
        for j in range(tiles)
    ]
    return float(max(np.sqrt(((x[part] - y[part]) ** 2).mean()) for part in parts))


@given(st.integers(0, 1000), st.floats(0, 1), st.integers(12, 30))
@settings(max_examples=15, deadline=None)
def test_ssim_follows_its_definition_and_torchmetrics(seed: int, mix: float, size: int) -> None:
    # The whole picture counts, borders mirrored. A torchmetrics that crops the border fails here: its numbers, and
    # those of noise differences, could not be compared with older ones.
    a, b = pictures(2, seed, size)
    b = mix * a + (1 - mix) * b
    value = SSIM().pair(a[None], b[None]).item()
    assert value == pytest.approx(numpy_ssim(a, b), abs=1e-4)
    library = structural_similarity_index_measure(a[None], b[None], data_range=1.0)
    assert value == pytest.approx(library.item(), abs=1e-5)  # type: ignore[union-attr]


def test_ms_ssim_follows_its_definition() -> None:
    a = pictures(1, 3, 176)[0, :, :, :176]
    b = 0.6 * a + 0.4 * pictures(1, 4, 176)[0, :, :, :176]
    published = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    assert MultiscaleSSIM().pair(a[None], b[None]).item() == pytest.approx(numpy_ms_ssim(a, b, published), abs=1e-4)
    small, other = a[:, :64, :64], b[:, :64, :64]
    weights = [w / sum(published[:3]) for w in published[:3]]
    value = MultiscaleSSIM(scales=3).pair(small[None], other[None]).item()
    assert value == pytest.approx(numpy_ms_ssim(small, other, weights), abs=1e-4)


def test_ms_ssim_of_small_pictures_or_too_many_scales_is_an_error() -> None:
    small = pictures(1, 0, 64)
    with pytest.raises(ConfigError, match="5 scales needs pictures of more than 160 pixels on a side, given 68x64"):
        MultiscaleSSIM().pair(small, small)
    with pytest.raises(ConfigError, match="MultiscaleSSIM: scales=6; expected less than or equal to 5"):
        MultiscaleSSIM(6)
    assert MultiscaleSSIM(3).title == "MS-SSIM (3 scales)"


@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]))
@settings(max_examples=10, deadline=None)
def test_distances_follow_carlini(seed: int, tiles: int) -> None:
    a, b = pictures(2, seed)
    b[:, :6, :7] = a[:, :6, :7] / 2
    plain, tiled = PixelDistance().pair(a[None], b[None]).item(), TiledDistance(tiles).pair(a[None], b[None]).item()
    assert plain == pytest.approx(numpy_tiled(a, b, 1), abs=1e-6)
    assert tiled == pytest.approx(numpy_tiled(a, b, tiles), abs=1e-6)
    assert tiled >= plain - 1e-6


def test_equal_backgrounds_do_not_make_a_tiled_distance_small() -> None:
    a = torch.zeros(1, 3, 512, 512)
    b = a.clone()
    b[:, :, 128:256, 384:] = 0.5
    assert TiledDistance().pair(a, b).item() == pytest.approx(0.5)
    assert PixelDistance().pair(a, b).item() == pytest.approx(0.125)


@pytest.mark.parametrize("space", [SSIM(), MultiscaleSSIM(1), PixelDistance(), TiledDistance()], ids=lambda s: s.title)
def test_all_pairs_are_compared_a_bounded_number_at_a_time(space: ImageSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pictures(3, 1), pictures(5, 2)
    whole = space.compare(a, b)
    monkeypatch.setattr(spaces, "PAIRED_VALUES", 2 * a[0].numel())
    parts = space.compare(a, b)
    expected = torch.stack([space.pair(x.expand_as(b), b) for x in a])
    assert whole.shape == (3, 5)
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parts, expected, atol=1e-6, rtol=1e-5)
    low, high = space.bounds
    assert low is not None
    assert high is not None
    assert ((low <= whole) & (whole <= high)).all()


@pytest.mark.parametrize("space", [SSIM(), PixelDistance()], ids=lambda s: s.title)
def test_nearest_gives_the_value_of_the_most_similar(space: ImageSpace) -> None:
    references = pictures(3, 1)
    images = torch.stack([references[2], (references[0] + 0.2).clamp(max=1), pictures(1, 9)[0]])
    pairs = [[space.pair(image[None], reference[None]).item() for reference in references] for image in images]
    best = [min(row) if space.is_distance else max(row) for row in pairs]
    assert space.nearest(images, references).tolist() == pytest.approx(best, abs=1e-6)
    assert best[0] == pytest.approx(0 if space.is_distance else 1, abs=1e-5)


def test_pictures_are_resized_to_the_size_of_the_images() -> None:
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    seen = PixelDistance().embed([red, red.resize((8, 6))], (8, 6), CPU)
    assert seen.shape == (2, 3, 6, 8)
    assert seen[0].tolist() == seen[1].tolist()
    assert seen[0, :, 0, 0].tolist() == [1, 0, 0]


def test_spaces_of_pixels_share_one_view_but_not_one_fingerprint() -> None:
    assert len({space.view for space in (SSIM(), PixelDistance(), TiledDistance(2), MultiscaleSSIM())}) == 1
    assert SSIM().fingerprint() != PixelDistance().fingerprint()
    assert TiledDistance(2).fingerprint() != TiledDistance(4).fingerprint()
