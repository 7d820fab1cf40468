"""Saved neurons: blocks neurons of an earlier localization, ours or published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, StoreError
from nemo_bench.localization.published import by_name, read_cluster, read_published
from nemo_bench.methods.nemo import BlockNeurons
from nemo_bench.prompts import read_rows
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.io import digest
from nemo_bench.records.store import read_localizations

Saved = Callable[[Prompt], dict[str, Any] | None]
"""Gives the fields of the localization of a prompt; None where the file lacks it."""
FIELDS = (
    "neurons", "initial", "gate_score", "initial_score", "refined_score", "threshold", "passed_gate", "exhausted",
)  # fmt: skip


@dataclass(eq=False)
class SavedNeurons(BlockNeurons):
    """Blocks neurons read from a file."""

    title = "Saved neurons"
    summary = "neurons from a file: a published CSV, an earlier cell, or one set as JSON or safetensors"
    sourcing = "depends on the file"

    #: A published CSV, with lines by text of the prompt; a cell's folder (``results/<name>/<cell>``), with records by
    #: id and text of the prompt; or one set for all prompts: JSON or safetensors of :meth:`Neurons.save`, or a cluster
    #: as published by Di et al. (2026), ``neurons_cluster_<c>.npz``, whose prompts are in a CSV of that number. That
    #: file and CSV of one number belong together is assumed; clusters 10 and 11 have no file.
    file: str | None = None
    #: Blocked set: ``"refined"`` or the ``"initial"`` candidates; the same for a file of one set.
    neurons: Literal["refined", "initial"] = "refined"
    #: Prompts that the file lacks are an ``"error"``, before weights load, or nothing is blocked for them (``"none"``).
    #: Neurons of another model are an error when localizing.
    missing: Literal["error", "none"] = "error"

    @cached_property
    def _saved(self) -> Saved:
        if self.file is None:
            msg = "saved neurons need a file: set file to a CSV, JSON or safetensors file or a cell's folder"
            raise ConfigError(msg)
        path = Path(self.file)
        if path.is_dir():
            return _read_cell(path)
        return _read_published(path) if path.suffix == ".csv" else _read_one_set(path)

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        saved = {prompt.id: self._saved(prompt) for prompt in prompts if not prompt.axis}
        lacking = [name for name, fields in saved.items() if fields is None]
        if lacking and self.missing == "error":
            msg = f"{self.file} has no neurons for {len(lacking)} of {len(saved)} prompts (first: '{lacking[0]}')"
            raise ConfigError(f"{msg}; leave these prompts out, or block nothing for them with missing=none")
        return {"file": digest(saved)}

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        saved = self._saved(prompt)
        if saved is None:
            return Localization()
        refined, initial = (_neurons(saved[key], model.masks.widths) for key in ("neurons", "initial"))
        result = Localization(**{**saved, "neurons": refined, "initial": initial})
        if self.neurons == "initial":
            return replace(result, neurons=initial, refined_score=result.initial_score)
        return result


def _read_one_set(path: Path) -> Saved:
    layers = read_cluster(path) if path.suffix == ".npz" else dict(Neurons.load(path))
    return lambda prompt: {"neurons": layers, "initial": layers}


def _read_cell(folder: Path) -> Saved:
    records = read_localizations(folder)
    if not records:
        raise StoreError(f"{folder} holds no localization; give results/<name>/<cell> of a run, or a file")
    texts = {row.cells["id"]: row.cells["text"] for row in read_rows(folder / "prompts.jsonl")}
    saved = {}
    for prompt, found in records.items():
        fields = {key: getattr(found, key) for key in FIELDS}
        layers = {"neurons": dict(found.neurons), "initial": dict(found.initial)}
        saved[prompt, texts.get(prompt)] = {**fields, **layers}
    return lambda prompt: saved.get((prompt.id, prompt.text))


def _read_published(path: Path) -> Saved:
    saved: dict[str, dict[str, Any]] = {}
    for row in read_published(path):
        # Prompts that did not pass the gate have an empty list; whether the selection ran out is not published.
        record: dict[str, Any] = {
            "neurons": row.refined,
            "initial": row.initial,
            "initial_score": row.initial_score,
            "refined_score": row.refined_score,
            "passed_gate": any(row.initial),
        }
        if saved.setdefault(row.caption, record) != record:
            raise StoreError(f"{path}: two lines of other neurons for the prompt {row.caption!r}; leave one of them")
    return lambda prompt: saved.get(prompt.text)


def _neurons(saved: Any, widths: Mapping[str, int]) -> Neurons:
    """Neurons by name of the layer, from that form or from lists in network order."""
    return Neurons(saved) if isinstance(saved, Mapping) else by_name(saved, widths)
