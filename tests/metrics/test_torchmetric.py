"""Metrics as torchmetrics metrics: the mean of all scores, merged states, and collections."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics import Metric, MetricCollection

from all_metrics import METRICS, SAMPLES, fields, pictures, title
from nemo_bench.metrics import SSIM, BenchMetric, MemorizationRate, NearestTrainingImage, PixelDistance, TrainingImage
from nemo_bench.metrics.torchmetric import MeanScore


def test_updates_without_a_needed_field_change_nothing() -> None:
    mean = MeanScore(TrainingImage(SSIM()))
    mean.update(images=pictures(2, 0))
    assert math.isnan(mean.compute())
    mean.update(images=pictures(2, 0), references=pictures(2, 0), text="more")
    mean.update(images=pictures(2, 1))
    assert mean.compute() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("metric", METRICS, ids=title)
def test_compute_gives_the_mean_of_all_scores(metric: BenchMetric) -> None:
    mean = MeanScore(metric)
    assert isinstance(mean, Metric)
    batches = [metric.score(**fields(metric, sample)).double() for sample in SAMPLES]
    of_batches = [mean(**fields(metric, sample), nothing="of use").item() for sample in SAMPLES]
    scores = torch.cat(batches)
    assert len(scores)
    assert of_batches == pytest.approx([batch.mean().item() for batch in batches], rel=1e-12)
    assert mean.compute().item() == pytest.approx(scores.mean().item(), rel=1e-12)
    assert mean.mean.weight == len(scores)
    mean.reset()
    assert mean.mean.weight == 0
    for sample in SAMPLES:
        mean.update(**fields(metric, sample), nothing="of use")
    assert mean.compute().item() == pytest.approx(scores.mean().item(), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=title)
def test_merged_states_equal_all_at_once(metric: BenchMetric) -> None:
    one, two, whole = (MeanScore(metric).clone() for _ in range(3))
    for number, sample in enumerate(SAMPLES):
        for part in (whole, one if number < 2 else two):
            part.update(**fields(metric, sample))
    one.merge_state(two)
    assert one.mean.weight == whole.mean.weight
    assert one.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


def test_scores_that_are_not_finite_are_kept() -> None:
    mean = MeanScore(MemorizationRate(PixelDistance(), 0.1))
    mean.update(images=torch.full((1, 3, 8, 8), torch.nan), references=torch.zeros(1, 3, 8, 8))
    assert math.isnan(mean.compute())


def test_collections_keep_metrics_apart_that_agree_on_the_first_batch() -> None:
    # torchmetrics compares states after the first update, and from then on updates one of those that are equal.
    same, other = pictures(2, 1), pictures(2, 2)
    kinds = {"own": TrainingImage, "nearest": NearestTrainingImage}
    collection = MetricCollection({name: MeanScore(kind(SSIM())) for name, kind in kinds.items()})
    collection.update(images=same, references=same, pool=same)
    collection.update(images=same, references=other, pool=torch.cat([same, other]))
    result = collection.compute()
    assert result["nearest"] == pytest.approx(1, abs=1e-5)
    assert result["own"] < 0.9
    assert len(collection.compute_groups) == 2
    collection.reset()
    collection.update(images=same, references=other, pool=other)
    assert collection.compute()["own"] < 0.9


def test_collections_keep_metrics_of_one_class_apart() -> None:
    rates = {name: MemorizationRate(PixelDistance(), limit) for name, limit in (("strict", 0.1), ("lax", 0.6))}
    collection = MetricCollection({name: MeanScore(rate) for name, rate in rates.items()})
    black = torch.zeros(1, 3, 8, 8)
    collection.update(images=black, references=black)
    collection.update(images=black + 0.5, references=black)
    assert {name: value.item() for name, value in collection.compute().items()} == {"strict": 0.5, "lax": 1.0}
