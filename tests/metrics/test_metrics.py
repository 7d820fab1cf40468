"""Metrics: values by hand and by an independent computation, and the contract of torchmetrics."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics import MetricCollection

from nemo_bench import metrics as metrics_package
from nemo_bench.errors import ModelError
from nemo_bench.metrics import (
    Alignment,
    BenchMetric,
    ClipJudge,
    Diversity,
    MemorizationScore,
    NearestTrainingImageSSIM,
    NeuronCount,
    TrainingImageSSIM,
    best_ssim,
)

FIELDS = {"images", "references", "pool", "embeddings", "text_embedding", "localization"}
METRICS = [
    member
    for member in vars(metrics_package).values()
    if inspect.isclass(member) and issubclass(member, BenchMetric) and member is not BenchMetric
]


def pictures(count: int, seed: int, size: int = 24) -> Tensor:
    return torch.rand(count, 3, size, size + 4, generator=torch.Generator().manual_seed(seed))


def unit(*rows: tuple[float, ...]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def smoothed(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means under a Gaussian window of 11 by 11, sigma 1.5, at every pixel; the image is mirrored at its border."""
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    padded = np.pad(image, ((0, 0), (5, 5), (5, 5)), mode="reflect")
    _, height, width = image.shape
    rows = sum(weight * padded[:, k : k + height] for k, weight in enumerate(window))
    return np.asarray(sum(weight * rows[:, :, k : k + width] for k, weight in enumerate(window)))


def numpy_ssim(a: Tensor, b: Tensor) -> float:
    """SSIM as Wang et al. 2004 define it, with data range 1, averaged over all pixels and channels."""
    x, y = a.double().numpy(), b.double().numpy()
    mean_x, mean_y = smoothed(x), smoothed(y)
    var_x, var_y = smoothed(x * x) - mean_x**2, smoothed(y * y) - mean_y**2
    covariance = smoothed(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean())


@given(st.integers(0, 1000), st.floats(0, 1), st.integers(12, 30))
@settings(max_examples=15, deadline=None)
def test_ssim_is_that_of_the_definition(seed: int, mix: float, size: int) -> None:
    # The whole picture counts, borders mirrored. A torchmetrics that crops the border fails here, and must not be used:
    # its numbers can't be compared.
    a, b = pictures(2, seed, size)
    b = mix * a + (1 - mix) * b
    assert best_ssim(a[None], b[None]).item() == pytest.approx(numpy_ssim(a, b), abs=1e-4)


def test_every_image_gets_its_best_reference() -> None:
    references = pictures(3, 1)
    images = torch.stack([references[2], (references[0] + 0.2).clamp(max=1), pictures(1, 9)[0]])
    expected = [max(numpy_ssim(image, reference) for reference in references) for image in images]
    values = best_ssim(images, references)
    assert values.tolist() == pytest.approx(expected, abs=1e-4)
    assert values[0].item() == pytest.approx(1, abs=1e-5)
    for metric, key in ((TrainingImageSSIM(), "references"), (NearestTrainingImageSSIM(), "pool")):
        assert metric.score(images=images, **{key: references}).tolist() == values.tolist()


def test_without_references_there_is_no_value() -> None:
    images, none = pictures(2, 0), torch.empty(0, 3, 24, 28)
    assert best_ssim(images, none).shape == (0,)
    metric = TrainingImageSSIM()
    metric.update(images=images, references=none)
    assert math.isnan(metric.compute())
    metric.update(images=images, references=images)
    metric.update(images=images, references=none)
    assert metric.compute() == pytest.approx(1, abs=1e-5)


def test_alignment_is_the_cosine_to_the_text() -> None:
    embeddings = unit((1.0, 0.0), (0.0, 1.0), (-3.0, 4.0))
    assert Alignment().score(embeddings=embeddings, text_embedding=unit((3.0, 4.0))[0]).tolist() == pytest.approx(
        [0.6, 0.8, 0.28]
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1.0, 0.0), (1.0, 0.0), (1.0, 0.0)], [0.0]),
        ([(1.0, 0.0), (-1.0, 0.0)], [2.0]),
        ([(1.0, 0.0), (0.0, 1.0), (1.0, 0.0)], [2 / 3]),
        ([(1.0, 0.0), (3.0, 4.0)], [0.4]),
        ([(1.0, 0.0)], []),
    ],
)
def test_diversity_is_one_minus_the_mean_cosine_of_pairs(rows: list[tuple[float, ...]], expected: list[float]) -> None:
    assert Diversity().score(embeddings=unit(*rows)).tolist() == pytest.approx(expected, abs=1e-6)


def test_localization_metrics_read_the_record() -> None:
    record = {"memorization": 0.25, "neurons": {"mid": [1, 2], "down": [7]}}
    assert MemorizationScore().score(localization=record).tolist() == [0.25]
    assert NeuronCount().score(localization=record).tolist() == [3.0]


def prompt_of(seed: int, count: int) -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(seed)
    return {
        "images": pictures(count, seed),
        "references": pictures(seed % 3, seed + 1),
        "pool": pictures(2, seed + 2),
        "embeddings": torch.nn.functional.normalize(torch.randn(count, 4, generator=numbers), dim=-1),
        "text_embedding": unit((1.0, 2.0, 0.0, float(seed)))[0],
        "localization": {"memorization": 0.1 * seed, "neurons": {"mid": list(range(seed))}},
    }


PROMPTS = [prompt_of(seed, count) for seed, count in ((1, 3), (2, 1), (3, 2))]


def needed(metric: BenchMetric, fields: dict[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in metric.needs}


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
def test_compute_is_the_mean_of_all_scores(kind: type[BenchMetric]) -> None:
    metric = kind()
    scores = torch.cat([metric.score(**needed(metric, fields)) for fields in PROMPTS])
    for fields in PROMPTS:
        metric.update(**needed(metric, fields))
    assert len(scores)
    assert metric.compute().item() == pytest.approx(scores.double().mean().item(), rel=1e-6)
    assert metric.count == len(scores)
    metric.reset()
    assert metric.count == 0


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
def test_scores_have_one_value_an_image_or_one_a_prompt_within_bounds(kind: type[BenchMetric]) -> None:
    metric = kind()
    for fields in PROMPTS:
        values = metric.score(**needed(metric, fields))
        assert values.ndim == 1
        assert len(values) in ({len(fields["images"]), 0} if kind.per_image else {1, 0})
        assert kind.lower is None or (values >= kind.lower - 1e-6).all()
        assert kind.upper is None or (values <= kind.upper + 1e-6).all()


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
def test_merged_states_equal_all_at_once(kind: type[BenchMetric]) -> None:
    one, two, whole = kind(), kind(), kind()
    for number, fields in enumerate(PROMPTS):
        for metric in (whole, one if number < 2 else two):
            metric.update(**needed(metric, fields))
    one.merge_state(two)
    assert one.count == whole.count
    assert one.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


def test_a_collection_gives_every_metric_the_fields_it_needs() -> None:
    collection = MetricCollection({kind.__name__: kind() for kind in METRICS}, compute_groups=False)
    for fields in PROMPTS:
        collection.update(**fields)
    result = collection.compute()
    for kind in METRICS:
        alone = kind()
        for fields in PROMPTS:
            alone.update(**needed(alone, fields))
        assert result[kind.__name__] == alone.compute()


def test_a_collection_of_metrics_with_the_same_needs() -> None:
    class Darkest(TrainingImageSSIM):
        def score(self, images: Tensor, references: Tensor) -> Tensor:  # type: ignore[override]
            return images.amin((1, 2, 3))

    collection = MetricCollection({"ssim": TrainingImageSSIM(), "darkest": Darkest()}, compute_groups=False)
    images = pictures(3, 4)
    collection.update(images=images, references=images)
    result = collection.compute()
    assert result["ssim"] == pytest.approx(1, abs=1e-5)
    assert result["darkest"] == pytest.approx(images.amin((1, 2, 3)).double().mean().item())


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
def test_every_metric_declares_its_contract(kind: type[BenchMetric]) -> None:
    assert kind.title
    assert kind.description
    assert kind.citation
    assert kind.needs <= FIELDS
    assert kind.needs == set(inspect.signature(kind.score).parameters) - {"self"}
    assert kind.lower is None or kind.upper is None or kind.lower < kind.upper
    assert kind.higher_is_better in (True, False, None)
    assert {"title", "description", "needs"} <= set(vars(kind))
    described = kind.describe()
    assert json.loads(json.dumps(described)) == {
        key: getattr(kind, key) for key in ("title", "higher_is_better", "lower", "upper", "citation", "description")
    }


def test_no_two_metrics_have_the_same_title() -> None:
    assert len(METRICS) >= 6
    assert len({kind.title for kind in METRICS}) == len(METRICS)


CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {},
}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CLIP))
    return tmp_path


def test_a_judge_without_weights_is_refused(clip: Path) -> None:
    with pytest.raises(ModelError, match=r"no weights for open_clip model 'local-dir:.*give a known pair"):
        ClipJudge(f"local-dir:{clip}")


def test_a_judge_with_broken_weights_is_refused(clip: Path) -> None:
    (clip / "open_clip_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="no weights for open_clip model"):
        ClipJudge(f"local-dir:{clip}")


@pytest.mark.parametrize(("model", "pretrained"), [("ViT-B-32", "no-tag"), ("ViT-B-0", None), ("local-dir:gone", None)])
def test_unknown_judges_are_refused(model: str, pretrained: str | None) -> None:
    with pytest.raises(ModelError, match=f"no weights for open_clip model '{model}', pretrained '{pretrained}'"):
        ClipJudge(model, pretrained)


def test_a_judge_gives_unit_embeddings_and_cannot_be_trained(clip: Path) -> None:
    weights = open_clip.create_model(f"local-dir:{clip}").state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, clip / "open_clip_model.safetensors")
    judge = ClipJudge(f"local-dir:{clip}")
    images = judge.embed_images([Image.new("RGB", (20, 30), color) for color in ("red", "blue")])
    text = judge.embed_text("a caption " * 40)
    assert images.shape == (2, 8)
    assert text.shape == (8,)
    assert torch.cat([images, text[None]]).norm(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())
