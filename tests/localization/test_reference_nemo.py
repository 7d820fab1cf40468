"""The reference implementation of NeMo, followed by hand, and the tiny pipeline it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import exp, prod

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reference_nemo import (
    Neurons,
    Result,
    activation_statistics,
    activations,
    candidates,
    encode,
    initial_selection,
    keep_seeds,
    localize,
    ms_ssim,
    noise_differences,
    pair_scores,
    refinement,
    ssim,
    value_layers,
)
from tiny import WORDS, tiny_pipeline, tiny_texts

SIZE = 8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline(sample_size=SIZE)


def draw(seeds: int, size: int = SIZE) -> Tensor:
    return torch.cat([torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(i)) for i in range(seeds)])


def widths(pipe: StableDiffusionPipeline) -> dict[str, int]:
    return {layer: len(activation) for layer, activation in activations(pipe, "").items()}


class Scripted:
    """A score that follows a rule and remembers what it was asked."""

    def __init__(self, rule: Callable[[Neurons], float]) -> None:
        self.rule = rule
        self.asked: list[dict[str, list[int]]] = []

    def __call__(self, blocked: Neurons) -> float:
        self.asked.append({layer: list(neurons) for layer, neurons in blocked.items()})
        return self.rule(blocked)


# The tiny pipeline


def test_tiny_pipeline_is_deterministic_and_leaves_global_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (tiny_pipeline(seed).unet.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


def test_tiny_texts_are_different_and_one_token_a_word(pipe: StableDiffusionPipeline) -> None:
    texts = tiny_texts(len(WORDS) ** 3)
    assert len(set(texts)) == len(texts)
    assert tiny_texts(5) == texts[:5]
    assert {len(ids) for ids in pipe.tokenizer(texts[:50]).input_ids} == {5}
    assert pipe.tokenizer.unk_token_id not in pipe.tokenizer("Any other words, 42!").input_ids[:-1]
    with pytest.raises(ValueError, match="Ask for fewer"):
        tiny_texts(len(texts) + 1)


@pytest.mark.parametrize("vae_factor", [2, 4])
def test_tiny_pipeline_makes_images(vae_factor: int) -> None:
    pipe = tiny_pipeline(sample_size=SIZE, vae_factor=vae_factor)
    images = pipe(tiny_texts(2), num_inference_steps=2, output_type="np").images
    assert images.shape == (2, SIZE * vae_factor, SIZE * vae_factor, 3)


def test_value_layers_are_in_network_order(pipe: StableDiffusionPipeline) -> None:
    order = [(name.split(".attentions.")[0], width) for name, width in widths(pipe).items()]
    down = [(f"down_blocks.{block}", width) for block, width in enumerate((8, 8, 16)) for _ in range(2)]
    assert order == [*down, ("mid_block", 16)]
    assert len(set(value_layers(pipe.unet))) == 7


# Similarity


def test_similarity_settings() -> None:
    flat, half = torch.zeros(1, 1, 48, 48), torch.full((1, 1, 48, 48), 0.5)
    # Means 0 and 1/2: only the luminance term differs from 1, and its constant is (0.01 * data range)^2.
    c1, c2 = 1e-4, 9e-4
    assert ssim(flat, half).item() == pytest.approx(c1 / (0.25 + c1), rel=1e-3)
    assert ms_ssim(flat, half).item() == pytest.approx((c1 / (0.25 + c1)) ** 0.33, rel=1e-3)
    # A fine checkerboard has variance 1/4, and pooling makes it the flat half: one contrast term, two scales alike.
    checkers = (torch.arange(48)[:, None] + torch.arange(48)).remainder(2).float()[None, None]
    assert ms_ssim(checkers, half).item() == pytest.approx((c2 / (0.25 + c2)) ** 0.33, rel=1e-2)


def window(sigma: float, radius: int) -> Tensor:
    weights = [exp(-(offset**2) / (2 * sigma**2)) for offset in range(-radius, radius + 1)]
    row = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return row[:, None] * row


def test_similarity_windows() -> None:
    """One bright pixel on black against black: the scores are sums over the window around that pixel."""
    c1, c2 = 1e-4, 9e-4

    def terms(height: float, w: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = height * w, height**2 * (w - w**2)
        return c1 / (mean**2 + c1), c2 / (variance + c2)

    def over(side: int, inside: Tensor) -> float:
        return (inside.sum().item() + side**2 - inside.numel()) / side**2

    def spot(side: int) -> Tensor:
        picture = torch.zeros(1, 1, side, side)
        picture[..., side // 2, side // 2] = 1
        return picture

    luminance, contrast = terms(1, window(1.0, 4))
    assert ssim(spot(16), torch.zeros(1, 1, 16, 16)).item() == pytest.approx(over(16, luminance * contrast), rel=1e-4)

    # Pooling makes the pixel a quarter as bright each time; contrast terms leave a border of five pixels out.
    wide = window(1.5, 5)
    luminance, contrast = terms(1 / 16, wide)
    scales = [over(38, terms(1, wide)[1]), over(14, terms(1 / 4, wide)[1]), over(12, luminance * contrast)]
    expected = prod(scale**0.33 for scale in scales)
    assert ms_ssim(spot(48), torch.zeros(1, 1, 48, 48)).item() == pytest.approx(expected, rel=1e-4)


# Section 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_difference_is_that_of_the_pipelines_own_first_step(prediction_type: str) -> None:
    pipe = tiny_pipeline(prediction_type=prediction_type, sample_size=SIZE)
    text, x = tiny_texts(2)[1], draw(2)

    class FirstStepError(Exception):
        pass

    def stop(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: tuple[Tensor]) -> None:
        raise FirstStepError(args[1], output[0])

    handle = pipe.unet.register_forward_hook(stop, with_kwargs=True)
    with pytest.raises(FirstStepError) as caught:
        pipe([text] * 2, latents=x, num_inference_steps=50, guidance_scale=1.0, output_type="latent")
    handle.remove()
    step, output = caught.value.args

    assert step == 981
    # The scheduler gives the clean image that the prediction means; the noise is what is left of the latent.
    clean = pipe.scheduler.step(output, step, x).pred_original_sample
    abar = pipe.scheduler.alphas_cumprod[981]
    difference = (x - abar.sqrt() * clean) / (1 - abar).sqrt() - x
    expected = torch.stack([(c - c.min()) / (c.max() - c.min()) for c in difference.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(noise_differences(pipe, text, x), expected, rtol=0, atol=1e-4)


def test_encoding_is_the_pipelines_own(pipe: StableDiffusionPipeline) -> None:
    for text in ("", tiny_texts(2)[1], "more words than the text encoder has room for " * 5):
        expected = pipe.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)[0]
        torch.testing.assert_close(encode(pipe, [text]), expected)


def test_blocking_equals_zero_weight_rows_and_ends(pipe: StableDiffusionPipeline) -> None:
    text, x = tiny_texts(2)[1], draw(2)
    before = noise_differences(pipe, text, x)
    for layer, width in widths(pipe).items():
        neurons = [width - 1, 0, 3]
        blocked = noise_differences(pipe, text, x, {layer: neurons})
        zeroed = tiny_pipeline(sample_size=SIZE)
        value_layers(zeroed.unet)[layer].get_parameter("weight").data[neurons] = 0
        torch.testing.assert_close(blocked, noise_differences(zeroed, text, x))
        assert not torch.equal(blocked, before)
    assert torch.equal(noise_differences(pipe, text, x), before)


def test_blocking_without_effect_is_an_error(pipe: StableDiffusionPipeline) -> None:
    fused = tiny_pipeline(sample_size=SIZE)
    layer = next(iter(value_layers(fused.unet)))
    fused.unet.get_submodule(layer.removesuffix(".to_v")).forward = lambda states, **_: states
    with pytest.raises(RuntimeError, match="not called"):
        noise_differences(fused, "", draw(2), {layer: [0]})


def test_unscalable_and_unsupported_predictions_are_errors() -> None:
    pipe = tiny_pipeline(prediction_type="sample", sample_size=SIZE)
    with pytest.raises(ValueError, match="'sample'"):
        noise_differences(pipe, "", draw(2))
    pipe = tiny_pipeline(sample_size=SIZE)
    pipe.unet.conv_out.weight.data.zero_()
    with pytest.raises(ValueError, match="flat"):
        noise_differences(pipe, "", torch.zeros(2, 4, SIZE, SIZE))


def test_pair_scores_compare_each_two_seeds_once() -> None:
    pictures = torch.arange(3.0).view(3, 1, 1, 1)
    assert pair_scores(pictures, lambda a, b: (10 * a + b).flatten()) == {(0, 1): 1, (0, 2): 2, (1, 2): 12}


# Section 2


def test_activations_are_those_of_a_unet_pass(pipe: StableDiffusionPipeline) -> None:
    text = tiny_texts(2)[1]
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
        for name, layer in value_layers(pipe.unet).items()
    ]
    noise_differences(pipe, text, draw(2))
    for handle in handles:
        handle.remove()
    found = activations(pipe, text)
    assert list(found) == list(value_layers(pipe.unet))
    for layer, activation in found.items():
        tokens = seen[layer][0]
        torch.testing.assert_close(activation, sum(token.abs() for token in tokens) / len(tokens))


def test_statistics_of_two_prompts(pipe: StableDiffusionPipeline) -> None:
    texts = tiny_texts(2)
    one, two = (activations(pipe, text) for text in texts)
    means, stds = activation_statistics(pipe, texts)
    for layer in one:
        torch.testing.assert_close(means[layer], (one[layer] + two[layer]) / 2)
        torch.testing.assert_close(stds[layer], (one[layer] - two[layer]).abs() / 2**0.5)
    with pytest.raises(ValueError, match="at least 2"):
        activation_statistics(pipe, texts[:1])


# Section 3


def test_gate_takes_each_seeds_best_pair_strictly_above_tau() -> None:
    pairs = {(0, 1): 0.5, (0, 2): 0.2, (1, 2): 0.3}
    assert keep_seeds(pairs, tau=0.2) == ([0.5, 0.5, 0.3], [0, 1, 2])
    assert keep_seeds(pairs, tau=0.3)[1] == [0, 1]
    assert keep_seeds(pairs, tau=0.5)[1] == []
    with pytest.raises(ValueError, match="at least 2 seeds"):
        keep_seeds({}, tau=0.5)


def chosen(a: Sequence[float], mean: Sequence[float], std: Sequence[float], theta: float, k: int) -> list[int]:
    return candidates({"v": torch.tensor(a)}, {"v": torch.tensor(mean)}, {"v": torch.tensor(std)}, theta, k)["v"]


def test_candidates_are_outliers_by_index_then_the_most_active_without_repeats() -> None:
    a, mean, std = [1.0, 8.0, 9.0, 3.0], [7.0, 8.0, 9.0, 0.0], [1.0, 1.0, 1.0, 0.5]
    assert chosen(a, mean, std, theta=5, k=0) == [0, 3]
    assert chosen(a, mean, std, theta=5, k=2) == [0, 3, 2, 1]
    assert chosen(a, mean, std, theta=5, k=3) == [0, 3, 2, 1]
    assert chosen(a, mean, std, theta=6, k=1) == [2]
    assert chosen(a, mean, std, theta=6, k=9) == [2, 1, 3, 0]


def test_candidates_with_ties_and_no_spread() -> None:
    a, mean, std = [2.0, 1.0, 2.0, 1.0], [2.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]
    assert chosen(a, mean, std, theta=5, k=0) == [2]
    assert chosen(a, mean, std, theta=5, k=1) == [2, 0]
    assert chosen(a, mean, std, theta=5, k=3) == [2, 0, 1]


def test_selection_widens_until_it_runs_out() -> None:
    # Test n (theta 5 - n/4, k = n) finds the first n + 1 of 17 quiet neurons as outliers, and n of 20 loud ones.
    activation = torch.tensor([0.0] * 17 + [10.0] * 20)
    deviation = torch.tensor([5.125 - n / 4 for n in range(17)] + [0.0] * 20)
    score = Scripted(lambda blocked: 1 - len(blocked["v"]) / 100)
    found = initial_selection({"v": activation}, {"v": activation + deviation}, {"v": torch.ones(37)}, score, tau=0.5)
    assert score.asked == [{"v": [*range(n + 1), *range(17, 17 + n)]} for n in range(16)]
    assert (found.theta, found.k) == (1.25, 15)
    assert found.neurons == score.asked[-1]
    assert found.score == found.tau_refine == 1 - 31 / 100
    assert [threshold for _, threshold in found.decisions] == [0.5] * 16


def test_selection_stops_at_a_score_equal_to_tau() -> None:
    activation = {"v": torch.tensor([1.0, 3.0, 2.0]), "w": torch.tensor([5.0])}
    ones = {layer: torch.ones_like(a) for layer, a in activation.items()}
    score = Scripted(lambda blocked: {0: 0.9, 1: 0.6, 2: 0.5}[len(blocked["v"])])
    found = initial_selection(activation, activation, ones, score, tau=0.5)
    # Nothing is an outlier, so the first test blocks nothing; a layer narrower than k gives what it has.
    assert score.asked == [{"v": [], "w": []}, {"v": [1], "w": [0]}, {"v": [1, 2], "w": [0]}]
    assert (found.theta, found.k, found.score, found.tau_refine) == (4.5, 2, 0.5, 0.5)


# Section 4


def test_refinement_by_hand() -> None:
    parts = {"first": {0: 50, 1: 10}, "second": {5: 5}, "third": {2: 10, 3: 20}}
    score = Scripted(lambda blocked: 100 - sum(parts[layer][n] for layer in blocked for n in blocked[layer]))
    refined, decisions = refinement({layer: list(neurons) for layer, neurons in parts.items()}, score, tau_refine=30)
    assert score.asked == [
        {"first": [0, 1], "second": [5], "third": []},  # 35: the third layer matters
        {"first": [0, 1], "second": [], "third": [2, 3]},  # 10: the second does not
        {"first": [], "second": [], "third": [2, 3]},  # 70: the first matters
        {"first": [0, 1], "second": [], "third": [3]},  # 20: neuron 2 does not
        {"first": [0, 1], "second": [], "third": []},  # 40: neuron 3 matters
        {"first": [1], "second": [], "third": [3]},  # 70: neuron 0 matters
        {"first": [0], "second": [], "third": [3]},  # 30: not below the threshold, so neuron 1 stays
    ]
    assert refined == {"first": [0, 1], "second": [], "third": [3]}
    assert decisions == [(value, 30) for value in (35, 10, 70, 20, 40, 70, 30)]


def test_refinement_goes_through_neurons_in_list_order_and_skips_empty_layers() -> None:
    score = Scripted(lambda blocked: 0.0 if blocked["v"] else 1.0)
    refined, _ = refinement({"u": [], "v": [4, 1, 3]}, score, tau_refine=0.5)
    assert [asked["v"] for asked in score.asked] == [[], [1, 3], [3], []]
    assert refined == {"u": [], "v": [3]}


@given(
    parts=st.lists(st.lists(st.integers(0, 20), max_size=4), min_size=1, max_size=4),
    spare=st.integers(0, 40),
)
def test_refinement_leaves_no_neuron_to_spare(parts: list[list[int]], spare: int) -> None:
    """With a score that falls by a fixed amount for every blocked neuron, what remains is minimal."""
    neurons = {str(layer): list(range(len(values))) for layer, values in enumerate(parts)}

    def score(blocked: Neurons) -> float:
        return -sum(parts[int(layer)][n] for layer in blocked for n in blocked[layer])

    tau_refine = score(neurons) + spare
    refined, _ = refinement(neurons, score, tau_refine)
    assert all(set(refined[layer]) <= set(neurons[layer]) for layer in neurons)
    assert score(refined) < tau_refine or refined == neurons
    assert all(score(refined) + parts[int(layer)][n] >= tau_refine for layer in refined for n in refined[layer])


# All of it


@pytest.fixture(scope="module")
def statistics(pipe: StableDiffusionPipeline) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return activation_statistics(pipe, tiny_texts(24)[4:])


def flat(neurons: Neurons) -> set[tuple[str, int]]:
    return {(layer, n) for layer, indices in neurons.items() for n in indices}


def check(result: Result, pipe: StableDiffusionPipeline) -> None:
    assert list(result.initial) == list(result.refined) == list(value_layers(pipe.unet))
    assert flat(result.refined) <= flat(result.initial)
    assert 0 < len(flat(result.refined)) < len(flat(result.initial))
    assert result.refined_score < (result.tau_refine or 0)
    assert result.margin > 0


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.7])
def test_tiny_pipeline_has_neurons_at_every_threshold(
    pipe: StableDiffusionPipeline, statistics: tuple[dict[str, Tensor], dict[str, Tensor]], tau: float
) -> None:
    result = localize(pipe, tiny_texts(2)[1], draw(3), *statistics, tau)
    check(result, pipe)
    assert result.kept == [0, 1, 2]
    assert result.initial_score <= tau == result.tau_refine
    assert result.k == (5 - (result.theta or 0)) / 0.25 > 0


def test_score_is_the_maximum_over_kept_seeds_only(
    pipe: StableDiffusionPipeline, statistics: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    text, x = tiny_texts(2)[1], draw(4)
    before = noise_differences(pipe, text, x)
    gate_scores, _ = keep_seeds(pair_scores(before, ssim), tau=0)
    tau = sum(sorted(gate_scores)[1:3]) / 2
    result = localize(pipe, text, x, *statistics, tau)
    assert (result.gate_scores, result.kept) == (gate_scores, [0, 2])
    for neurons, score in ((result.initial, result.initial_score), (result.refined, result.refined_score)):
        scores = ssim(before, noise_differences(pipe, text, x, neurons)).tolist()
        assert score == pytest.approx(max(scores[0], scores[2]), abs=1e-5)
        assert score < max(scores) - 1e-3, "a dropped seed must be the highest for this test to tell"


def test_outliers_alone_can_be_enough(
    pipe: StableDiffusionPipeline, statistics: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    means, stds = statistics
    result = localize(pipe, tiny_texts(2)[1], draw(3), means, {layer: 0.05 * s for layer, s in stds.items()}, tau=0.5)
    check(result, pipe)
    assert (result.theta, result.k) == (5, 0)


def test_velocity_prediction_has_neurons_too() -> None:
    pipe = tiny_pipeline(prediction_type="v_prediction", sample_size=SIZE)
    means, stds = activation_statistics(pipe, tiny_texts(24)[4:])
    check(localize(pipe, tiny_texts(2)[1], draw(3), means, stds, tau=0.5), pipe)


def test_published_similarity_tells_blocked_from_other_seeds_on_larger_latents() -> None:
    pipe = tiny_pipeline(sample_size=48)
    text, x = tiny_texts(2)[1], draw(2, size=48)
    before = noise_differences(pipe, text, x)
    after = noise_differences(pipe, text, x, {layer: range(width) for layer, width in widths(pipe).items()})
    assert keep_seeds(pair_scores(before, ms_ssim), tau=0.5)[1] == [0, 1]
    assert ms_ssim(before, after).max() < 0.5


def test_selection_that_runs_out_sets_the_refinements_threshold() -> None:
    pipe = tiny_pipeline(seed=3, sample_size=SIZE)
    means, stds = activation_statistics(pipe, tiny_texts(24)[4:])
    result = localize(pipe, tiny_texts(2)[1], draw(2), means, stds, tau=0.05)
    check(result, pipe)
    assert (result.theta, result.k) == (1.25, 15)
    assert result.initial_score == result.tau_refine
    assert result.initial_score > result.tau
    assert [threshold for _, threshold in result.decisions[:16]] == [0.05] * 16
    assert {threshold for _, threshold in result.decisions[16:]} == {result.tau_refine}


def test_prompt_that_is_not_memorized(
    pipe: StableDiffusionPipeline, statistics: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    result = localize(
        pipe, tiny_texts(2)[1], draw(3), *statistics, tau=0.5, similarity=lambda a, _: a.new_full((len(a),), 0.5)
    )
    assert result.gate_scores == [0.5] * 3
    assert result.kept == []
    assert flat(result.initial) == flat(result.refined) == set()
    assert result.initial_score == result.refined_score == result.tests == 0
    assert result.tau_refine is result.theta is result.k is None
