"""NeMo against the plain, slow implementation in reference_nemo.py, which shares no code with the package."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reference_nemo
from nemo_bench import Calibration, Diffusion, Neurons, Prompt, read_prompts, resolve
from nemo_bench.config import grid
from nemo_bench.diffusion import Similarity
from nemo_bench.localization import NemoSettings, activation_statistics, localize, threshold
from nemo_bench.localization.nemo import Trial, as_neurons, refine, select
from nemo_bench.localization.noise import noise_differences, pair_similarities, pair_values
from nemo_bench.modules import seeds_of
from tiny import tiny_pipeline, tiny_texts


def agree(model: Diffusion, text: str, latents: Tensor, calibration: Calibration) -> reference_nemo.Result:
    """Asserts that both implementations find the same, as far as rounding can tell."""
    found = localize(model, model.encode([text]), latents, calibration, NemoSettings())
    score = reference_nemo.ms_ssim if model.similarity.betas else reference_nemo.ssim
    plain = reference_nemo.localize(
        model.pipeline, text, latents, calibration.mean, calibration.std, calibration.threshold, score
    )
    assert plain.margin > 1e-5, "the case is too near a threshold to compare two implementations; choose another"
    assert found.neurons == Neurons(plain.refined)
    assert found.initial == Neurons(plain.initial)
    assert found.gate_score == pytest.approx(max(plain.gate_scores), abs=1e-4)
    assert found.initial_score == pytest.approx(plain.initial_score, abs=1e-4)
    assert found.refined_score == pytest.approx(plain.refined_score, abs=1e-4)
    return plain


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


@pytest.mark.parametrize("index", [0, 9])
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


def test_the_model_is_as_it_was(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    before = tiny.state_digest()
    localize(tiny, tiny.encode(tiny_texts(1)), tiny.latents(range(3)), tiny_calibration, NemoSettings())
    assert tiny.state_digest() == before


def test_select_lists_outliers_then_the_most_active_once() -> None:
    mean, std = {"layer": torch.zeros(5)}, {"layer": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])}
    calibration = Calibration(mean, std, 0.5, 9)
    activation = {"layer": torch.tensor([6.0, 1.0, 7.0, 0.5, 8.0])}
    assert select(activation, calibration, 5.0, 0) == [("layer", 0), ("layer", 2), ("layer", 3), ("layer", 4)]
    assert select(activation, calibration, 7.5, 3) == [("layer", 3), ("layer", 4), ("layer", 2), ("layer", 0)]


def test_refine_drops_what_does_not_matter() -> None:
    needed = {("a", 1), ("b", 2)}

    class Stub:
        def similarity(self, candidates: list[tuple[str, int]], stop_at: float) -> float:
            return 0.1 if needed <= set(candidates) else 0.9

    candidates = [("a", 0), ("a", 1), ("b", 2), ("c", 3), ("c", 4)]
    assert refine(Stub(), candidates, 0.5) == [("a", 1), ("b", 2)]  # type: ignore[arg-type]


def test_giving_up_early_never_changes_the_verdict(tiny: Diffusion) -> None:
    trial = Trial(tiny, tiny.encode(tiny_texts(1)), tiny.latents(range(8)))
    sets = [[(layer, i) for i in range(n)] for layer in tiny.value_layers for n in (1, 4, 8)]
    for candidates in sets:
        whole = trial.similarity(candidates)
        for tau in (whole - 1e-3, whole + 1e-3, 0.5):
            assert (trial.similarity(candidates, stop_at=tau) < tau) == (whole < tau)
    assert as_neurons(sets[1]).count == 4
