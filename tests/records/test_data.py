"""Plain data: neurons as sets by layer, their files, and the hash that names records."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from nemo_bench.errors import NemoBenchError
from nemo_bench.records.data import GENERAL, Neurons, Prompt
from nemo_bench.records.io import digest

LAYERS = st.dictionaries(
    st.sampled_from(["down.0", "down.1", "mid", "up.0", "schön"]), st.lists(st.integers(0, 300), max_size=8)
)
NEURONS = LAYERS.map(Neurons)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def pairs(neurons: Neurons) -> set[tuple[str, int]]:
    return {(layer, index) for layer, ids in neurons.items() for index in ids}


def shuffled(content: object) -> object:
    """The same content with the keys of every object the other way round."""
    if isinstance(content, dict):
        return {key: shuffled(content[key]) for key in reversed(list(content))}
    return [shuffled(item) for item in content] if isinstance(content, list) else content


@given(LAYERS)
def test_neurons_are_sorted_without_duplicates_or_empty_layers(layers: dict[str, list[int]]) -> None:
    neurons = Neurons(layers)
    assert list(neurons) == sorted(layer for layer, ids in layers.items() if ids)
    assert all(list(ids) == sorted(set(layers[layer])) for layer, ids in neurons.items())
    assert neurons.count == len({(layer, index) for layer, ids in layers.items() for index in ids})


@given(NEURONS, NEURONS)
def test_union_and_difference_are_those_of_sets(a: Neurons, b: Neurons) -> None:
    assert pairs(a | b) == pairs(a) | pairs(b)
    assert pairs(a - b) == pairs(a) - pairs(b)
    assert (a | b).count == (a - b).count + b.count
    assert a - a == Neurons() == {}


@given(NEURONS)
def test_equal_neurons_have_equal_hashes(neurons: Neurons) -> None:
    other = Neurons({layer: list(reversed(ids)) for layer, ids in reversed(list(neurons.items()))})
    assert other == neurons
    assert hash(other) == hash(neurons)
    assert len({other, neurons, neurons | Neurons({"new": [1]})}) == 2


def test_neurons_cannot_be_changed() -> None:
    layers = {"mid": [1]}
    neurons = Neurons(layers)
    with pytest.raises(TypeError):
        neurons["mid"] = (2,)  # type: ignore[index]
    with pytest.raises(TypeError):
        del neurons["mid"]  # type: ignore[attr-defined]
    before = neurons
    neurons |= Neurons({"mid": [5]})
    layers["mid"].append(7)
    assert before == {"mid": (1,)}
    assert neurons == {"mid": (1, 5)}


@given(NEURONS, st.sampled_from(["n.json", "n.safetensors"]))
@settings(max_examples=40)
def test_neurons_come_back_from_a_file(neurons: Neurons, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        neurons.save(Path(folder) / name)
        loaded = Neurons.load(str(Path(folder) / name))
    assert loaded == neurons
    assert all(type(index) is int for ids in loaded.values() for index in ids)
    assert repr(loaded) == repr(neurons)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("torn.json", b'{"mid": [1, 2'),
        ("list.json", b"[1, 2]"),
        ("number.json", b'{"mid": 5}'),
        ("words.json", b'{"mid": ["x"]}'),
        ("latin.json", b'{"m\xfcd": [1]}'),
        ("junk.safetensors", b"no safetensors"),
        ("empty.safetensors", b""),
    ],
)
def test_a_bad_file_of_neurons_is_an_error_that_names_it(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NemoBenchError, match=rf"{name}: no neurons can be read.*expected JSON or safetensors"):
        Neurons.load(tmp_path / name)


@pytest.mark.parametrize("ids", ["12", [1.5], {"1": 0}], ids=["text", "fraction", "object"])
def test_what_is_no_list_of_whole_numbers_is_not_guessed_at(tmp_path: Path, ids: object) -> None:
    (tmp_path / "n.json").write_text(json.dumps({"mid": ids}))
    with pytest.raises(NemoBenchError, match=r"n\.json"):
        Neurons.load(tmp_path / "n.json")


def test_a_safetensors_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    save_file({"mid": np.zeros((2, 3), np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(NemoBenchError, match=r"weights\.safetensors"):
        Neurons.load(tmp_path / "weights.safetensors")


def test_a_missing_file_of_neurons_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NemoBenchError, match=r"gone\.json"):
        Neurons.load(tmp_path / "gone.json")


def test_digest_has_the_values_it_always_had() -> None:
    # Ids of records on disk: a change of these makes every result there foreign.
    assert digest(["a"]) == "0eb5b8d6f81bc677"
    assert digest({"b": 1, "a": [1.5, None, "é"]}) == "4fa79d67d7df922b"
    assert digest(["a"], 4) == "0eb5"


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_digest_does_not_depend_on_the_order_of_keys(content: dict[str, object]) -> None:
    assert digest(shuffled(content)) == digest(content)
    assert digest(json.loads(json.dumps(content))) == digest(content)


def test_digest_depends_on_order_and_types_of_values() -> None:
    assert len({digest(c) for c in ([1, 2], [2, 1], ["1", 2], [12], {"1": 2}, [[1], 2])}) == 6


def test_prompts_are_grouped_by_kind() -> None:
    assert [Prompt("i", "t", kind).group for kind in ("VM", "TM", None)] == ["VM", "TM", GENERAL]
