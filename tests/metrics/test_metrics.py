"""Metrics: values by hand and by an independent computation, and the contract of torchmetrics."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from nemo_bench import metrics as metrics_package
from nemo_bench.metrics import (
    FID,
    FIELDS,
    KID,
    SSIM,
    Alignment,
    BenchMetric,
    Change,
    Diversity,
    ImageSpace,
    MemorizationRate,
    MemorizationScore,
    MiFID,
    NearestTrainingImage,
    NeuronCount,
    OpenClip,
    PixelDistance,
    TiledDistance,
    TrainingImage,
    Vendi,
)
from small_networks import clip, sscd

CLIP = OpenClip("local-dir:anywhere")
PIXELS = [SSIM(), PixelDistance(), TiledDistance()]
METRICS = [
    *(kind(space) for kind in (TrainingImage, NearestTrainingImage, Change) for space in PIXELS),
    *(MemorizationRate(space, 0.3) for space in PIXELS),
    TrainingImage(CLIP),
    Change(CLIP),
    Alignment(CLIP),
    Diversity(CLIP),
    Diversity(SSIM(), "median"),
    Diversity(PixelDistance()),
    Vendi(CLIP),
    FID(CLIP),
    KID(CLIP, subsets=3),
    MiFID(CLIP),
    MemorizationScore(),
    NeuronCount(),
]
KINDS = {
    member
    for member in vars(metrics_package).values()
    if inspect.isclass(member) and issubclass(member, BenchMetric) and not inspect.isabstract(member)
}


def title(metric: BenchMetric) -> str:
    return metric.title


def pictures(count: int, seed: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size + 4, generator=torch.Generator().manual_seed(seed))


def unit(*rows: tuple[float, ...]) -> Tensor:
    return F.normalize(torch.tensor(rows), dim=-1)


def prompt_of(seed: int, count: int) -> dict[str, Any]:
    return {"seed": seed, "count": count}


PROMPTS = [prompt_of(seed, count) for seed, count in ((1, 3), (2, 2), (3, 2))]


def fields(metric: BenchMetric, prompt: dict[str, Any]) -> dict[str, Any]:
    """What a metric needs of a prompt, as its space would see it."""
    seed, count = prompt["seed"], prompt["count"]
    if metric.space == CLIP:
        numbers = torch.Generator().manual_seed(seed)
        counts = {"images": count, "references": 2, "pool": 4, "unmitigated": count, "real": 5, "text": 1}
        seen = {name: torch.randn(n, 4, generator=numbers) for name, n in counts.items()}
        seen["text"] = seen["text"][0]
    else:
        counts = {"images": count, "references": 2, "pool": 4, "unmitigated": count}
        seen = {name: pictures(n, 10 * seed + place) for place, (name, n) in enumerate(counts.items())}
    localization = {"memorization": 0.1 * seed, "neurons": {"mid": list(range(seed))}}
    return {name: value for name, value in {**seen, "localization": localization}.items() if name in metric.needs}


@pytest.mark.parametrize("space", PIXELS, ids=lambda s: s.title)
def test_training_images_are_compared_by_the_best(space: ImageSpace) -> None:
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
def test_change_is_by_seed_and_not_by_the_nearest(space: ImageSpace) -> None:
    images = pictures(3, 1)
    swapped = images[[1, 0, 2]]
    values = Change(space).score(images, swapped)
    same = 1 - float(space.is_distance)
    assert values[2].item() == pytest.approx(same, abs=1e-5)
    assert abs(values[0].item() - same) > 0.1
    torch.testing.assert_close(values, space.compare(images, swapped).diagonal())


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=4), st.integers(-3, 3))
def test_the_rate_is_the_share_beyond_the_threshold(values: list[int], threshold: int) -> None:
    # A picture of one shade has a distance of its shade to black.
    images = torch.stack([torch.full((3, 4, 4), (value + 4) / 8) for value in values])
    limit = (threshold + 4) / 8
    rate = MemorizationRate(PixelDistance(), limit).score(images, torch.zeros(1, 3, 4, 4))
    assert rate.tolist() == [float(value < threshold) for value in values]
    assert MemorizationRate(PixelDistance(), limit).higher_is_better is False


def test_the_rate_of_a_similarity_counts_what_lies_above() -> None:
    rows = unit((1.0, 0.0), (0.6, 0.8), (0.0, 1.0))
    rate = MemorizationRate(CLIP, 0.5)
    assert rate.score(rows, rows[:1]).tolist() == [1, 1, 0]
    assert rate.title == "Memorized (CLIP > 0.5)"
    assert MemorizationRate(PixelDistance(), 0.15).title == "Memorized (Pixel distance < 0.15)"


def test_alignment_is_the_cosine_to_the_text() -> None:
    images = 7 * unit((1.0, 0.0), (0.0, 1.0), (-3.0, 4.0))
    assert Alignment(CLIP).score(images, 3 * unit((3.0, 4.0))[0]).tolist() == pytest.approx([0.6, 0.8, 0.28])


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
def test_diversity_is_one_minus_the_cosine_of_pairs(
    rows: list[tuple[float, ...]], mean: list[float], median: list[float]
) -> None:
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
def test_the_vendi_score_counts_different_images(rows: list[tuple[float, ...]], expected: float) -> None:
    assert Vendi(CLIP).score(torch.tensor(rows)).item() == pytest.approx(expected, abs=1e-6)


def test_the_vendi_score_is_that_of_the_definition() -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    vectors = rows.double().numpy()
    kernel = vectors @ vectors.T / np.outer(np.linalg.norm(vectors, axis=1), np.linalg.norm(vectors, axis=1))
    shares = np.linalg.svd(kernel / 6, compute_uv=False)
    shares = shares[shares > 1e-12]
    assert Vendi(CLIP).score(rows).item() == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_localization_metrics_read_the_record() -> None:
    record = {"memorization": 0.25, "neurons": {"mid": [1, 2], "down": [7]}}
    assert MemorizationScore().score(localization=record).tolist() == [0.25]
    assert NeuronCount().score(localization=record).tolist() == [3.0]


def test_without_its_fields_a_metric_has_no_value() -> None:
    metric = TrainingImage(SSIM())
    metric.update(images=pictures(2, 0))
    assert math.isnan(metric.compute())
    metric.update(images=pictures(2, 0), references=pictures(2, 0), text="more")
    metric.update(images=pictures(2, 1))
    assert metric.compute() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("metric", METRICS, ids=title)
def test_compute_is_the_mean_of_all_scores(metric: BenchMetric) -> None:
    metric.reset()
    scores = torch.cat([metric.score(**fields(metric, prompt)) for prompt in PROMPTS])
    for prompt in PROMPTS:
        metric.update(**fields(metric, prompt), nothing="of use")
    assert len(scores)
    assert metric.compute().item() == pytest.approx(scores.double().mean().item(), rel=1e-6)
    assert metric.count == len(scores)
    metric.reset()
    assert metric.count == 0


@pytest.mark.parametrize("metric", METRICS, ids=title)
def test_scores_have_one_value_an_image_or_one_a_prompt_within_bounds(metric: BenchMetric) -> None:
    for prompt in PROMPTS:
        values = metric.score(**fields(metric, prompt))
        assert values.shape == ((prompt["count"],) if metric.per == "image" else (1,))
        assert metric.lower is None or (values >= metric.lower - 1e-6).all()
        assert metric.upper is None or (values <= metric.upper + 1e-6).all()


@pytest.mark.parametrize("metric", METRICS, ids=title)
def test_merged_states_equal_all_at_once(metric: BenchMetric) -> None:
    one, two, whole = metric.clone(), metric.clone(), metric.clone()
    for number, prompt in enumerate(PROMPTS):
        for part in (whole, one if number < 2 else two):
            part.update(**fields(metric, prompt))
    one.merge_state(two)
    assert one.count == whole.count
    assert one.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


def test_a_collection_does_not_take_metrics_for_one_that_agree_on_the_first_batch() -> None:
    # torchmetrics compares states after the first update, and from then on updates one of those that are equal.
    same = pictures(2, 1)
    other = pictures(2, 2)
    collection = MetricCollection({"own": TrainingImage(SSIM()), "nearest": NearestTrainingImage(SSIM())})
    collection.update(images=same, references=same, pool=same)
    collection.update(images=same, references=other, pool=torch.cat([same, other]))
    result = collection.compute()
    assert result["nearest"] == pytest.approx(1, abs=1e-5)
    assert result["own"] < 0.9
    assert len(collection.compute_groups) == 2
    collection.reset()
    collection.update(images=same, references=other, pool=other)
    assert collection.compute()["own"] < 0.9


def test_metrics_of_one_kind_are_not_taken_for_one_either() -> None:
    limits = {"strict": 0.1, "lax": 0.6}
    collection = MetricCollection({name: MemorizationRate(PixelDistance(), limit) for name, limit in limits.items()})
    black = torch.zeros(1, 3, 8, 8)
    collection.update(images=black, references=black)
    collection.update(images=black + 0.5, references=black)
    assert {name: value.item() for name, value in collection.compute().items()} == {"strict": 0.5, "lax": 1.0}


@pytest.mark.parametrize("metric", METRICS, ids=title)
def test_every_metric_declares_its_contract(metric: BenchMetric) -> None:
    kind = type(metric)
    assert metric.needs <= FIELDS
    assert metric.needs == set(inspect.signature(kind.score).parameters) - {"self"}
    assert metric.lower is None or metric.upper is None or metric.lower < metric.upper
    described = metric.describe()
    assert json.loads(json.dumps(described)) == {
        "measure": kind.__name__,
        "title": metric.title,
        "description": metric.description,
        "citation": metric.citation,
        "higher_is_better": metric.higher_is_better,
        "lower": metric.lower,
        "upper": metric.upper,
        "family": metric.family,
        "per": metric.per,
    }
    assert all(described[key] for key in ("title", "description", "citation"))
    assert described["family"] in ("memorization", "change", "alignment", "diversity", "quality", "localization")
    assert described["per"] in ("image", "prompt", "set")
    assert described["higher_is_better"] in (True, False, None)


def test_every_kind_is_tested_and_titles_tell_them_apart() -> None:
    assert {type(metric) for metric in METRICS} == KINDS
    assert len({metric.title for metric in METRICS}) == len(METRICS)


def test_what_decides_scores_is_known_without_paths(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one, two = sscd(tmp_path / "a"), sscd(tmp_path / "b")
    assert one.fingerprint() == two.fingerprint()
    assert str(tmp_path) not in json.dumps(one.fingerprint())
    space = clip(tmp_path / "a")
    assert str(tmp_path) not in json.dumps(Alignment(space).fingerprint())
    assert TrainingImage(SSIM()).fingerprint() != TrainingImage(PixelDistance()).fingerprint()
