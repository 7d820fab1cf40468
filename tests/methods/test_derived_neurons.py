"""Neurons derived from another method's: worked out by hand, and free of the order of the prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench import ConfigError, Diffusion, Localization, NeMo, Neurons, Prompt
from nemo_bench.benchmark.plan import plan
from nemo_bench.config import grid
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import Method, OtherNeurons, RandomNeurons, Setup, SharedNeurons

# In network order, which is not that of the alphabet.
MODEL: Any = SimpleNamespace(masks=SimpleNamespace(widths={"first": 8, "deeper": 8}))
FOUND = [
    Neurons({"first": [1, 2], "deeper": [5]}),
    Neurons({"first": [1], "deeper": [5, 6]}),
    Neurons({"first": [1, 2], "deeper": [5]}),
    Neurons({"first": [7]}),
    Neurons(),
    Neurons(),
    Neurons(),
]
PROMPTS = [Prompt(str(i), "x", "VM" if i < 2 else None) for i in range(len(FOUND))]


def setup(method: Method, found: Sequence[Neurons], prompts: Sequence[Prompt] = (), model: Any = MODEL) -> None:
    """Gives a method the neurons that its source found for prompts "0", "1" ..."""
    localizations = {str(i): Localization(neurons) for i, neurons in enumerate(found)}
    method.setup(model, Setup(source_localizations=localizations, source_prompts=prompts))


def shared(found: Sequence[Neurons], k: int | None, of: Any, prompts: Sequence[Prompt] = ()) -> Neurons:
    method = SharedNeurons(NeMo(), k, of)
    setup(method, found, prompts)
    return method.localize(MODEL, Prompt("new", "x")).neurons


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
def test_shared_neurons_are_the_most_frequent(of: str, k: int, expected: dict[str, list[int]]) -> None:
    for found in itertools.islice(itertools.permutations(FOUND), 0, None, 501):
        assert shared(found, k, of) == Neurons(expected)


@pytest.mark.parametrize("of", ["model", "layer", "subgroups"])
def test_shared_neurons_of_empty_localizations_are_none(of: str) -> None:
    assert shared([Neurons()] * 2, 3, of) == Neurons()


@pytest.mark.parametrize(("k", "of"), [(None, "model"), (None, "layer"), (None, "subgroups"), (100, "model")])
def test_shared_neurons_count_only_memorized_prompts_where_any_is_marked(k: int | None, of: str) -> None:
    assert shared(FOUND, k, of, PROMPTS) == FOUND[0] | FOUND[1]


def test_shared_neurons_without_limit_have_a_title_of_their_own() -> None:
    assert SharedNeurons(NeMo(), k=None).title == "NeMo, one edit for all prompts"
    with pytest.raises(ConfigError, match="SharedNeurons: k=0; expected greater than or equal to 1"):
        SharedNeurons(NeMo(), k=0)


def test_shared_neurons_before_setup_are_an_error() -> None:
    with pytest.raises(ConfigError, match="call setup"):
        SharedNeurons(NeMo()).localize(MODEL, Prompt("a", "x"))


def test_shared_neurons_fail_where_the_source_failed_for_all_memorized_prompts() -> None:
    method = SharedNeurons(NeMo())
    method.setup(MODEL, Setup(source_localizations={"2": Localization(FOUND[2])}, source_prompts=PROMPTS))
    with pytest.raises(NotFiniteError, match="NeMo failed for all memorized prompts"):
        method.localize(MODEL, PROMPTS[2])


def test_other_neurons_are_those_of_another_memorized_prompt() -> None:
    method = OtherNeurons(NeMo())
    setup(method, FOUND, PROMPTS)
    drawn = [method.localize(MODEL, prompt).neurons for prompt in PROMPTS]
    assert drawn[:2] == [FOUND[1], FOUND[0]]
    new = {method.localize(MODEL, Prompt(f"new {i}", "x")).neurons for i in range(20)}
    assert {*drawn[2:]} <= {FOUND[0], FOUND[1]} == new


def test_other_neurons_skip_prompts_that_the_source_failed_for() -> None:
    method = OtherNeurons(NeMo())
    localizations = {"0": Localization(FOUND[0]), "2": Localization()}
    method.setup(MODEL, Setup(source_localizations=localizations, source_prompts=PROMPTS))
    assert method.localize(MODEL, PROMPTS[2]).neurons == FOUND[0]
    with pytest.raises(NotFiniteError, match="no neurons for another memorized prompt than '0'"):
        method.localize(MODEL, PROMPTS[0])


def test_run_without_another_memorized_prompt_fails_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"id": "a", "text": "x", "kind": "VM"}\n{"id": "b", "text": "y"}\n')
    general = "prompts.calibration=package:planted/prompts/calibration.txt"
    words = [f"prompts.files={tmp_path / 'one.jsonl'}", general, f"root={tmp_path}", "method=other_prompt"]
    with pytest.raises(ConfigError, match="no other memorized prompt for 'a'; give a list with two or more"):
        plan(grid(words))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_neurons_match_the_count_per_layer_and_avoid_the_source(tiny: Diffusion, data: st.DataObject) -> None:
    widths = tiny.masks.widths
    found = Neurons(
        {name: data.draw(st.lists(st.integers(0, width - 1), max_size=width)) for name, width in widths.items()}
    )
    method, prompt = RandomNeurons(NeMo(), seed=3), Prompt(data.draw(st.text(max_size=5)), "x")
    method.setup(tiny, Setup(source_localizations={prompt.id: Localization(found)}))
    drawn = method.localize(tiny, prompt).neurons
    assert drawn.count == min(found.count, sum(widths.values()) - found.count)
    assert (drawn - found).count == drawn.count
    for name, width in widths.items():
        taken = len(found.get(name, ()))
        if 2 * taken <= width:
            assert len(drawn.get(name, ())) >= taken
    assert drawn == method.localize(tiny, prompt).neurons


def test_random_neurons_are_drawn_once_for_all_prompts_on_request(tiny: Diffusion) -> None:
    layer = next(iter(tiny.value_layers))

    def draws(**options: Any) -> set[Neurons]:
        method = RandomNeurons(SharedNeurons(NeMo()), **options)
        setup(method, [Neurons({layer: [0, 1]})] * 8, model=tiny)
        return {method.localize(tiny, Prompt(str(i), "x")).neurons for i in range(8)}

    (one,) = draws(per_prompt=False)
    assert one[layer]
    assert not set(one[layer]) & {0, 1}
    assert draws(per_prompt=False, seed=1) != {one}
    assert len(draws()) > 1
