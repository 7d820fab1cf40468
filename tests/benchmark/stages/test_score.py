"""The score stage: what metrics are given, that nothing is embedded twice, and what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nemo_bench.benchmark.stages.base import Chunk, Stage
from nemo_bench.benchmark.stages.score import (
    References,
    SampleReader,
    Scorer,
    embed_real,
    read_features,
    set_spaces,
    shuffled_texts,
)
from nemo_bench.errors import ConfigError
from nemo_bench.metrics import (
    FID,
    SSCD,
    SSIM,
    Alignment,
    BenchMetric,
    Change,
    Diversity,
    MaskedSSIM,
    MemorizationRate,
    MemorizationScore,
    NearestTrainingImage,
    PixelDistance,
    SetMetric,
    TrainingImage,
    Vendi,
)
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.data import Prompt
from nemo_bench.records.schema import ChunkRecord, ImageRecord, ScoreRecord, Spec
from nemo_bench.records.store import Store
from small_networks import clip, descriptor, sscd

CPU = torch.device("cpu")


def save(path: Path, seed: int, size: tuple[int, int] = (24, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "cell")
    store.open(Spec(task="benchmark", settings={}))
    return store


@pytest.fixture
def prompts(tmp_path: Path) -> list[Prompt]:
    """Two prompts with a reference or two, of which one is an image itself, and one without."""
    references = [save(tmp_path / "references" / f"{i}.png", 100 + i, (24 + 8 * (i == 1), 24)) for i in range(3)]
    return [
        Prompt("a", "a red car", "VM", (references[0], references[1])),
        Prompt("b", "a blue car", "VM", (references[2],)),
        Prompt("c", "car " * 40),
    ]


@pytest.fixture
def images(store: Store, prompts: Sequence[Prompt]) -> list[ImageRecord]:
    records = []
    for number, prompt in enumerate(prompts):
        for seed in range(3):
            name = f"images/{prompt.id}_{seed}.png"
            save(store.folder / name, 100 if (prompt.id, seed) == ("a", 1) else 10 * number + seed)
            records.append(ImageRecord(id=f"{prompt.id}{seed}", prompt=prompt.id, seed=seed, image=name))
    return records


def score(
    metrics: dict[str, BenchMetric], store: Store, prompts: Sequence[Prompt], reader: SampleReader, *, at_once: int = 3
) -> dict[str, ScoreRecord]:
    pool = [path for prompt in prompts for path in prompt.references]
    stage = Stage(Scorer(metrics, References(pool)), ScoreRecord, store)
    tasks = [Task.of_prompt(prompt) for prompt in prompts]
    for start in range(0, len(tasks), at_once):
        stage.predict_step(reader(tasks[start : start + at_once]), 0)
    records = store.records(ScoreRecord).values()
    return {f"{r.prompt}{'' if r.seed is None else r.seed}": r for r in records}


class Broken(SSCD):
    """Features of one dark image are nan."""

    def embed(self, pictures: Sequence[Image.Image], size: tuple[int, int], device: torch.device) -> torch.Tensor:
        vectors = super().embed(pictures, size, device)
        wrong = [max(picture.getdata()) == (0, 0, 0) for picture in pictures]
        return vectors.masked_fill(torch.tensor(wrong)[:, None], torch.nan)


def test_features_that_are_not_finite_give_no_score_and_are_told(
    tmp_path: Path, store: Store, prompts: list[Prompt], images: list[ImageRecord]
) -> None:
    Image.new("RGB", (24, 24)).save(store.folder / str(images[1].image))
    network = Broken(sscd(tmp_path).file)
    metrics: dict[str, BenchMetric] = {
        "sscd": TrainingImage(network),
        "memorized": MemorizationRate(network, 0.5),
        "diversity": Diversity(network),
        "vendi": Vendi(network),
        "fid": FID(network, "unread"),
        "ssim": TrainingImage(SSIM()),
    }
    found = score(metrics, store, prompts, SampleReader(metrics.values(), store.folder, images))
    assert set(found["a1"].scores) == {"ssim"}
    assert found["a1"].failed == {"sscd": "the score is nan", "memorized": "the score is nan"}
    assert set(found["a0"].scores) == {"sscd", "memorized", "ssim"}
    assert found["a0"].failed is None
    assert set(found["a"].scores) == {"diversity", "vendi"}
    assert found["a"].failed == {"fid": "the score is nan"}
    kept = read_features([store.folder / str(found["a"].file)], *set_spaces(metrics.values()))
    assert kept.shape == (2, 512)
    assert float(1 - kept[0] @ kept[1] / kept.norm(dim=1).prod()) == pytest.approx(
        found["a"].scores["diversity"], abs=1e-5
    )


def test_images_that_failed_are_left_out_and_a_prompt_without_any_has_no_score(
    tmp_path: Path, store: Store, prompts: list[Prompt], images: list[ImageRecord]
) -> None:
    network = sscd(tmp_path)
    for row in (0, 3, 4, 5):
        images[row] = images[row].model_copy(update={"image": None, "failed": "pixels are not finite"})
    metrics: dict[str, BenchMetric] = {
        "ssim": TrainingImage(SSIM()),
        "sscd": TrainingImage(network),
        "nearest": NearestTrainingImage(SSIM()),
        "diversity": Diversity(network),
        "score": MemorizationScore(),
        "fid": FID(network, "unread"),
    }
    # Noise differences of prompt a were not finite.
    reader = SampleReader(metrics.values(), store.folder, images, memorization={"b": 0.5})
    found = score(metrics, store, prompts, reader)
    assert sorted(found) == ["a", "a1", "a2", "b", "c", "c0", "c1", "c2"]
    assert found["b"].scores == {"score": 0.5}
    assert found["b"].file is None
    assert set(found["a"].scores) == {"diversity"}


def test_shuffled_texts_are_those_of_other_prompts() -> None:
    prompts = [Prompt(name, text) for name, text in zip("abcd", ["one", "two", "one", "three"], strict=True)]
    assert shuffled_texts(prompts) == {"a": "three", "b": "three", "c": "two", "d": "two"}
    assert shuffled_texts(prompts[:1]) == {}


def test_alignment_is_measured_with_the_text_of_another_prompt(
    tmp_path: Path, store: Store, prompts: list[Prompt], images: list[ImageRecord]
) -> None:
    metric = Alignment(clip(tmp_path))
    reader = SampleReader([metric], store.folder, images)
    samples = reader([Task.of_prompt(prompts[0])])
    stage = Stage(Scorer({}, References()), ScoreRecord, store)
    (*_, other) = Scorer({"alignment": metric}, References(), {"a": "a text"})(stage, samples)
    again = reader([Task.of_prompt(prompts[0]._replace(text="a text"))])
    (*own, plain) = Scorer({"alignment": metric}, References())(stage, again)
    expected = np.mean([record.scores["alignment"] for record in own])
    assert other.shuffled == {"alignment": pytest.approx(expected, abs=1e-5)}
    assert plain.shuffled is None


@pytest.mark.parametrize("at_once", [1, 3])
def test_metrics_get_what_they_ask_for(
    tmp_path: Path, store: Store, prompts: list[Prompt], images: list[ImageRecord], at_once: int
) -> None:
    network, text = sscd(tmp_path), clip(tmp_path)
    unmitigated = {record.id: save(tmp_path / f"{record.id}.png", n) for n, record in enumerate(images)}
    del unmitigated["b1"]
    metrics: dict[str, BenchMetric] = {
        "ssim": TrainingImage(SSIM()),
        "nearest": NearestTrainingImage(SSIM()),
        "sscd": TrainingImage(network),
        "change": Change(PixelDistance()),
        "diversity": Diversity(network),
        "alignment": Alignment(text),
        "score": MemorizationScore(),
        "part": MaskedSSIM("inside", masks=str(tmp_path / "masks")),
    }
    (tmp_path / "masks").mkdir()
    Image.new("L", (24, 24), 255).save(tmp_path / "masks" / "a.png")
    reader = SampleReader(
        metrics.values(), store.folder, reversed(images), memorization={"a": 0.5}, unmitigated=unmitigated
    )
    found = score(metrics, store, prompts, reader, at_once=at_once)
    assert len(found) == 12
    assert set(found["a0"].scores) == {"ssim", "nearest", "sscd", "change", "alignment", "part"}
    assert set(found["b1"].scores) == {"ssim", "nearest", "sscd", "alignment"}  # an image without a counterpart
    assert set(found["c0"].scores) == {"nearest", "change", "alignment"}
    assert found["a"].scores["score"] == 0.5
    assert set(found["b"].scores) == {"diversity"}
    assert [found[i].truncated for i in "abc"] == [False, False, True]
    # The image that is its reference.
    assert found["a1"].scores["ssim"] == found["a1"].scores["nearest"] == 1
    assert found["a0"].scores["part"] == pytest.approx(found["a0"].scores["ssim"], abs=1e-5)  # the mask is all white
    assert found["a1"].scores["sscd"] == pytest.approx(1, abs=1e-5)

    def opened(path: Path) -> Image.Image:
        return Image.open(path).convert("RGB")

    one = [opened(store.folder / str(record.image)) for record in images[:3]]
    # Networks see references as they are, pixels are brought to the size of the images.
    seen = network.embed(one, (24, 24), CPU), network.embed([opened(p) for p in prompts[0].references], (24, 24), CPU)
    best = network.nearest(*seen).tolist()
    assert [found[f"a{seed}"].scores["sscd"] for seed in range(3)] == pytest.approx(best, abs=1e-5)
    change = np.sqrt(((np.asarray(one[2]) / 255 - np.asarray(opened(unmitigated["a2"])) / 255) ** 2).mean())
    assert found["a2"].scores["change"] == pytest.approx(change, abs=1e-5)


def test_pictures_are_embedded_once_by_each_network(
    tmp_path: Path, store: Store, prompts: list[Prompt], images: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[bytes] = Counter()
    prepare = SSCD.prepare

    def counted(self: SSCD, network: object, picture: Image.Image) -> torch.Tensor:
        seen[picture.tobytes()] += 1
        return prepare(self, network, picture)

    monkeypatch.setattr(SSCD, "prepare", counted)
    path = str(descriptor(tmp_path, 512)[0])
    metrics: dict[str, BenchMetric] = {
        "sscd": TrainingImage(SSCD(path)),
        "diversity": Diversity(SSCD(path)),
        "fid": FID(SSCD(path), str(tmp_path)),
    }
    # All but the image that is a reference too.
    score(metrics, store, prompts, SampleReader(metrics.values(), store.folder, images))
    assert len(seen) == 9 + 3 - 1
    assert sorted(seen.values())[-2:] == [1, 2]


def test_references_are_prepared_once_a_run_and_own_ones_compared_once(
    store: Store, prompts: list[Prompt], images: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    compare, pool = SSIM.compare, SSIM.pool
    monkeypatch.setattr(SSIM, "compare", lambda *given: calls.update(["compare"]) or compare(*given))
    monkeypatch.setattr(SSIM, "pool", lambda *given: calls.update(["pool"]) or pool(*given))
    metrics: dict[str, BenchMetric] = {
        "ssim": TrainingImage(SSIM()),
        "nearest": NearestTrainingImage(SSIM()),
        "memorized": MemorizationRate(SSIM(), 0.5),
    }
    references = References([path for prompt in prompts for path in prompt.references])
    samples = SampleReader(metrics.values(), store.folder, images)([Task.of_prompt(prompt) for prompt in prompts])
    stage = Stage(lambda stage, batch: [], ScoreRecord, store)
    first = Scorer(metrics, references)(stage, samples)
    assert calls == {"compare": 2, "pool": 1}  # the third prompt has no references
    assert [record.scores for record in Scorer(metrics, references)(stage, samples)] == [r.scores for r in first]
    assert calls["pool"] == 1


def test_features_of_sets_are_kept_and_combined_in_order(
    tmp_path: Path, store: Store, prompts: list[Prompt], images: list[ImageRecord]
) -> None:
    space = sscd(tmp_path)
    metric: SetMetric = FID(space, str(tmp_path / "references"))
    metrics: dict[str, BenchMetric] = {"fid": metric}
    found = score(metrics, store, prompts, SampleReader(metrics.values(), store.folder, images))
    assert not any(record.scores for record in found.values())
    (name,) = set_spaces([metric])
    files = [store.folder / str(found[prompt.id].file) for prompt in prompts]
    pictures = [Image.open(store.folder / str(record.image)).convert("RGB") for record in images]
    expected = space.embed(pictures, (24, 24), CPU)
    torch.testing.assert_close(read_features(files, name), expected)
    assert set(load_file(files[0])) == {name}
    # A lost file opens its prompt again.
    ids = [Task.of_prompt(prompt).id for prompt in prompts]
    assert not store.pending_ids(ScoreRecord, ids)
    files[1].unlink()
    assert store.pending_ids(ScoreRecord, ids) == [ids[1]]

    real = Store(tmp_path / "real")
    real.open(Spec(task="features", settings={}))
    chunks = Chunk.from_files(metric.files)
    Stage(partial(embed_real, space=space), ChunkRecord, real).predict_step(chunks, 0)
    kept_records = [real.records(ChunkRecord)[chunk.id] for chunk in chunks]
    kept = read_features([real.folder / str(record.file) for record in kept_records], "real")
    expected = space.embed([Image.open(path).convert("RGB") for path in metric.files], (24, 24), CPU)
    torch.testing.assert_close(kept, expected)
    assert [record.count for record in kept_records] == [3]


def test_costs_say_how_much_memory_was_used(store: Store, prompts: list[Prompt], images: list[ImageRecord]) -> None:
    metrics: dict[str, BenchMetric] = {"ssim": TrainingImage(SSIM())}
    found = score(metrics, store, prompts, SampleReader(metrics.values(), store.folder, images))
    # This process alone has loaded torch, which takes more than 100 MB.
    cost = found["a"].cost
    assert cost is not None
    assert cost.peak_memory_mb is not None
    assert 100 < cost.peak_memory_mb < 1e6
    assert found["a"].truncated is None


def test_a_space_must_be_one() -> None:
    from nemo_bench.config import build

    node = {"_target_": "nemo_bench.metrics.Alignment", "space": {"_target_": "nemo_bench.metrics.SSIM"}}
    with pytest.raises(ConfigError, match=r"metrics.alignment.space.*expected a class of .*OpenClip"):
        build(node, "metrics.alignment")
