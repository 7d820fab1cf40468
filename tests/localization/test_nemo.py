"""NeMo against the plain, slow implementation in reference_nemo.py, which shares no code with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import reference_nemo
from nemo_bench import Calibration, Diffusion, Localization, NeMo, Neurons, Prompt, read_prompts, resolve
from nemo_bench.config import grid
from nemo_bench.diffusion import Similarity
from nemo_bench.errors import NotFiniteError
from nemo_bench.localization import (
    PAPER,
    REFERENCE,
    NemoSettings,
    activation_statistics,
    localize,
    nemo,
    threshold,
)
from nemo_bench.localization.nemo import (
    Candidates,
    Refinement,
    Trial,
    above,
    as_neurons,
    away_from,
    initial_selection,
    select,
    selection_rounds,
)
from nemo_bench.localization.noise_differences import noise_differences, pair_similarities, pair_values, similarity
from nemo_bench.methods import Setup
from nemo_bench.prompts.tasks import seeds_of
from tiny import tiny_pipeline, tiny_sdxl, tiny_texts


@pytest.mark.parametrize("where", ["noise", "blocked", "threshold"])
def test_values_that_are_not_finite_are_an_error(tiny: Diffusion, tiny_calibration: Calibration, where: str) -> None:
    text, latents, settings_ = tiny.encode(tiny_texts(1)), tiny.latents(range(3)), NemoSettings()
    if where == "noise":
        latents[1, 0, 0, 0] = torch.nan
    elif where == "blocked":
        settings_ = replace(settings_, factor=float("nan"))
    else:
        tiny_calibration = replace(tiny_calibration, threshold=float("nan"))
    messages = {"noise": "with nothing blocked are not", "blocked": "neurons blocked are not", "threshold": "no memor"}
    with pytest.raises(NotFiniteError, match=messages[where]):
        localize(tiny, text, latents, tiny_calibration, settings_)


def agree(
    model: Diffusion,
    text: str,
    latents: Tensor,
    calibration: Calibration,
) -> reference_nemo.Result:
    """Asserts that both implementations find the same by the protocol of the paper, as far as rounding can tell."""
    found = localize(model, model.encode([text]), latents, calibration, NemoSettings(), PAPER, batch_size=7)
    plain = reference_nemo.localize(
        model.pipeline,
        text,
        latents,
        calibration.mean,
        calibration.std,
        calibration.threshold,
        reference_nemo.ms_ssim if model.similarity.betas else reference_nemo.ssim,
    )
    assert_same(found, plain, near=1e-5)
    assert found.listed == found.listed_initial == {}
    return plain


def assert_same(found: Localization, plain: reference_nemo.Result, near: float) -> None:
    assert plain.margin > near, "the case is too near a threshold to compare two implementations; choose another"
    assert found.neurons == Neurons(plain.refined)
    assert found.initial == Neurons(plain.initial)
    assert found.gate_score == pytest.approx(max(plain.gate_scores), abs=1e-4)
    assert found.initial_score == pytest.approx(plain.initial_score, abs=1e-4)
    assert found.refined_score == pytest.approx(plain.refined_score, abs=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("tau", [0.3, 0.5, 0.65])
def test_same_neurons_on_random_weights(prediction_type: str, tau: float) -> None:
    model = Diffusion(tiny_pipeline(prediction_type=prediction_type), similarity=Similarity(1.0, ()))
    texts = tiny_texts(24)
    mean, std = activation_statistics(model, [texts[4:]])
    results = [agree(model, t, model.latents(range(5)), Calibration(mean, std, tau, 20)) for t in texts[:2]]
    if prediction_type == "epsilon":
        assert any(Neurons(r.refined).count for r in results)


def test_same_neurons_where_outliers_are_selected() -> None:
    model = Diffusion(tiny_pipeline(seed=1), similarity=Similarity(1.0, ()))
    texts = tiny_texts(24)
    mean, std = activation_statistics(model, [texts[4:]])
    narrow = Calibration(mean, {name: 0.05 * s for name, s in std.items()}, 0.5, 20)
    plain = agree(model, texts[0], model.latents(range(5)), narrow)
    assert plain.k == 0


def test_same_neurons_where_the_selection_runs_out() -> None:
    model = Diffusion(tiny_pipeline(seed=3), similarity=Similarity(1.0, ()))
    texts = tiny_texts(24)
    mean, std = activation_statistics(model, [texts[4:]])
    plain = agree(model, texts[0], model.latents(range(4)), Calibration(mean, std, 0.05, 20))
    assert (plain.theta, plain.k) == (1.25, 15)
    assert plain.tau_refine != plain.tau


def test_same_neurons_with_the_published_similarity() -> None:
    model = Diffusion(tiny_pipeline(sample_size=48), similarity=Similarity())
    texts = tiny_texts(12)
    mean, std = activation_statistics(model, [texts[2:]])
    plain = agree(model, texts[0], model.latents(range(3)), Calibration(mean, std, 0.5, 10))
    assert plain.kept


@pytest.mark.parametrize("index", [1, 9])
def test_same_neurons_on_the_embedded_model(planted: Diffusion, planted_prompts: list[Prompt], index: int) -> None:
    settings = grid(["method=nemo"])[0].settings
    texts = [p.text for p in read_prompts(resolve(str(settings.prompts.calibration)), limit=24)]
    mean, std = activation_statistics(planted, [texts])
    pairs: list[float] = []
    for text in texts[:8]:
        differences = noise_differences(planted, planted.encode([text]).rows([0] * 4), planted.latents(range(4)))
        pairs += pair_values(pair_similarities(differences, planted.similarity)).tolist()
    prompt = planted_prompts[index]
    latents = planted.latents(seeds_of(prompt, "localize", range(4)))
    agree(planted, prompt.text, latents, Calibration(mean, std, threshold(pairs), len(texts)))


def test_a_prompt_that_is_not_memorized_has_no_neurons(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    strict = replace(tiny_calibration, threshold=0.9999)
    found = localize(tiny, tiny.encode(tiny_texts(1)), tiny.latents(range(3)), strict, NemoSettings())
    assert not found.neurons
    assert not found.initial
    assert found.row_passes == 3


def test_the_result_says_whether_the_gate_was_passed_and_the_selection_exhausted(
    tiny: Diffusion, tiny_calibration: Calibration
) -> None:
    """With a threshold below what any blocking reaches the selection runs out, whoever passed the gate."""
    text, latents = tiny.encode(tiny_texts(1)), tiny.latents(range(3))
    calibration = replace(tiny_calibration, threshold=-1.0)
    highest = localize(tiny, text, latents, calibration, NemoSettings()).gate_score

    def found(maxima: float | None = None, **options: str) -> Localization:
        settings = NemoSettings(**options)  # type: ignore[arg-type]
        return localize(tiny, text, latents, replace(calibration, maxima=maxima), settings)

    ran_out = found()
    assert (ran_out.passed_gate, ran_out.exhausted) == (True, True)
    assert ran_out.neurons
    assert ran_out.initial_score == ran_out.threshold > calibration.threshold
    alone = found(when_exhausted="nothing")
    assert (alone.passed_gate, alone.exhausted, alone.neurons) == (True, True, Neurons())
    assert (alone.initial, alone.initial_score) == (ran_out.initial, ran_out.initial_score)
    assert found(highest - 1e-3, gate="maxima").passed_gate
    kept_out = found(highest + 1e-3, gate="maxima")
    assert (kept_out.passed_gate, kept_out.exhausted, kept_out.neurons) == (False, False, Neurons())
    assert kept_out.threshold == highest + 1e-3
    for neurons in ("refined", "initial"):
        method = NeMo(neurons=neurons, when_exhausted="nothing")  # type: ignore[arg-type]
        method.setup(tiny, Setup(calibration=calibration))
        assert method.localize(tiny, Prompt("a", tiny_texts(1)[0]), latents).neurons == Neurons()


def test_localizing_leaves_the_weights_unchanged(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    before = tiny.state_digest()
    localize(tiny, tiny.encode(tiny_texts(1)), tiny.latents(range(3)), tiny_calibration, NemoSettings())
    assert tiny.state_digest() == before


def test_select_lists_outliers_then_the_most_active_once() -> None:
    mean, std = {"layer": torch.zeros(5)}, {"layer": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])}
    calibration = Calibration(mean, std, 0.5, 9)
    activation = {"layer": torch.tensor([6.0, 1.0, 7.0, 0.5, 8.0])}
    settings = NemoSettings()
    assert select(activation, calibration, 5.0, 0, settings) == [
        ("layer", 0),
        ("layer", 2),
        ("layer", 3),
        ("layer", 4),
    ]
    assert select(activation, calibration, 7.5, 3, settings) == [
        ("layer", 3),
        ("layer", 4),
        ("layer", 2),
        ("layer", 0),
    ]


def test_reference_protocol_lists_neurons_twice(tiny: Diffusion) -> None:
    mean, std = {"layer": torch.zeros(3)}, {"layer": torch.ones(3)}
    activation = {"layer": torch.tensor([6.0, 1.0, 7.0])}
    twice = select(activation, Calibration(mean, std, 0.5, 9), 5.0, 2, NemoSettings(), duplicates=True)
    assert twice == [("layer", 0), ("layer", 2), ("layer", 2), ("layer", 0)]


SEEDS = 4
"""Seeds a prompt, of the ten in the scripts."""
SIMILARITIES = {16: Similarity(1.0, ()), 24: Similarity(0.9, (0.33, 0.33)), 48: Similarity()}
"""One, two and three scales, by side of the latents; with one scale the range is 1 whatever is compared."""


@cache
def scripts_model(prediction_type: str, side: int) -> tuple[Diffusion, Calibration]:
    pipeline = tiny_pipeline(prediction_type=prediction_type, sample_size=side)
    model = Diffusion(pipeline, similarity=SIMILARITIES[side])
    mean, std = activation_statistics(model, [tiny_texts(24)[8:]])
    # Narrow, so that outliers are found beside the most active neurons, and some neurons are both.
    return model, Calibration(mean, {name: 0.5 * values for name, values in std.items()}, 0.5, 16)


def as_the_scripts(
    text: str,
    tau: float,
    prediction_type: str = "epsilon",
    side: int = 16,
    seeds: int = SEEDS,
    method: NeMo | None = None,
    **changed: Any,
) -> reference_nemo.Result:
    """Asserts that `protocol=reference` gives the neurons of the scripts: all of them, in their order, as often."""
    model, calibration = scripts_model(prediction_type, side)
    method = method or NeMo(protocol="reference")
    method.setup(model, Setup(calibration=replace(calibration, threshold=tau)))
    latents = method.noise_protocol.latents(model, range(seeds))
    found = method.localize(model, Prompt("p", text), latents)
    plain_similarity = {
        16: reference_nemo.ssim,
        24: partial(reference_nemo.product_of_scales, sigma=0.9, betas=(0.33, 0.33)),
        48: reference_nemo.ms_ssim,
    }[side]
    plain = reference_nemo.localize(
        model.pipeline,
        text,
        reference_nemo.scripts_latents(model.pipeline, seeds),
        calibration.mean,
        calibration.std,
        tau,
        **{
            **reference_nemo.SCRIPTS,
            "similarity": partial(plain_similarity, measure=method.noise_protocol.similarity),
            **changed,
        },
    )
    assert_same(found, plain, near=1e-6)
    layers = list(model.value_layers)
    assert [found.listed_initial.get(layer, ()) for layer in layers] == [tuple(plain.initial[n]) for n in layers]
    assert [found.listed.get(layer, ()) for layer in layers] == [tuple(plain.refined[n]) for n in layers]
    return plain


def count(neurons: Mapping[str, Sequence[int]]) -> int:
    return sum(map(len, neurons.values()))


@cache
def plainly() -> reference_nemo.Result:
    return as_the_scripts(tiny_texts(2)[1], 0.45)


def test_reference_protocol_finds_the_neurons_of_the_scripts() -> None:
    results = [plainly(), *(as_the_scripts(text, 0.45) for text in tiny_texts(3)[::2])]
    assert all(count(plain.refined) > 3 for plain in results)
    assert any(count(plain.initial) > Neurons(plain.initial).count for plain in results), "nothing is listed twice"


@pytest.mark.parametrize(("side", "tau", "seeds"), [(24, 0.6, 4), (48, 0.4, 2)])
def test_reference_protocol_finds_the_neurons_of_the_scripts_with_several_scales(
    side: int, tau: float, seeds: int
) -> None:
    """The data range is that of all seeds then, and another one at every scale."""
    plain = as_the_scripts(tiny_texts(2)[1], tau, side=side, seeds=seeds)
    assert count(plain.refined) > 0


def test_reference_protocol_where_the_selection_of_the_scripts_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one entry of two a score is what it was, which is not below the one that the selection ended with."""
    monkeypatch.setattr(reference_nemo, "THETA_STEP", 1.5)
    plain = as_the_scripts(tiny_texts(2)[1], 0.05, method=NeMo(protocol="reference", theta_step=1.5))
    assert (plain.theta, plain.k) == (2.0, 2)
    assert plain.tau_refine == plain.initial_score > 0.05
    assert count(plain.refined) > 0


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"similarity": "current"}, {}),
        ({"guidance": 3.0}, {"guidance": 3.0}),
        ({"initial_k": 6}, {"initial_k": 6}),
        ({"gate_threshold": 0.8}, {"gate_tau": 0.8}),
        ({"refine_threshold": 0.7}, {"refine_tau": 0.7}),
        ({"outliers": False}, {"with_outliers": False}),
    ],
)
def test_reference_protocol_with_the_flags_of_the_scripts(options: dict[str, Any], same: dict[str, Any]) -> None:
    changed = as_the_scripts(tiny_texts(2)[1], 0.45, method=NeMo(protocol="reference", **options), **same)
    assert changed != plainly()


def test_reference_protocol_takes_velocity_for_noise_as_the_scripts_do() -> None:
    raw = as_the_scripts(tiny_texts(2)[1], 0.45, "v_prediction")
    assert raw == plainly(), "the same network, whatever it is said to predict"
    converted = NeMo(protocol="reference", velocity="converted")
    assert as_the_scripts(tiny_texts(2)[1], 0.45, "v_prediction", method=converted, raw=False) != raw


def test_similarity_is_of_all_seeds_compared_at_once_whatever_the_batch_size() -> None:
    """With an inferred range a test decided on its first seed would have another similarity."""
    model, _ = scripts_model("epsilon", 24)
    latents, text = REFERENCE.latents(model, range(SEEDS)), model.encode(tiny_texts(1))
    trial, small = (Trial(model, text, latents, protocol=REFERENCE, batch_size=size) for size in (32, 3))
    candidates = [(layer, index) for layer in model.value_layers for index in (0, 3)]
    with torch.no_grad():
        for each in (trial, small):
            each.keep(torch.tensor([True, False, True, True]))
        together = trial.similarities([(candidates, range(3))])[0]
        with model.block(as_neurons(candidates)):
            changed = noise_differences(model, text.rows([0] * SEEDS), latents, REFERENCE)[[0, 2, 3]]
        assert torch.equal(together, similarity(trial.original, changed, model.similarity, "published"))
        assert torch.equal(torch.cat([trial.similarities([(candidates, [s])])[0] for s in range(3)]), together)
        alone = [similarity(trial.original[[s]], changed[[s]], model.similarity, "published") for s in range(3)]
        assert (torch.cat(alone) - together).abs().max() > 1e-4
        torch.testing.assert_close(small.similarities([(candidates, range(3))])[0], together)
        assert trial.row_passes == 2 * SEEDS


def test_a_replayed_test_is_that_of_the_scripts_to_the_last_bit() -> None:
    """Strict comparison with a similarity that a selection ended with: nothing may be rounded otherwise."""
    model, _ = scripts_model("epsilon", 16)
    trial, plain = (
        Trial(model, model.encode(tiny_texts(1)), REFERENCE.latents(model, range(SEEDS)), protocol=REFERENCE)
        for _ in range(2)
    )
    everything = [(layer, index) for layer in model.value_layers for index in range(6)]
    with torch.no_grad():
        trial.record(everything)
        for layer in model.value_layers:
            test = ([neuron for neuron in everything if neuron != (layer, 0)], range(SEEDS))
            assert torch.equal(trial.similarities([test], layer)[0], plain.similarities([test])[0])


@cache
def draw_rule(salt: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng([salt, seed])
    return rng.uniform(-0.05, 0.25, 16), rng.uniform(-0.1, 0.1, (16, 16))


class ScriptedTrial:
    """Stands in for a Trial: similarities by a rule that knows interactions, so that dropping can raise and lower."""

    protocol, batch_size = REFERENCE, 8

    def __init__(self, seeds: int, salt: int, joint: bool = False) -> None:
        self.seeds, self.salt, self.joint, self.row_passes = seeds, salt, joint, 0

    def value(self, candidates: Candidates, seed: int) -> float:
        places = [("abcd".index(layer) * 5 + index) % 16 for layer, index in sorted(set(candidates))]
        weights, pairs = draw_rule(self.salt, seed)
        return float(1 - weights[places].sum() - np.triu(pairs[np.ix_(places, places)], 1).sum())

    def similarities(self, tests: list[tuple[Candidates, list[int]]], layer: str | None = None) -> list[Tensor]:
        self.row_passes += sum(len(seeds) for _, seeds in tests)
        return [torch.tensor([self.value(c, s) for s in seeds], dtype=torch.float64) for c, seeds in tests]

    def record(self, candidates: Candidates) -> Tensor:
        return self.similarities([(candidates, list(range(self.seeds)))])[0]

    def slopes(self, candidates: Candidates, seeds: list[int]) -> Tensor:
        rests = [[other for other in candidates if other != neuron] for neuron in candidates]
        rows = self.row_passes + 2 * len(seeds)
        slopes = (torch.stack([self.record(rest) for rest in rests]) - self.record(candidates))[:, seeds]
        self.row_passes = rows
        return slopes

    def rows(self, seeds: int) -> int:
        return seeds

    def highest(self, candidates: Candidates) -> float:
        return max(self.value(candidates, seed) for seed in range(self.seeds))


def plain_refinement(trial: ScriptedTrial, candidates: Candidates, lost: Callable[[Candidates], bool]) -> Candidates:
    kept = list(candidates)
    layers = list(dict.fromkeys(layer for layer, _ in kept))[::-1]
    for layer in layers:
        rest = [n for n in kept if n[0] != layer]
        kept = kept if lost(rest) else rest
    for layer in layers:
        for neuron in [n for n in kept if n[0] == layer]:
            rest = list(kept)
            rest.remove(neuron)
            kept = kept if lost(rest) else rest
    return kept


candidate_lists = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 4)), min_size=1, max_size=16).map(
    lambda neurons: sorted(neurons, key=lambda neuron: neuron[0])
)


@given(
    candidates=candidate_lists,
    seeds=st.integers(1, 6),
    salt=st.integers(0, 10_000),
    slack=st.just(0.0) | st.floats(-0.1, 0.6),
)
def test_refinement_is_the_plain_sequence_of_tests(candidates: Candidates, seeds: int, salt: int, slack: float) -> None:
    trial = ScriptedTrial(seeds, salt, joint=bool(salt % 2))
    tau = trial.highest(candidates) + slack
    refinement = Refinement(trial, candidates, trial.record(candidates), above(tau))  # type: ignore[arg-type]
    refinement.sequential()
    expected = plain_refinement(trial, candidates, lambda rest: trial.highest(rest) >= tau)
    assert refinement.kept == expected
    assert refinement.values.tolist() == [trial.value(expected, seed) for seed in range(seeds)]


@given(candidates=candidate_lists, seeds=st.integers(1, 6), salt=st.integers(0, 10_000), part=st.floats(0.05, 2))
def test_relative_refinement_is_the_plain_sequence_of_tests(
    candidates: Candidates, seeds: int, salt: int, part: float
) -> None:
    trial = ScriptedTrial(seeds, salt)

    def lost(rest: Candidates) -> bool:
        changes = [(trial.value(rest, s), trial.value(candidates, s)) for s in range(seeds)]
        return any(abs(now - before) / abs(before) >= part for now, before in changes)

    values = trial.record(candidates)
    refinement = Refinement(trial, candidates, values, away_from(values, part))  # type: ignore[arg-type]
    refinement.sequential()
    assert refinement.kept == plain_refinement(trial, candidates, lost)


class MonotoneTrial(ScriptedTrial):
    """Every neuron lowers every similarity, whatever else is blocked."""

    def value(self, candidates: Candidates, seed: int) -> float:
        places = [("abcd".index(layer) * 5 + index) % 16 for layer, index in sorted(set(candidates))]
        return float(1 - np.abs(draw_rule(self.salt, seed)[0][places]).sum())


@pytest.mark.parametrize("kind", [ScriptedTrial, MonotoneTrial])
@given(candidates=candidate_lists, seeds=st.integers(1, 6), salt=st.integers(0, 10_000), slack=st.floats(0, 0.6))
def test_refinement_by_margin_is_the_sequence_unless_a_seed_crosses_the_limit_and_comes_back(
    kind: type[ScriptedTrial], candidates: Candidates, seeds: int, salt: int, slack: float
) -> None:
    trial = kind(seeds, salt)
    tau = trial.highest(candidates) + slack
    refinement = Refinement(trial, candidates, trial.record(candidates), above(tau))  # type: ignore[arg-type]
    refinement.sequential(near=0.05)
    kept = refinement.kept
    assert refinement.values.tolist() == [trial.value(kept, seed) for seed in range(seeds)]
    assert set(kept) == set(candidates) or trial.highest(kept) < tau
    if kind is MonotoneTrial:
        assert kept == plain_refinement(trial, candidates, lambda rest: trial.highest(rest) >= tau)


@given(candidates=candidate_lists, seeds=st.integers(1, 6), salt=st.integers(0, 10_000), slack=st.floats(0, 0.6))
@example(candidates=[("a", 0), ("a", 3)], seeds=2, salt=4876, slack=0.125)
def test_bisection_satisfies_the_same_criterion(candidates: Candidates, seeds: int, salt: int, slack: float) -> None:
    trial = ScriptedTrial(seeds, salt)
    tau = trial.highest(candidates) + slack
    refinement = Refinement(trial, candidates, trial.record(candidates), above(tau))  # type: ignore[arg-type]
    with mock.patch.object(refinement, "sequential", wraps=refinement.sequential) as fallback:
        refinement.bisect()
    kept = refinement.kept
    assert set(kept) <= set(candidates)
    assert set(kept) == set(candidates) or trial.highest(kept) < tau
    assert len(kept) == len(set(kept))
    for neuron in () if fallback.called else kept:
        assert trial.highest([other for other in kept if other != neuron]) >= tau


def test_bisection_goes_on_one_by_one_where_it_does_not_pay() -> None:
    """The neurons of the smallest slopes are those that can't be dropped here."""
    candidates = [("a", index) for index in range(60)]
    needed = set(candidates[:3])

    class Misleading(ScriptedTrial):
        def value(self, candidates: Candidates, seed: int) -> float:
            return 1 - 0.3 * len(needed & set(candidates)) - 0.001 * len(candidates)

        def slopes(self, candidates: Candidates, seeds: list[int]) -> Tensor:
            return torch.tensor([[-1.0 if neuron in needed else 1.0] * len(seeds) for neuron in candidates])

    trials = [Misleading(10, 0) for _ in range(2)]
    found = []
    for trial, run in zip(trials, (Refinement.bisect, Refinement.sequential), strict=True):
        refinement = Refinement(trial, candidates, trial.record(candidates), above(0.2))  # type: ignore[arg-type]
        with mock.patch.object(refinement, "sequential", wraps=refinement.sequential) as fallback:
            run(refinement)
        found.append(refinement.kept)
        assert fallback.called == (run is Refinement.bisect)
    assert found[0] == found[1] == candidates[:3]
    assert trials[0].row_passes < trials[1].row_passes


@settings(max_examples=40)
@given(
    seeds=st.integers(1, 6),
    salt=st.integers(0, 10_000),
    tau=st.floats(-1.5, 0.999),
    outliers=st.booleans(),
    initial_k=st.integers(0, 30),
)
def test_selection_is_the_first_round_that_changes_all_seeds(
    seeds: int, salt: int, tau: float, outliers: bool, initial_k: int
) -> None:
    trial = ScriptedTrial(seeds, salt, joint=bool(salt % 2))
    rng = np.random.default_rng(salt)
    activation = {layer: torch.from_numpy(rng.uniform(0, 6, 20)) for layer in "abcd"}
    zero, one = ({layer: torch.full((20,), value) for layer in "abcd"} for value in (0.0, 1.0))
    calibration = Calibration(zero, one, tau, 9)
    options = NemoSettings(outliers=outliers, initial_k=initial_k)
    with pytest.MonkeyPatch.context() as patch:
        # The plain implementation takes its time for 1280 rounds.
        patch.setattr(nemo, "LAST_K", 40)
        patch.setattr(reference_nemo, "K_END", 40)
        found, values, reached = initial_selection(trial, activation, calibration, tau, options)  # type: ignore[arg-type]
        plain = reference_nemo.initial_selection(
            activation,
            zero,
            one,
            lambda blocked: trial.highest([(layer, i) for layer, ids in blocked.items() for i in ids]),
            tau,
            duplicates=True,
            with_outliers=outliers,
            initial_k=initial_k,
        )
    assert found == [(layer, i) for layer, ids in plain.neurons.items() for i in ids]
    assert (float(values.max()), reached) == (plain.score, plain.score <= tau)


def test_without_outliers_the_selection_goes_on_to_1280_most_active() -> None:
    """Sixteen rounds are not the end where theta is switched off (`outliers=false` of the public scripts)."""
    activation = {"wide": torch.arange(2000.0)}
    calibration = Calibration({"wide": torch.zeros(2000)}, {"wide": torch.ones(2000)}, 0.5, 9)
    rounds = list(selection_rounds(activation, calibration, NemoSettings(outliers=False), duplicates=True))
    assert [len(candidates) for candidates in rounds] == list(range(1280))
    late = NemoSettings(outliers=False, initial_k=1279)
    assert list(selection_rounds(activation, calibration, late, duplicates=True)) == rounds[-1:]


@pytest.mark.parametrize("layers", ["down+mid", "all"])
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl])
def test_a_test_does_not_depend_on_its_batch_or_on_replay(
    make: Callable[[], DiffusionPipeline], layers: Literal["down+mid", "all"]
) -> None:
    tiny = Diffusion(make(), layers=layers, similarity=Similarity(1.0, ()))
    trial = Trial(tiny, tiny.encode(tiny_texts(1)), tiny.latents(range(5)), batch_size=4)
    everything = [(layer, i) for layer in tiny.value_layers for i in range(6)]
    with torch.no_grad():
        whole = trial.record(everything)
        assert torch.allclose(whole, trial.similarities([(everything, range(5))])[0], atol=1e-5)
        for layer in tiny.value_layers:
            tests = [([n for n in everything if n != (layer, i)], [4, i]) for i in range(3)]
            replayed = trial.similarities(tests, layer)
            alone = [torch.cat([trial.similarities([(c, [s])])[0] for s in seeds]) for c, seeds in tests]
            assert torch.allclose(torch.stack(replayed), torch.stack(alone), atol=1e-5)
            assert not torch.allclose(torch.stack(replayed), whole[4], atol=1e-3)
    assert as_neurons(everything).count == 6 * len(tiny.value_layers)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_slopes_are_those_of_finite_differences(tiny: Diffusion, factor: float) -> None:
    model = tiny
    with torch.inference_mode():
        text = model.encode(tiny_texts(1))
        trial = Trial(model, text, model.latents(range(3)), factor)
        candidates = [(layer, i) for layer in model.value_layers for i in (0, 3)]
        slopes = trial.slopes(candidates, range(3))
        assert trial.row_passes == 3 + 2 * 3
        step = 1e-2
        factors = model.masks.factors([as_neurons(candidates)] * 3, factor)
        for place, (layer, index) in enumerate(candidates):
            values = []
            for sign in (1, -1):
                nudged = {name: value.clone() for name, value in factors.items()}
                nudged[layer][:, index] += sign * step
                with model.masks.scale(nudged):
                    changed = noise_differences(model, text.rows([0] * 3), trial.latents)
                values.append(similarity(trial.original, changed, model.similarity))
            expected = (values[0] - values[1]) / (2 * step) * (1 - factor)
            torch.testing.assert_close(slopes[place], expected, rtol=0.05, atol=1e-3)
        assert slopes.abs().max() > 0.05


def test_bisection_keeps_the_prompt_unmemorized(planted: Diffusion, planted_prompts: list[Prompt]) -> None:
    texts = [p.text for p in planted_prompts]
    mean, std = activation_statistics(planted, [texts])
    text, latents = planted.encode(texts[:1]), planted.latents(range(4))
    calibration = Calibration(mean, std, 0.4, len(texts))
    exact, fast = (
        localize(planted, text, latents, calibration, NemoSettings(refinement=kind))  # type: ignore[arg-type]
        for kind in ("sequential", "bisect")
    )
    assert fast.initial == exact.initial
    assert fast.refined_score < fast.threshold == exact.threshold
    assert 0 < fast.neurons.count < fast.initial.count
    assert fast.row_passes < exact.row_passes


@pytest.mark.parametrize("seeds", [2, 3])
def test_bisection_needs_no_more_than_two_seeds(tiny: Diffusion, tiny_calibration: Calibration, seeds: int) -> None:
    text, latents = tiny.encode(tiny_texts(1)), tiny.latents(range(seeds))
    found = localize(tiny, text, latents, tiny_calibration, NemoSettings(refinement="bisect"))
    assert 0 < found.neurons.count < found.initial.count
    assert found.refined_score < found.threshold
