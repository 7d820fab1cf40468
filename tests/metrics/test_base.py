"""The contract of all metrics."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from all_metrics import METRICS, SAMPLES, fields, title
from nemo_bench import metrics as metrics_package
from nemo_bench.metrics import FIELDS, SSIM, Alignment, BenchMetric, PixelDistance, TrainingImage
from small_networks import clip, sscd

ROLES = {
    "TrainingImage": "training_similarity",
    "NearestTrainingImage": "nearest_training_similarity",
    "MemorizationRate": "memorization_rate",
    "MemorizationScore": "memorization_score",
    "TrainingLoss": "training_loss",
    "NeuronCount": "neuron_count",
    "NeuronPrecision": "precision",
    "NeuronRecall": "recall",
    "NeuronF1": "f1",
    "RecallAtTrueNumber": "recall_at_true_number",
    "NeuronAveragePrecision": "average_precision",
}


@pytest.mark.parametrize("metric", METRICS, ids=title)
def test_scores_have_one_value_per_image_or_prompt_within_bounds(metric: BenchMetric) -> None:
    for sample in SAMPLES:
        values = metric.score(**fields(metric, sample))
        assert values.shape == ((sample.images,) if metric.per == "image" else (1,))
        assert metric.lower is None or (values >= metric.lower - 1e-6).all()
        assert metric.upper is None or (values <= metric.upper + 1e-6).all()


@pytest.mark.parametrize("metric", METRICS, ids=title)
def test_every_metric_declares_its_contract(metric: BenchMetric) -> None:
    kind = type(metric)
    assert metric.needs <= FIELDS
    arguments = inspect.signature(kind.score).parameters.values()
    assert metric.needs == {a.name for a in arguments if a.default is a.empty} - {"self"}
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
        "role": ROLES.get(kind.__name__, ""),
    }
    assert all(described[key] for key in ("title", "description", "citation"))
    assert described["family"] in ("memorization", "change", "alignment", "diversity", "quality", "localization")
    assert described["per"] in ("image", "prompt", "set")
    assert described["higher_is_better"] in (True, False, None)


def test_every_public_metric_is_tested_and_titles_are_distinct() -> None:
    public = [getattr(metrics_package, name) for name in metrics_package.__all__]
    classes = {c for c in public if inspect.isclass(c) and issubclass(c, BenchMetric) and not inspect.isabstract(c)}
    assert {type(metric) for metric in METRICS} == classes
    assert len({metric.title for metric in METRICS}) == len(METRICS)


def test_fingerprints_hold_digests_in_place_of_paths(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one, two = sscd(tmp_path / "a"), sscd(tmp_path / "b")
    assert one.fingerprint() == two.fingerprint()
    assert str(tmp_path) not in json.dumps(one.fingerprint())
    assert str(tmp_path) not in json.dumps(Alignment(clip(tmp_path / "a")).fingerprint())
    assert TrainingImage(SSIM()).fingerprint() != TrainingImage(PixelDistance()).fingerprint()


def test_importing_metrics_imports_no_library_that_is_needed_later() -> None:
    heavy = {"diffusers", "matplotlib", "open_clip", "timm", "torchmetrics", "torchvision", "transformers"}
    code = f"import sys, nemo_bench.metrics; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
