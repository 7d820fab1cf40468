"""Neurons of each prompt, and the memorization score with the method applied."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from nemo_bench.benchmark.stages.base import Stage, file_name, slices, to_image
from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.errors import NotFiniteError
from nemo_bench.localization import (
    noise_differences,
    pair_similarities,
    pair_values,
)
from nemo_bench.methods import Batch, Method
from nemo_bench.prompts.data import PromptTask, seeds_of
from nemo_bench.records.data import Localization, Neurons, Prompt, Record
from nemo_bench.records.store import Store

PICTURED_SEEDS = 4
"""Noise differences of so many seeds are kept as pictures."""


class LocalizationStage(Stage):
    """Localizes the neurons of each prompt and measures the noise differences with the method applied.

    Of what a record costs, ``once_row_passes`` and ``once_seconds`` are what the method takes once for a prompt; the
    rest is measuring.

    What is not finite is recorded as ``failed``, with the reason: without ``neurons`` where localizing failed, without
    ``memorization`` in any case.

    Args:
        model: The model.
        method: The mitigation.
        seeds: Seeds a prompt.
        store: Where records go.
        prompts: All prompts, not only those of the tasks.
    """

    def __init__(
        self, model: Diffusion, method: Method, seeds: int, store: Store, prompts: Sequence[Prompt] = ()
    ) -> None:
        super().__init__(store, "localize")
        self.model, self.method, self.seeds, self.prompts = model, method, seeds, prompts

    def handle(self, tasks: Sequence[PromptTask]) -> list[Record]:
        """Localizes each prompt."""
        return [self._localize(task) for task in tasks]

    def _localize(self, task: PromptTask) -> Record:
        prompt, method = task.prompt, self.method
        seeds = seeds_of(prompt, "localize", range(self.seeds))
        before, start = self.model.row_passes, time.perf_counter()
        record: Record = {"id": task.id, "prompt": prompt.id, "truncated": self.model.truncated(prompt.text)}

        def passes() -> dict[str, int]:
            return {"row_passes": self.model.row_passes - before}

        try:
            method.prepare(self.model, self.prompts)
            result = method.localize(self.model, prompt, method.protocol.latents(self.model, seeds))
            method.prepare_prompts(self.model, [prompt])
        except NotFiniteError as error:
            return {**record, "failed": str(error), "cost": passes()}
        once = {
            "once_row_passes": self.model.row_passes - before,
            "once_seconds": round(time.perf_counter() - start, 4),
        }
        name = file_name(prompt)
        result.neurons.save(self.store.folder / "neurons" / f"{name}.json")
        record |= {
            "neurons": dict(result.neurons),
            "initial": dict(result.initial),
            "gate_score": result.gate_score,
            "initial_score": result.initial_score,
            "refined_score": result.refined_score,
            "threshold": result.threshold,
            "passed_gate": result.passed_gate,
            "exhausted": result.exhausted,
            **({"listed": dict(result.listed)} if result.listed else {}),
            **({"listed_initial": dict(result.listed_initial)} if result.listed_initial else {}),
        }
        try:
            differences = self._differences(prompt, seeds, result.neurons)
            pairs = pair_values(pair_similarities(differences, self.model.similarity))
            require_finite("noise differences with the method applied", pairs)
        except NotFiniteError as error:
            return {**record, "failed": str(error), "cost": {**passes(), **once}}
        picture = strip(differences[:PICTURED_SEEDS])
        return {
            **record,
            "memorization": float(pairs.mean()),
            "noise": self.store.save_image(f"noise/{name}.png", picture),
            "cost": {**passes(), **once},
        }

    def _differences(self, prompt: Prompt, seeds: Sequence[int], neurons: Neurons) -> Tensor:
        """Noise differences with the method applied, (seeds, channels, height, width)."""
        method, latents = self.method, self.model.latents(seeds)
        text = self.model.encode([prompt.text])
        parts = []
        for part in slices(self.seeds, method.batch_size):
            size = len(latents[part])
            rows = text.rows([0] * size)
            batch = Batch((prompt,) * size, rows, latents[part], tuple(seeds[part]), (neurons,) * size)
            with method.apply(self.model, batch) as changed:
                parts.append(noise_differences(self.model, changed.text, changed.latents))
        return torch.cat(parts)


def localization_of(record: Record) -> Localization:
    """The localization in a record."""
    return Localization(
        neurons=Neurons(record["neurons"]),
        initial=Neurons(record["initial"]),
        gate_score=record["gate_score"],
        initial_score=record["initial_score"],
        refined_score=record["refined_score"],
        threshold=record["threshold"],
        passed_gate=record.get("passed_gate"),
        exhausted=record.get("exhausted"),
        listed=_listed(record.get("listed", {})),
        listed_initial=_listed(record.get("listed_initial", {})),
    )


def _listed(layers: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {layer: tuple(ids) for layer, ids in layers.items()}


def strip(differences: Tensor) -> Image.Image:
    """Noise differences side by side, their first three channels as colors.

    Args:
        differences: (N, channels, H, W) in [0, 1], at least three channels.
    """
    return to_image(torch.cat(list(differences[:, :3]), dim=2))
