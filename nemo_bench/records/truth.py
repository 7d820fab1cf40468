"""Neurons that a training gave to captions, and those of them that are known to memorize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.io import digest, explain
from nemo_bench.records.schema import Entry


class Truth(Entry):
    """A file of known memorization neurons, such as ``{"schema": 1, "neurons": {"vm-01": {LAYER: [3, 17]}}}``."""

    version: Literal[1] = Field(alias="schema")
    neurons: dict[str, Neurons]  #: By prompt id, at least one neuron each.


def read_truth(path: Path) -> dict[str, Neurons]:
    """The memorization neurons of each prompt whose neurons are known, by prompt id.

    Whether a model has such neurons says :meth:`nemo_bench.diffusion.masks.NeuronMasks.check`.

    Raises:
        ModelError: The file is missing, holds something else, or has no neurons for a prompt.
    """
    try:
        neurons = Truth.model_validate_json(path.read_bytes(), strict=True).neurons
    except OSError as error:
        raise ModelError(f"model.truth={path} can't be read ({error.strerror})") from None
    except ValidationError as error:
        form = '{"schema": 1, "neurons": {PROMPT ID: {LAYER: [3, 17]}}}'
        raise ModelError(f"model.truth={path}: expected {form} ({explain(error)})") from None
    if empty := [prompt for prompt, own in neurons.items() if not own.count]:
        raise ModelError(f"model.truth={path} has no neurons for '{empty[0]}'; leave out prompts that have none known")
    return neurons


def truth_digest(truth: Mapping[str, Neurons], prompts: Sequence[Prompt]) -> str:
    """Hash of the known neurons of some prompts, 16 hexadecimal digits."""
    return digest({prompt.id: dict(truth[prompt.id]) for prompt in prompts if prompt.id in truth})


ISOLATION = "isolation.json"
"""Name, in the folder of a training, of the file of an :class:`Isolation`."""


class Isolation(Entry):
    """The neurons that a training gave to captions: those that gradients pass, or sinks that captions switch on."""

    variant: str  #: Of the training.
    pool: Neurons  #: The sinks of all captions together.
    neurons: dict[str, Neurons]  #: Own ones by prompt id.


def read_isolation(path: Path) -> Isolation:
    """Reads :data:`ISOLATION`, given itself or by the folder of its training.

    Raises:
        ConfigError: The file is missing or holds something else.
    """
    path = path / ISOLATION if path.is_dir() else path
    try:
        return Isolation.model_validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror}): expected the sinks of a training; nemo-bench train "
            "variant=sinks writes them, and other variants have none"
        ) from None
    except ValidationError as error:
        form = '{"variant": ..., "pool": {LAYER: [3, 17]}, "neurons": {PROMPT ID: {LAYER: [3]}}}'
        raise ConfigError(f"{path}: expected {form} ({explain(error)})") from None
