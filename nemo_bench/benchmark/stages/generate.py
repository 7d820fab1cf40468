"""Images with the method applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nemo_bench.benchmark.stages.base import UNLOCALIZED, Stage, file_name, to_image
from nemo_bench.diffusion import Diffusion, Generated
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import Batch, Method
from nemo_bench.prompts.data import ImageTask, seeds_of
from nemo_bench.records.data import Neurons, Prompt, Record
from nemo_bench.records.store import Store


class GenerationStage(Stage):
    """Generates images with the method applied.

    An image that is not finite is recorded as ``failed``, with the reason and without a file; the others of its batch
    are not touched by it.

    Args:
        model: The model.
        method: The mitigation.
        neurons: What localizing found, by prompt id; images of other prompts fail.
        store: Where images and records go.
        prompts: All prompts, not only those of the tasks.
    """

    def __init__(
        self,
        model: Diffusion,
        method: Method,
        neurons: Mapping[str, Neurons],
        store: Store,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        super().__init__(store, "generate")
        self.model, self.method, self.neurons, self.prompts = model, method, neurons, prompts

    def handle(self, tasks: Sequence[ImageTask]) -> list[Record]:
        """Generates one image per task."""
        localized = [task for task in tasks if task.prompt.id in self.neurons]
        found = {record["id"]: record for record in (self._generate(localized) if localized else [])}
        return [found.get(task.id) or _failed(task, UNLOCALIZED) for task in tasks]

    def _generate(self, tasks: Sequence[ImageTask]) -> list[Record]:
        before = self.model.row_passes
        try:
            self.method.prepare(self.model, self.prompts)
            self.method.prepare_prompts(self.model, [task.prompt for task in tasks])
            before = self.model.row_passes  # what images share is no cost of theirs
            generated, notes = self._sample(tasks)
        except NotFiniteError as error:
            # It does not say which images it is about.
            if len(tasks) > 1:
                return [record for task in tasks for record in self._generate([task])]
            return [_failed(tasks[0], str(error), self.model.row_passes - before)]
        each = round((self.model.row_passes - before) / len(tasks), 2)
        records = []
        for row, (task, image, reason) in enumerate(zip(tasks, *generated, strict=True)):
            record = _failed(task, reason, each) if reason else self._save(task, image, each)
            records.append({**record, **({"notes": dict(notes[row])} if notes else {})})
        return records

    def _sample(self, tasks: Sequence[ImageTask]) -> tuple[Generated, Sequence[Mapping[str, Any]]]:
        """The images of a batch, and what the method notes of each."""
        prompts = tuple(t.prompt for t in tasks)
        seeds = tuple(seeds_of(t.prompt, "generate", [t.seed])[0] for t in tasks)
        neurons = tuple(self.neurons[p.id] for p in prompts)
        text = self.model.encode([p.text for p in prompts])
        batch = Batch(prompts, text, self.model.latents(seeds), seeds, neurons)
        with self.method.apply(self.model, batch) as changed:
            return changed.generate_checked(self.model), changed.notes

    def _save(self, task: ImageTask, image: Tensor, passes: float) -> Record:
        return {
            "id": task.id,
            "prompt": task.prompt.id,
            "seed": task.seed,
            "image": self.store.save_image(f"images/{file_name(task.prompt)}_{task.seed:02d}.png", to_image(image)),
            "cost": {"row_passes": passes},
        }


def _failed(task: ImageTask, reason: str, passes: float = 0) -> Record:
    """The record of an image that there is none of."""
    return {
        "id": task.id,
        "prompt": task.prompt.id,
        "seed": task.seed,
        "failed": reason,
        "cost": {"row_passes": passes},
    }
