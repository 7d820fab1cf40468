"""Neurons of localizers, and what deleting them is measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_bench import Diffusion, Prompt
from nemo_bench.errors import NotFiniteError
from nemo_bench.localization.localizers import HardConcrete, NemoLocalizer, OutlierScore, RandomOrder
from nemo_bench.methods import Deletion, LocalizedNeurons, Setup
from nemo_bench.records.data import Localization, Neurons
from nemo_bench.records.io import write_json
from nemo_bench.records.truth import Truth

PROMPTS = [Prompt("a", "red sun map", "VM"), Prompt("b", "fox big hat", "TM"), Prompt("c", "cup dog ice")]


def test_as_many_neurons_are_blocked_as_are_known_to_memorize(tiny: Diffusion, tmp_path: Path) -> None:
    first = next(iter(tiny.masks.widths))
    truth = tmp_path / "truth.json"
    write_json(truth, Truth(schema=1, neurons={"a": Neurons({first: [0, 2, 5]})}))
    method = LocalizedNeurons(RandomOrder(share=0.25), truth=str(truth))
    method.setup(tiny, Setup(prompts=PROMPTS))
    assert method.localize(tiny, PROMPTS[0]).neurons.count == 3
    assert method.localize(tiny, PROMPTS[1]).neurons.count == sum(tiny.masks.widths.values()) // 4
    assert method.fingerprint(PROMPTS) != LocalizedNeurons(RandomOrder(share=0.25)).fingerprint(PROMPTS)
    assert method.fingerprint(PROMPTS) == replace(method).fingerprint([*PROMPTS, Prompt("d", "other")])


def test_known_neurons_matter_to_localizers_that_take_their_number_alone(tmp_path: Path) -> None:
    truth = tmp_path / "truth.json"
    write_json(truth, Truth(schema=1, neurons={"a": Neurons({"mid": [0, 2, 5]})}))
    for localizer in (NemoLocalizer(), RandomOrder(number=2)):
        known = LocalizedNeurons(localizer, truth=str(truth)).fingerprint(PROMPTS)
        assert known == LocalizedNeurons(localizer).fingerprint(PROMPTS) == {"truth": None}


def test_general_prompts_are_localized_only_where_no_prompt_is_marked(tiny: Diffusion) -> None:
    method = LocalizedNeurons(RandomOrder(number=2))
    method.setup(tiny, Setup(prompts=PROMPTS))
    assert method.localize(tiny, PROMPTS[2]) == Localization()
    method.setup(tiny, Setup(prompts=[prompt._replace(kind=None) for prompt in PROMPTS]))
    assert method.localize(tiny, PROMPTS[2]).neurons.count == 2


def test_what_a_localizer_needs_is_needed() -> None:
    assert LocalizedNeurons(HardConcrete()).needs == {"gradients"}
    assert not LocalizedNeurons(RandomOrder()).needs_calibration
    statistics, threshold = LocalizedNeurons(OutlierScore()), LocalizedNeurons(NemoLocalizer())
    assert statistics.needs_calibration
    assert not statistics.calibrates_threshold
    assert threshold.calibrates_threshold
    reference = LocalizedNeurons(NemoLocalizer(protocol="reference", threshold=0.4))
    assert reference.noise_protocol.name == "reference"
    assert not reference.calibrates_threshold


def test_deletion_takes_own_neurons_and_lends_them_to_general_prompts(tiny: Diffusion) -> None:
    found = {"a": Localization(Neurons({"mid": [1]})), "b": Localization(Neurons({"mid": [2]}))}
    method = Deletion(LocalizedNeurons(RandomOrder()))
    method.setup(tiny, Setup(prompts=PROMPTS, source_prompts=PROMPTS, source_localizations=found))
    assert method.title == "Random order"
    assert [method.localize(tiny, prompt) for prompt in PROMPTS[:2]] == [found["a"], found["b"]]
    assert method.localize(tiny, PROMPTS[2]).neurons in [found["a"].neurons, found["b"].neurons]
    # One that failed lends nothing, and has none itself.
    method.setup(tiny, Setup(prompts=PROMPTS, source_prompts=PROMPTS, source_localizations={"b": found["b"]}))
    assert method.localize(tiny, PROMPTS[2]).neurons == found["b"].neurons
    with pytest.raises(NotFiniteError, match="found no neurons"):
        method.localize(tiny, PROMPTS[0])
