"""Neurons shared by all prompts: worked out by hand, and free of the order of the prompts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from nemo_bench import ConfigError, Diffusion, Localization, NeMo, Neurons, Prompt
from nemo_bench.methods import RandomNeurons, SharedNeurons
from nemo_bench.methods.base import Method

# In network order, which is not that of the alphabet.
WIDTHS = {"first": 8, "deeper": 8}
FOUND = [
    Neurons({"first": [1, 2], "deeper": [5]}),
    Neurons({"first": [1], "deeper": [5, 6]}),
    Neurons({"first": [1, 2], "deeper": [5]}),
    Neurons({"first": [7]}),
    Neurons(),
    Neurons(),
    Neurons(),
]


def chosen(method: Method, found: list[Neurons], model: Any) -> Neurons:
    method.fit({str(i): Localization(neurons) for i, neurons in enumerate(found)}, WIDTHS)
    return method.localize(model, Prompt("new", "x"), model.latents([0, 1])).neurons


# Counts: first 1 three times, first 2 twice, first 7 once; deeper 5 three times, deeper 6 once.
@pytest.mark.parametrize(
    ("of", "k", "expected"),
    [
        ("model", 1, {"first": [1]}),
        ("model", 2, {"first": [1], "deeper": [5]}),
        ("model", 4, {"first": [1, 2, 7], "deeper": [5]}),
        ("model", 100, {"first": [1, 2, 7], "deeper": [5, 6]}),
        ("layer", 1, {"first": [1], "deeper": [5]}),
        ("layer", 2, {"first": [1, 2], "deeper": [5, 6]}),
        ("subgroups", 1, {"first": [1, 2], "deeper": [5]}),
        ("subgroups", 2, {"first": [1, 2], "deeper": [5, 6]}),
        ("subgroups", 3, {"first": [1, 2, 7], "deeper": [5, 6]}),
    ],
)
def test_the_most_frequent_are_taken(tiny: Diffusion, of: Any, k: int, expected: dict[str, list[int]]) -> None:
    for found in itertools.islice(itertools.permutations(FOUND), 0, None, 501):
        assert chosen(SharedNeurons(NeMo(), k, of), list(found), tiny) == Neurons(expected)


@pytest.mark.parametrize("of", ["model", "layer", "subgroups"])
def test_where_nothing_was_found_nothing_is_blocked(tiny: Diffusion, of: Any) -> None:
    assert chosen(SharedNeurons(NeMo(), 3, of), [Neurons()] * 2, tiny) == Neurons()


def test_what_was_not_counted_is_not_blocked_in_silence(tiny: Diffusion) -> None:
    with pytest.raises(ConfigError, match="call fit"):
        SharedNeurons(NeMo()).localize(tiny, Prompt("a", "x"), tiny.latents([0, 1]))


def test_k_must_take_something() -> None:
    with pytest.raises(ConfigError, match="k of 1 or more, given 0"):
        SharedNeurons(NeMo(), k=0)


def test_random_neurons_are_drawn_once_for_all_prompts_on_request(tiny: Diffusion) -> None:
    layer = next(iter(tiny.value_layers))
    found, latents = Localization(Neurons({layer: [0, 1]})), tiny.latents([0, 1])

    def draws(**options: Any) -> set[Neurons]:
        method = RandomNeurons(SharedNeurons(NeMo()), **options)
        method.fit({str(i): found for i in range(8)}, tiny.masks.widths)
        return {method.localize(tiny, Prompt(str(i), "x"), latents).neurons for i in range(8)}

    (one,) = draws(per_prompt=False)
    assert one[layer]
    assert not set(one[layer]) & {0, 1}
    assert draws(per_prompt=False, seed=1) != {one}
    assert len(draws()) > 1
