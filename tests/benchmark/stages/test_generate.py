"""Images of a batch on disk, and their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

TASKS = [
    Task.of_image(Prompt(f"p{number}", text), seed) for number, text in enumerate(tiny_texts(2)) for seed in (0, 1)
]
"""Two images of each of two prompts."""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    for folder in ("records", "images"):
        (tmp_path / folder).mkdir()
    neurons = {task.prompt.id: Neurons() for task in TASKS}
    model = Diffusion(tiny_pipeline(), steps=2)
    method = NoMitigation()
    parts: dict[str, Any] = {"model": model, "method": lambda _: method, "neurons": neurons, "batch_size": 4}
    return Stage(generate, ImageRecord, Store(tmp_path), **parts, done=[TASKS[2].id])


def test_images_of_a_batch_are_those_of_the_model_but_for_those_that_are_done(stage: Stage) -> None:
    stage.predict_step(TASKS, 0)
    records = stage.store.records(ImageRecord)
    seeds = [seeds_of(task.prompt, "generate", [task.seed])[0] for task in TASKS]
    expected = stage.model.generate(stage.model.encode([task.prompt.text for task in TASKS]), seeds)
    for task, image in zip(TASKS, expected, strict=True):
        name = f"images/{task.prompt.id}_{task.seed:02d}.png"
        if task.id in stage.done:
            assert task.id not in records
            assert not (stage.store.folder / name).exists()
        else:
            assert records[task.id].image == name
            assert Image.open(stage.store.folder / name).tobytes() == to_image(image).tobytes()


def test_an_image_that_can_not_be_written_is_an_error_and_leaves_no_record(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Store.save_image

    def fail(store: Store, name: str, image: Image.Image) -> str:
        if name == "images/p1_01.png":
            raise OSError("disk full")
        return save(store, name, image)

    monkeypatch.setattr(Store, "save_image", fail)
    with pytest.raises(OSError, match="disk full"):
        stage.predict_step(TASKS, 0)
    assert not list(stage.store.folder.glob("records/*"))
    monkeypatch.undo()
    stage.predict_step(TASKS, 0)
    assert len(stage.store.records(ImageRecord)) == 3
