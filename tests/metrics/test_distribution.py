"""Distances of distributions against numpy, and what they need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.metrics import FID, KID, SSCD, Inception, MiFID, OpenClip, SetMetric
from small_networks import sscd

SPACE = OpenClip("local-dir:anywhere")


def features(count: int, seed: int, shift: float = 0.0) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=numbers) @ torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0])) + shift


def root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Square root of a symmetric matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.sqrt(values.clip(0)) @ vectors.T)


def numpy_fid(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    half = root(cov_x)
    mixed = np.trace(root(half @ cov_y @ half))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * mixed)


def numpy_mmd(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    n = len(x)

    def kernel(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((p @ q.T / p.shape[1] + 1) ** 3)

    xx, yy = kernel(x, x), kernel(y, y)
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    return float((xx.sum() + yy.sum()) / (n * (n - 1)) - 2 * kernel(x, y).mean())


@pytest.mark.parametrize(("count", "shift"), [(50, 0.0), (50, 1.0), (3, 0.5)])
def test_fid_follows_its_definition(count: int, shift: float) -> None:
    images, real = features(count, 1, shift), features(60, 2)
    # Fewer images than dimensions give a covariance without full rank, and a value all the same.
    assert FID(SPACE).score(images, real).item() == pytest.approx(numpy_fid(images, real), rel=1e-4, abs=1e-4)


def test_moments_of_real_pictures_are_computed_once_and_the_score_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    update = FrechetInceptionDistance.update

    def counted(self: FrechetInceptionDistance, features: Tensor, real: bool) -> None:
        given.append(real)
        update(self, features, real)

    monkeypatch.setattr(FrechetInceptionDistance, "update", counted)
    real, other, metric = features(60, 2), features(60, 3), FID(SPACE)
    sets = [features(count, count, count / 50) for count in (50, 20, 50)]
    found = [metric.score(images, real).item() for images in sets]
    assert given.count(True) == 1
    assert found == [FID(SPACE).score(images, real).item() for images in sets]
    assert metric.score(sets[0], other).item() == FID(SPACE).score(sets[0], other).item() != found[0]


def test_kid_is_the_mean_of_unbiased_estimates() -> None:
    images, real = features(30, 1, 0.3), features(30, 2)
    # Subsets of all images are all the same set.
    assert KID(SPACE, subsets=2).score(images, real).item() == pytest.approx(numpy_mmd(images, real), rel=1e-6)
    several = KID(SPACE, subsets=200, subset_size=20).score(images, real).item()
    assert several == pytest.approx(numpy_mmd(images, real), rel=0.5)
    assert several == KID(SPACE, subsets=200, subset_size=20).score(images, real).item()


def test_kid_does_not_change_the_global_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    KID(SPACE, subsets=2).score(features(9, 1), features(9, 2))
    torch.testing.assert_close(torch.rand(3), expected)


def test_mifid_divides_by_the_distance_to_the_nearest_training_images() -> None:
    real = features(40, 2)
    copies = torch.cat([real[:20] + 0.01 * features(20, 3), real[:20] * 1.001])
    x, y = copies.double().numpy(), real.double().numpy()
    cosines = np.abs(x @ y.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
    distance = (1 - cosines).min(1).mean()
    assert distance < 0.1
    assert (1 - cosines).min(0).mean() > 2 * distance  # the other way round is something else
    value = MiFID(SPACE).score(copies, real).item()
    assert value == pytest.approx(numpy_fid(copies, real) / distance, rel=1e-3)


def test_mifid_of_images_far_from_all_training_images_is_fid() -> None:
    images, real = torch.eye(4)[:2].repeat(9, 1) + 0.01 * features(18, 1), torch.eye(4)[2:].repeat(9, 1)
    value = MiFID(SPACE).score(images, real).item()
    assert value == pytest.approx(numpy_fid(images, real), rel=1e-4)


@pytest.mark.parametrize("kind", [FID, KID, MiFID])
def test_equal_sets_have_no_distance_and_one_picture_has_no_score(kind: type[SetMetric]) -> None:
    images = features(30, 1)
    assert kind(SPACE).score(images, images).item() < 1e-3
    assert kind(SPACE).score(images[:1], images).shape == (0,)
    assert kind(SPACE).score(images, features(30, 2, 2.0)).item() > 0.5


def test_arguments_out_of_range_are_an_error() -> None:
    with pytest.raises(ConfigError, match="KID: subset_size=1; expected greater than or equal to 2"):
        KID(SPACE, subset_size=1)
    with pytest.raises(ConfigError, match="MiFID: limit=0; expected greater than 0"):
        MiFID(SPACE, limit=0)


def test_titles_name_the_extractor() -> None:
    clip = OpenClip("ViT-B-32-quickgelu", "openai")
    assert [metric.title for metric in (FID(Inception()), KID(Inception()), MiFID(Inception()), FID(clip))] == [
        "FID",
        "KID",
        "MiFID",
        "FID (CLIP ViT-B-32-quickgelu)",
    ]
    assert "299x299 bilinear" in FID(Inception()).description
    assert "ViT-B-32-quickgelu, weights openai" in FID(clip).description


def save(folder: Path, name: str, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_fewer_than_two_real_pictures_fail_the_check(tmp_path: Path) -> None:
    space = sscd(tmp_path)
    with pytest.raises(
        ConfigError, match=r"FID .* at least 2 real pictures, no folder is given; set real_images=FOLDER"
    ):
        FID(space).check()
    real = tmp_path / "real"
    save(real, "one.png", 1)
    (real / "list.txt").write_text("no picture")
    with pytest.raises(ConfigError, match="real holds 1; set real_images"):
        FID(space, str(real)).check()
    save(real, "deeper/two.JPG", 2)
    FID(space, str(real)).check()
    assert [path.name for path in FID(space, str(real)).files] == ["two.JPG", "one.png"]
    with pytest.raises(ModelError, match="no weights for SSCD"):
        FID(SSCD("gone.pt"), str(real)).check()


def test_damaged_real_pictures_fail_the_check(tmp_path: Path) -> None:
    space, real = sscd(tmp_path), tmp_path / "real"
    for number in range(6):
        save(real, f"sub/{number}.png", number)
    for name in ("._0.png", ".DS_Store", "sub/._1.png", "__MACOSX/sub/._1.png"):
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        (real / name).write_bytes(b"left by a system")
    metric = FID(space, str(real))
    metric.check()
    assert [path.name for path in metric.files] == [f"{number}.png" for number in range(6)]
    for number in range(1, 5):
        path = real / f"sub/{number}.png"
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError) as caught:
        metric.check()
    assert "4 of 6 real pictures can't be read: " in str(caught.value)
    assert f"{real / 'sub/1.png'} (image file is truncated" in str(caught.value)
    assert str(caught.value).endswith(f", ...; replace them, or move them out of {real}")


def test_the_fingerprint_of_real_pictures_is_their_names_and_sizes(tmp_path: Path) -> None:
    space = sscd(tmp_path)
    for folder in ("real", "moved"):
        save(tmp_path / folder, "one.png", 1)
        save(tmp_path / folder, "two.png", 2)
    before, moved = (FID(space, str(tmp_path / folder)).fingerprint() for folder in ("real", "moved"))
    assert before == moved
    save(tmp_path / "moved", "three.png", 3)
    assert FID(space, str(tmp_path / "moved")).fingerprint() != before
