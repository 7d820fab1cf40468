"""Plain data that flows through the stages: prompts, neurons, localizations and records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field, with_config
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema, core_schema
from safetensors.numpy import load_file, save_file

from nemo_bench.errors import NemoBenchError

Kind = Literal["VM", "TM", "memorized"]
"""Verbatim or template memorization, as annotated in the published list (Hintersdorf et al. 2024, section 4); or
memorized, nobody said in which way."""
Axis = Literal["rewording", "paraphrase", "translation", "neighbour"]
"""How a prompt varies another: in nearly the same words, in others, in another language; or it only resembles it."""
GENERAL = "general"
"""The name under which prompts without a kind are grouped in tables."""
PAIRS_FILE = "copies.csv"
"""The list in a folder of pairs of images of which it is known whether one copies the other."""


class Prompt(NamedTuple):
    """A prompt and what is known of it."""

    id: str  #: Unique in its list; decides the seeds of its images.
    text: str  #: What the model is given.
    kind: Kind | None = None  #: ``"VM"``, ``"TM"``, ``"memorized"``, or None for a prompt not known to be memorized.
    references: tuple[Path, ...] = ()  #: Training images of the prompt, as files.
    tags: tuple[str, ...] = ()  #: Free words for filters.
    dead_references: tuple[str, ...] = ()  #: Links to training images of the prompt that could not be fetched.
    damaged_references: tuple[Path, ...] = ()  #: Files of training images of the prompt that can't be decoded.
    links: tuple[str, ...] = ()  #: All links to training images that its list has, without user names and passwords.
    #: Id of the prompt that it is a variant of: that prompt's neurons are off for it, and it has none of its own.
    variant_of: str | None = None
    axis: Axis | None = None  #: How a variant differs from that prompt; a variant has no kind.

    @property
    def group(self) -> str:
        """The axis of a variant, else its kind, or ``"general"``."""
        return self.axis or self.kind or GENERAL


class Neurons(Mapping[str, tuple[int, ...]]):
    """Value neurons by layer: sorted, without duplicates, without empty layers; immutable.

    Example:
        >>> a = Neurons({"mid": [3, 1, 3]})
        >>> a | Neurons({"down": [0]}), a.count
        (Neurons({'down': (0,), 'mid': (1, 3)}), 2)
    """

    def __init__(self, layers: Mapping[str, Sequence[int]] | None = None) -> None:
        cleaned = {name: tuple(sorted({int(i) for i in ids})) for name, ids in sorted((layers or {}).items())}
        self._layers = {name: ids for name, ids in cleaned.items() if ids}

    def __getitem__(self, layer: str) -> tuple[int, ...]:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Neurons({self._layers})"

    def __hash__(self) -> int:
        return hash(tuple(self._layers.items()))

    def __or__(self, other: Neurons) -> Neurons:
        return Neurons({name: (*self.get(name, ()), *other.get(name, ())) for name in {*self, *other}})

    def __sub__(self, other: Neurons) -> Neurons:
        return Neurons({name: sorted(set(ids) - set(other.get(name, ()))) for name, ids in self.items()})

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: Any) -> CoreSchema:
        """In a record, an object of layer name to indices."""
        written = core_schema.plain_serializer_function_ser_schema(dict)
        layers = handler.generate_schema(dict[str, list[int]])
        return core_schema.no_info_after_validator_function(cls, layers, serialization=written)

    @property
    def count(self) -> int:
        """Number of neurons over all layers."""
        return sum(len(ids) for ids in self.values())

    def save(self, path: Path | str) -> None:
        """Writes the neurons as JSON (``.json``) or safetensors (any other ending)."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self._layers) + "\n", encoding="utf-8")
        else:
            save_file({name: np.asarray(ids, np.int64) for name, ids in self.items()}, path)

    @classmethod
    def load(cls, path: Path | str) -> Neurons:
        """Reads what :meth:`save` wrote.

        Raises:
            NemoBenchError: The file is missing or is no list of neurons.
        """
        path = Path(path)
        try:
            layers = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else load_file(path)
            arrays = {name: np.asarray(ids) for name, ids in layers.items()}
            for name, ids in arrays.items():
                if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                    raise TypeError(f"layer '{name}' has no list of whole numbers")
            return cls({name: ids.tolist() for name, ids in arrays.items()})
        except Exception as error:
            msg = f"{path}: no neurons can be read ({error}); expected JSON or safetensors of layer name to indices"
            raise NemoBenchError(msg) from error


Score = Annotated[float, BeforeValidator(lambda value: 0.0 if value is None else value)]
"""A similarity; one that is not finite is written as null and read as 0."""


@with_config(ConfigDict(extra="forbid", arbitrary_types_allowed=True))
@dataclass(frozen=True)
class Localization:
    """What localizing found for one prompt."""

    #: The memorization neurons (empty where the prompt is not memorized).
    neurons: Neurons = field(default_factory=Neurons)
    initial: Neurons = field(default_factory=Neurons)  #: The candidates before refinement.
    gate_score: Score = 0.0  #: Highest similarity of the noise differences of two seeds, nothing blocked, in [-1, 1].
    #: Highest similarity over kept seeds to the unblocked noise difference, initial neurons blocked.
    initial_score: Score = 0.0
    refined_score: Score = 0.0  #: The same with the refined neurons blocked.
    threshold: Score = 0.0  #: The threshold that refinement used.
    row_passes: int = 0  #: UNet forward passes of one sample spent.
    #: Whether some pair of seeds is more alike than the gate's threshold; None where nothing was asked.
    passed_gate: bool | None = None
    #: Whether the selection ran out before the noise differences of all seeds had changed; None where that is not
    #: known.
    exhausted: bool | None = None
    #: The memorization neurons by layer as the public scripts list them: in the order of selection, a neuron possibly
    #: twice. Empty where the protocol lists each once.
    listed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    listed_initial: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  #: The candidates likewise.
    #: How responsible every neuron is, by layer in network order; empty where that is not known. A record has a file of
    #: them instead.
    scores: SkipJsonSchema[Annotated[Mapping[str, NDArray[np.float32]], Field(exclude=True)]] = field(
        default_factory=dict, compare=False, repr=False
    )
