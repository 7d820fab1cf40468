"""Images of a batch on disk, and their records."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from nemo_bench import Diffusion, Neurons, Prompt
from nemo_bench.benchmark.stages.base import Stage, to_image
from nemo_bench.benchmark.stages.generate import generate
from nemo_bench.methods import NoMitigation
from nemo_bench.prompts.tasks import Task, seeds_of
from nemo_bench.records.schema import ImageRecord
from nemo_bench.records.store import Store
from tiny import tiny_pipeline, tiny_texts


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Generates two images of each of two prompts."""
    prompts = [Prompt(f"p{number}", text) for number, text in enumerate(tiny_texts(2))]
    tasks = {f"{p.id}-{seed}": Task(f"{p.id}-{seed}", p, seed) for p in prompts for seed in range(2)}
    store = Store(tmp_path)
    for folder in ("records", "images"):
        (tmp_path / folder).mkdir()
    neurons = {p.id: Neurons() for p in prompts}
    model = Diffusion(tiny_pipeline(), steps=2)
    return Stage(generate, ImageRecord, store, tasks, model=model, method=NoMitigation, neurons=neurons)


def test_images_of_a_batch_are_those_of_the_model(stage: Stage) -> None:
    tasks = stage.pending()
    stage.predict_step(tasks, 0)
    records = stage.store.records(ImageRecord)
    seeds = [seeds_of(task.prompt, "generate", [task.seed])[0] for task in tasks]
    expected = stage.model.generate(stage.model.encode([task.prompt.text for task in tasks]), seeds)
    for task, image in zip(tasks, expected, strict=True):
        record = records[task.id]
        assert record.image == f"images/{task.prompt.id}_{task.seed:02d}.png"
        assert Image.open(stage.store.folder / record.image).tobytes() == to_image(image).tobytes()


def test_an_image_that_can_not_be_written_is_an_error_and_leaves_no_record(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Store.save_image

    def fail(store: Store, name: str, image: Image.Image) -> str:
        if name == "images/p1_00.png":
            raise OSError("disk full")
        return save(store, name, image)

    monkeypatch.setattr(Store, "save_image", fail)
    with pytest.raises(OSError, match="disk full"):
        stage.predict_step(stage.pending(), 0)
    assert not list(stage.store.folder.glob("records/*"))
    monkeypatch.undo()
    stage.predict_step(stage.pending(), 0)
    assert len(stage.store.records(ImageRecord)) == 4
