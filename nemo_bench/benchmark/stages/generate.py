"""Images with the method applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from nemo_bench.benchmark.stages.base import UNLOCALIZED, Stage, file_name, to_image
from nemo_bench.diffusion import Diffusion, Generated
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import Batch, Method
from nemo_bench.prompts.tasks import Task, seeds_of
from nemo_bench.records.data import Neurons
from nemo_bench.records.schema import Cost, ImageRecord
from nemo_bench.records.store import Store


class GenerationStage(Stage[ImageRecord]):
    """Generates images with the method applied.

    An image that is not finite is recorded as ``failed``, with the reason and without a file; the others of its batch
    are not touched by it.

    Args:
        model: The model.
        method: Gives the mitigation, set up.
        neurons: Localized neurons by prompt id; images of other prompts fail.
        store: Where images and records go.
    """

    def __init__(
        self, model: Diffusion, method: Callable[[], Method], neurons: Mapping[str, Neurons], store: Store
    ) -> None:
        super().__init__(store, ImageRecord)
        self.model = model
        self.method = method
        self.neurons = neurons

    @override
    def handle(self, tasks: Sequence[Task]) -> list[ImageRecord]:
        localized = [task for task in tasks if task.prompt.id in self.neurons]
        records = {record.id: record for record in (self._generate(localized) if localized else [])}
        return [records.get(task.id) or _record(task, 0, failed=UNLOCALIZED) for task in tasks]

    def _generate(self, tasks: Sequence[Task]) -> list[ImageRecord]:
        before = self.model.row_passes
        try:
            method = self.method()
            method.prepare_prompts(self.model, [task.prompt for task in tasks])
            before = self.model.row_passes  # what images share is no cost of theirs
            generated, notes = self._sample(method, tasks)
        except NotFiniteError as error:
            # It does not say which images it is about.
            if len(tasks) > 1:
                return [record for task in tasks for record in self._generate([task])]
            return [_record(tasks[0], self.model.row_passes - before, failed=str(error))]
        passes = round((self.model.row_passes - before) / len(tasks), 2)
        records = []
        for row, (task, image, reason) in enumerate(zip(tasks, *generated, strict=True)):
            result = {"failed": reason} if reason else {"image": self._save(task, image)}
            records.append(_record(task, passes, **result, notes=dict(notes[row]) if notes else None))
        return records

    def _sample(self, method: Method, tasks: Sequence[Task]) -> tuple[Generated, Sequence[Mapping[str, Any]]]:
        """The images of a batch, and what the method notes of each."""
        prompts = tuple(t.prompt for t in tasks)
        seeds = tuple(seeds_of(t.prompt, "generate", [t.seed])[0] for t in tasks)
        neurons = tuple(self.neurons[p.id] for p in prompts)
        text = self.model.encode([p.text for p in prompts])
        batch = Batch(prompts, text, self.model.latents(seeds), seeds, neurons)
        with method.apply(self.model, batch) as changed:
            return changed.generate_checked(self.model), changed.notes

    def _save(self, task: Task, image: Tensor) -> str:
        return self.store.save_image(f"images/{file_name(task.prompt)}_{task.seed:02d}.png", to_image(image))


def _record(task: Task, passes: float, **result: Any) -> ImageRecord:
    cost = Cost(row_passes=passes)
    return ImageRecord(id=task.id, prompt=task.prompt.id, seed=task.seed, cost=cost, **result)
