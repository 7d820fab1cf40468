"""Neurons shared by all prompts: worked out by hand, and free of the order of the prompts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from nemo_bench import ConfigError, Diffusion, Localization, NeMo, Neurons, Prompt
from nemo_bench.benchmark.plan import plan
from nemo_bench.config import grid
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import OtherNeurons, RandomNeurons, SharedNeurons
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
    with pytest.raises(ConfigError, match="k of 1 or more, or null for all, given 0"):
        SharedNeurons(NeMo(), k=0)


PROMPTS = [Prompt(str(i), "x", "VM" if i < 2 else None) for i in range(len(FOUND))]


def test_only_memorized_prompts_are_counted_where_any_is_marked(tiny: Diffusion) -> None:
    found = {str(i): Localization(neurons) for i, neurons in enumerate(FOUND)}
    for k, of in ((None, "model"), (None, "layer"), (None, "subgroups"), (100, "model")):
        method = SharedNeurons(NeMo(), k, of)  # type: ignore[arg-type]
        method.fit(found, WIDTHS, PROMPTS)
        neurons = method.localize(tiny, PROMPTS[-1], tiny.latents([0, 1])).neurons
        assert neurons == FOUND[0] | FOUND[1]
    assert SharedNeurons(NeMo(), k=None).title == "NeMo, one edit for all prompts"


def test_another_prompts_neurons_are_those_of_a_memorized_one_and_never_its_own(tiny: Diffusion) -> None:
    method = OtherNeurons(NeMo())
    method.fit({str(i): Localization(neurons) for i, neurons in enumerate(FOUND)}, WIDTHS, PROMPTS)
    latents = tiny.latents([0, 1])
    drawn = [method.localize(tiny, prompt, latents).neurons for prompt in PROMPTS]
    assert drawn[:2] == [FOUND[1], FOUND[0]]
    new = {method.localize(tiny, Prompt(f"new {i}", "x"), latents).neurons for i in range(20)}
    assert {*drawn[2:]} <= {FOUND[0], FOUND[1]} == new
    # Those that the source failed for are not drawn, and one that is left alone fails in its turn.
    method.fit({"0": Localization(FOUND[0]), "2": Localization()}, WIDTHS, PROMPTS)
    assert method.localize(tiny, PROMPTS[2], latents).neurons == FOUND[0]
    with pytest.raises(NotFiniteError, match="no neurons for another memorized prompt than '0'"):
        method.localize(tiny, PROMPTS[0], latents)


def test_shared_neurons_fail_where_the_source_failed_for_all_memorized_prompts(tiny: Diffusion) -> None:
    method = SharedNeurons(NeMo())
    method.fit({"2": Localization(FOUND[2])}, WIDTHS, PROMPTS)
    with pytest.raises(NotFiniteError, match="NeMo failed for all memorized prompts"):
        method.localize(tiny, PROMPTS[2], tiny.latents([0, 1]))


def test_that_there_is_no_other_memorized_prompt_is_said_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"id": "a", "text": "x", "kind": "VM"}\n{"id": "b", "text": "y"}\n')
    general = "prompts.calibration=package:planted/prompts/calibration.txt"
    words = [f"prompts.files={tmp_path / 'one.jsonl'}", general, f"root={tmp_path}", "method=other_prompt"]
    with pytest.raises(ConfigError, match="no other memorized prompt for 'a'; give a list with two or more"):
        plan(grid(words))


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
