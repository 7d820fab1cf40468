"""Saved neurons: blocks what was found before, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, StoreError
from nemo_bench.localization.published import by_name, read_published
from nemo_bench.methods.nemo import BlockNeurons
from nemo_bench.prompts import read_rows
from nemo_bench.records.data import Localization, Neurons, Prompt, Record
from nemo_bench.records.io import digest
from nemo_bench.records.store import read_records


class SavedNeurons(BlockNeurons):
    """Blocks neurons read from a file.

    Args:
        file: A published CSV, whose lines are found by the text of the prompt; a cell's folder
            (``results/<name>/<cell>``), whose records are found by id and text of the prompt; or JSON or safetensors
            of :meth:`Neurons.save`, one set for all prompts.
        neurons: Which set is blocked, ``"refined"`` or the ``"initial"`` candidates; a file of one set has no other.
        missing: What becomes of prompts that the file does not have: ``"error"``, before any weights load, or
            ``"none"``: nothing is blocked for them.
        factor: What the outputs of blocked neurons are multiplied by.
    """

    title = "Saved neurons"
    summary = "neurons from a file: a published CSV, an earlier cell, or one set as JSON or safetensors"
    sourcing = "what the file holds"

    def __init__(
        self,
        file: str | None = None,
        neurons: Literal["refined", "initial"] = "refined",
        missing: Literal["error", "none"] = "error",
        factor: float = 0.0,
    ) -> None:
        super().__init__(factor)
        self.file, self.neurons, self.missing = file, neurons, missing

    @cached_property
    def _saved(self) -> Callable[[Prompt], Record | None]:
        if self.file is None:
            raise ConfigError(
                "saved neurons need a file: set file to a CSV, JSON or safetensors file or a cell's folder"
            )
        path = Path(self.file)
        return _cell(path) if path.is_dir() else _published(path) if path.suffix == ".csv" else _one_set(path)

    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        """See :meth:`Method.fingerprint`.

        Raises:
            NemoBenchError: No file is named, it can't be read, or it lacks a prompt.
        """
        found = {prompt.id: self._saved(prompt) for prompt in prompts}
        lacking = [name for name, saved in found.items() if saved is None]
        if lacking and self.missing == "error":
            msg = f"{self.file} has no neurons for {len(lacking)} of {len(found)} prompts (first: '{lacking[0]}')"
            raise ConfigError(f"{msg}; leave these prompts out, or block nothing for them with missing=none")
        return {"file": digest(found)}

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        """See :meth:`Method.localize`.

        Raises:
            NemoBenchError: The neurons are of another model.
        """
        saved = self._saved(prompt)
        if saved is None:
            return Localization()
        refined, initial = (_neurons(saved[key], model.masks.widths) for key in ("neurons", "initial"))
        result = Localization(**{**saved, "neurons": refined, "initial": initial})
        if self.neurons == "initial":
            return replace(result, neurons=initial, refined_score=result.initial_score)
        return result


def _one_set(path: Path) -> Callable[[Prompt], Record | None]:
    layers = dict(Neurons.load(path))
    return lambda prompt: {"neurons": layers, "initial": layers}


def _cell(folder: Path) -> Callable[[Prompt], Record | None]:
    records = read_records(folder, "localize").values()
    if not records:
        raise StoreError(f"{folder} holds no localization; give results/<name>/<cell> of a run, or a file")
    texts = {row.cells["id"]: row.cells["text"] for row in read_rows(folder / "prompts.jsonl")}
    keys = (
        "neurons",
        "initial",
        "gate_score",
        "initial_score",
        "refined_score",
        "threshold",
        "passed_gate",
        "exhausted",
    )
    saved = {(r["prompt"], texts.get(r["prompt"])): {key: r.get(key) for key in keys} for r in records}
    return lambda prompt: saved.get((prompt.id, prompt.text))


def _published(path: Path) -> Callable[[Prompt], Record | None]:
    saved: dict[str, Record] = {}
    for row in read_published(path):
        scores = {"initial_score": row.initial_score, "refined_score": row.refined_score}
        # The list of a prompt that did not pass is empty; whether the selection ran out is not published.
        record: Record = {"neurons": row.refined, "initial": row.initial, **scores, "passed_gate": any(row.initial)}
        if saved.setdefault(row.caption, record) != record:
            raise StoreError(f"{path}: two lines of other neurons for the prompt {row.caption!r}; leave one of them")
    return lambda prompt: saved.get(prompt.text)


def _neurons(saved: Any, widths: Mapping[str, int]) -> Neurons:
    """Neurons by name of the layer, whether saved so or by its position."""
    return Neurons(saved) if isinstance(saved, Mapping) else by_name(saved, widths)
