"""Every detector against cases worked out by hand or computed another way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nemo_bench import ConfigError, ModelError
from nemo_bench.detectors import (
    Anisotropy,
    AttentionEntropy,
    BrightEnding,
    Detector,
    LayerEntropy,
    Magnitude,
    NoiseDifference,
    OneStep,
    Predictions,
    Sharpness,
    TiledL2,
    TokenSignificance,
    View,
    watch,
)
from nemo_bench.detectors.attention_entropy import entropy_terms
from nemo_bench.detectors.bright_ending import picture
from nemo_bench.diffusion import Conditioning, Diffusion, Similarity, Step, cross_attentions
from nemo_bench.localization import noise_differences, pair_similarities, pair_values, scaled_difference
from nemo_bench.methods.bright_ending import bright_ending
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Prompt
from tiny import tiny_pipeline, tiny_sd2, tiny_texts

PROMPT = Prompt("p", tiny_texts(1)[0])


def view_of(model: Diffusion, seeds: Sequence[int], texts: Sequence[str] | None = None) -> View:
    """The first step of some noises."""
    texts = texts or [PROMPT.text] * len(seeds)
    predictions = Predictions(model, model.latents(seeds), model.timesteps()[0], model.encode(texts))
    return View(predictions, range(len(seeds)), 0, [len(model.tokens(text)) for text in texts])


def generation(model: Diffusion, count: int) -> tuple[Tensor, Conditioning]:
    """Starting noise and conditioning that a detector gets for the prompt."""
    latents = model.latents(seeds_of(PROMPT, "generate", range(count)))
    return latents, model.encode([PROMPT.text]).rows([0] * count)


def look(model: Diffusion, detector: Detector) -> Any:
    return watch(model, {"it": detector}, [PROMPT])[0]["it"][0]


def test_noise_difference_is_the_memorization_score(tiny: Diffusion) -> None:
    latents, text = generation(tiny, 4)
    pairs = pair_values(pair_similarities(noise_differences(tiny, text, latents), tiny.similarity))
    assert len(pairs) == 6
    assert look(tiny, NoiseDifference(seeds=4)).score == pytest.approx(float(pairs.mean()), rel=1e-4)
    assert look(tiny, NoiseDifference(seeds=4, pairs="max")).score == pytest.approx(float(pairs.max()), rel=1e-4)


def test_noise_difference_as_the_public_scripts_take_it(tiny: Diffusion) -> None:
    """Second timestep, and one batch of noise for all prompts, which a batch of both cuts in the middle."""
    prompts = [PROMPT, Prompt("q", tiny_texts(2)[1])]
    found, costs = watch(tiny, {"it": NoiseDifference(seeds=3, protocol="reference")}, prompts, batch_size=4)
    assert costs["it"].row_passes == costs["it"].extra_row_passes == 6
    noise = torch.randn((3, *tiny.latent_shape), generator=torch.Generator().manual_seed(1))
    for prompt, finding in zip(prompts, found["it"], strict=True):
        predicted = tiny.predict_noise(noise, 961, tiny.encode([prompt.text]).rows([0] * 3))
        differences = scaled_difference(predicted, noise)
        pairs = pair_values(pair_similarities(differences, tiny.similarity, "published"))
        assert finding.score == pytest.approx(float(pairs.mean()), rel=1e-4)
    assert found["it"][0].score != pytest.approx(look(tiny, NoiseDifference(seeds=3)).score, rel=1e-3)


def test_noise_difference_shares_the_first_of_fifty_steps() -> None:
    model = Diffusion(tiny_pipeline(), steps=50, guidance=3.0, similarity=Similarity(1.0, ()))
    assert model.timesteps()[0] == model.timestep() == 981
    _, costs = watch(model, {"n": NoiseDifference(seeds=2), "m": Magnitude(seeds=2, steps=1)}, [PROMPT])
    assert (costs["n"].row_passes, costs["n"].extra_row_passes) == (2, 0)


def test_magnitude_is_a_norm_of_each_image_and_a_mean(tiny: Diffusion) -> None:
    seen = [{"magnitude": torch.tensor([3.0, 5.0])}, {"magnitude": torch.tensor([1.0, 2.0])}]
    found = Magnitude(seeds=2).judge(tiny, PROMPT, seen, None)
    assert found.score == pytest.approx(2.75)
    assert found.details == {"by_step": [4.0, 1.5]}
    latents, text = generation(tiny, 2)
    t = tiny.timesteps()[0]
    difference = tiny.predict_noise(latents, t, text) - tiny.predict_noise(latents, t, tiny.unconditional(2))
    norms = difference.square().sum((1, 2, 3)).sqrt()
    assert look(tiny, Magnitude(seeds=2, steps=1)).score == pytest.approx(float(norms.mean()), rel=1e-4)


def test_magnitude_of_velocity_models_is_that_of_the_noise() -> None:
    model = Diffusion(tiny_sd2(), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))
    latents, text = generation(model, 1)
    t = model.timesteps()[0]
    with torch.no_grad():
        halves = [model.unet(latents, t, c.text).sample for c in (text, model.unconditional(1))]
    root = model.signal(t) ** 0.5
    expected = root * (halves[0] - halves[1]).norm()
    assert look(model, Magnitude(seeds=1, steps=1)).score == pytest.approx(float(expected), rel=1e-4)


def test_magnitude_of_k_steps_is_the_beginning_of_that_of_all(tiny: Diffusion) -> None:
    whole, part = look(tiny, Magnitude(seeds=2)), look(tiny, Magnitude(seeds=2, steps=3))
    assert len(whole.details["by_step"]) == tiny.steps
    assert part.details["by_step"] == pytest.approx(whole.details["by_step"][:3], rel=1e-3)


def test_token_significance_is_the_gradient(tiny: Diffusion) -> None:
    view = view_of(tiny, [0, 1])
    with torch.no_grad():
        found = TokenSignificance().observe(view)["significance"]
    assert found.shape == view.text.text.shape[:2]
    text, step = view.text.text.double(), 1e-2
    for row, token in ((0, 1), (1, 2), (1, 5)):
        slopes = []
        for channel in range(text.shape[2]):
            values = []
            for sign in (1, -1):
                moved = text.clone()
                moved[row, token, channel] += sign * step
                noise = tiny.predict_noise(view.latents, view.timestep, Conditioning(moved.float()))
                values.append(float((noise - view.unconditional).flatten(1).norm(dim=1)[row]))
            slopes.append((values[0] - values[1]) / (2 * step))
        assert float(found[row, token]) == pytest.approx(math.hypot(*slopes), rel=0.03)


def test_token_significance_names_tokens_between_begin_and_end(tiny: Diffusion) -> None:
    words = PROMPT.text.split()
    values = torch.arange(16.0)
    seen = [{"significance": torch.stack([values, 3 * values])}]
    found = TokenSignificance(seeds=2).judge(tiny, PROMPT, seen, None)
    assert [token.removesuffix("</w>") for token, _ in found.details["tokens"]] == words
    assert [value for _, value in found.details["tokens"]] == [2.0, 4.0, 6.0]
    assert found.score == 6.0
    assert TokenSignificance(seeds=2).judge(tiny, Prompt("e", ""), seen, None).score == 0.0


def test_entropy_is_of_the_average_not_the_average_entropy(tiny: Diffusion) -> None:
    view, names = view_of(tiny, [0]), [*cross_attentions(tiny.unet)]
    # Half of the positions look at the first token, half at the second.
    maps = torch.zeros(1, 8, 16)
    maps[0, :4, 0] = maps[0, 4:, 1] = 1
    seeing = View(view.shared, [0], 0, [5], {names[3]: maps})
    assert float(LayerEntropy().observe(seeing)["entropy"]) == pytest.approx(math.log(2))
    even = View(view.shared, [0], 0, [5], {names[3]: torch.full((1, 8, 16), 1 / 16)})
    assert float(LayerEntropy().observe(even)["entropy"]) == pytest.approx(math.log(16))


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=9))
def test_entropy_terms_sum_to_the_entropy(weights: list[float]) -> None:
    shares = torch.tensor([weights]) / sum(weights)
    expected = torch.distributions.Categorical(probs=shares).entropy()
    torch.testing.assert_close(entropy_terms(shares).sum(1), expected, rtol=1e-4, atol=1e-6)


def test_layer_entropy_looks_at_the_layer_of_its_number(tiny: Diffusion) -> None:
    names = [*cross_attentions(tiny.unet)]
    latents, text = generation(tiny, 1)
    maps: dict[str, Tensor] = {}
    with tiny.edit_attention(lambda layer, logits: maps.setdefault(layer, logits)):
        tiny.predict_noise(latents, tiny.timesteps()[0], text)
    for layer in (3, 9):
        shares = maps[names[layer]].softmax(-1).mean((1, 2))
        expected = -(shares * shares.log()).sum()
        assert look(tiny, LayerEntropy(layer=layer)).score == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("detector", "error", "named"),
    [
        (
            LayerEntropy(layer=16),
            ModelError,
            r"detector\.layer=16: this model has cross-attention layers 0 to 15; give",
        ),
        (TiledL2(tiles=3), ConfigError, r"detector\.tiles=3 does not divide images of 32x32 pixels"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_errors_before_any_pass(
    tiny: Diffusion, detector: Detector, error: type[Exception], named: str
) -> None:
    passes = tiny.row_passes
    with pytest.raises(error, match=named):
        watch(tiny, {"magnitude": Magnitude(), "it": detector}, [PROMPT])
    assert tiny.row_passes == passes


def test_attention_entropy_adds_how_much_summary_tokens_grew(tiny: Diffusion) -> None:
    first = {"entropy": torch.tensor([9.0]), "summary": torch.tensor([2.0])}
    last = {"entropy": torch.tensor([4.0]), "summary": torch.tensor([0.5])}
    seen = [first, {}, {}, last]
    assert AttentionEntropy().judge(tiny, PROMPT, seen, None).score == 2.5
    assert AttentionEntropy(absolute=True).judge(tiny, PROMPT, seen, None).score == 5.5


def test_attention_entropy_watches_first_and_last_fifth_of_all_layers(tiny: Diffusion) -> None:
    class Fifty:
        unet, steps = tiny.unet, 50

    asked = [n for n in range(50) if AttentionEntropy().layers(Fifty, n)]  # type: ignore[arg-type]
    assert asked == [0, *range(40, 50)]
    assert len(AttentionEntropy().layers(tiny, 0)) == 16
    names = [*cross_attentions(tiny.unet)]
    maps = dict.fromkeys(names, torch.full((2, 4, 16), 1 / 16))
    view = View(view_of(tiny, [0, 1]).shared, [0, 1], 0, [16, 3], maps)
    seen = AttentionEntropy().observe(view)
    each = math.log(16) / 16
    # Of a prompt of 16 tokens the end alone is a summary token; of one of 3, the end at 2 and all padding after it.
    assert seen["summary"].tolist() == pytest.approx([each, 14 * each])


@pytest.mark.parametrize("make", [None, tiny_sd2])
def test_sharpness_is_the_derivative_along_the_score_difference(tiny: Diffusion, make: Any) -> None:
    model = Diffusion(make(), steps=4, guidance=3.0) if make else tiny
    view = view_of(model, [0, 1])
    with torch.no_grad():
        exact = Sharpness().observe(view)["sharpness"]
        sigma = (1 - model.signal(view.timestep)) ** 0.5

        def score(x: Tensor) -> Tensor:
            empty = model.unconditional(2)
            added = model.predict_noise(x, view.timestep, view.text) - model.predict_noise(x, view.timestep, empty)
            return -added / sigma

        direction = score(view.latents)
        slopes = [
            (score(view.latents + step * direction) - score(view.latents - step * direction)) / (2 * step)
            for step in (1e-3, 4e-3)
        ]
        expected = slopes[0].flatten(1).norm(dim=1)
        torch.testing.assert_close(exact, expected, rtol=2e-2, atol=0)
        torch.testing.assert_close(Sharpness(eta=0.05).observe(view)["sharpness"], expected, rtol=3e-2, atol=0)
        torch.testing.assert_close(Sharpness(squared=True).observe(view)["sharpness"], exact**2)
    assert Sharpness().judge(model, PROMPT, [{"sharpness": torch.tensor([1.0, 4.0])}], None).score == 2.5


def test_sharpness_of_some_steps_is_their_mean(tiny: Diffusion) -> None:
    latents, text = generation(tiny, 2)
    steps: list[tuple[Tensor, int]] = []

    def keep(step: Step) -> Tensor:
        steps.append((step.latents, step.timestep))
        return step.guided(step.scale)

    tiny.generate(text, latents, rule=keep)
    views = [View(Predictions(tiny, x, t, text), [0, 1], i, [5, 5]) for i, (x, t) in enumerate(steps)]
    with torch.no_grad():
        each = [float(Sharpness().observe(view)["sharpness"].mean()) for view in views]
    assert len(each) == 4
    assert each[0] != pytest.approx(each[1], rel=1e-2)
    assert look(tiny, Sharpness(seeds=2, steps=2)).score == pytest.approx((each[0] + each[1]) / 2, rel=1e-3)
    assert look(tiny, Sharpness(seeds=2, steps=None)).score == pytest.approx(sum(each) / 4, rel=1e-3)


def test_anisotropy_by_hand(tiny: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of two channels and two positions, whose noise is told by the latents that they start from.

    Of the first image cosines are 0 and -1 of the unconditional noise and what the prompt adds, of the second 1 and 0.
    """
    starts = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]], [[[3.0, 0.0]], [[4.0, 0.0]]]])
    added = torch.tensor([[[[0.0, 0.0]], [[3.0, -4.0]]], [[[6.0, 0.0]], [[8.0, 0.0]]]])
    asked = []

    def predict(latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        asked.append(timestep)
        rows = [next(i for i, start in enumerate(starts) if torch.equal(start, latent)) for latent in latents]
        is_empty = torch.equal(text.text, tiny.unconditional(len(latents)).text)
        return latents if is_empty else latents + added[rows]

    monkeypatch.setattr(tiny, "predict_noise", predict)
    timesteps = tiny.timesteps()
    assert timesteps[0] < tiny.timestep()  # the magnitude is not that of the first of four steps

    def view(rows: Sequence[int], timestep: int) -> View:
        predictions = Predictions(tiny, starts, timestep, tiny.encode([PROMPT.text] * 2))
        return View(predictions, rows, 0, [5, 5])

    seen = Anisotropy(seeds=2).observe(view([0, 1], timesteps[0]))
    assert seen["norm"].tolist() == [5.0, 10.0]
    assert seen["angle"].tolist() == pytest.approx([-0.5, 0.5])
    assert sorted(asked) == [41, 41, 981, 981]
    weighted = Anisotropy(seeds=2, norm_weight=3, angle_weight=10)
    assert weighted.judge(tiny, PROMPT, [seen], None).score == pytest.approx(22.5)
    assert Anisotropy().observe(view([1], timesteps[0]))["norm"].tolist() == [10.0]
    # Conditional noise of the first is (1, 3) and (0, -2).
    both = Anisotropy(angle_between="unconditional_conditional").observe(view([0, 1], timesteps[0]))["angle"]
    assert both.tolist() == pytest.approx([(1 / math.sqrt(10) - 1) / 2, 0.5])
    other = Anisotropy(angle_between="conditional_difference").observe(view([0, 1], timesteps[0]))["angle"]
    assert other.tolist() == pytest.approx([(3 / math.sqrt(10) + 1) / 2, 0.5])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_angle_is_one_of_noise_or_of_what_the_network_predicts(prediction_type: str) -> None:
    model = Diffusion(tiny_pipeline(0, prediction_type), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))
    latents, text = model.latents([0, 1]), model.encode([PROMPT.text] * 2)
    view = View(Predictions(model, latents, model.timestep(), text), [0, 1], 0, [5, 5])
    with torch.no_grad():
        found = {of: Anisotropy(angle_of=of).observe(view)["angle"] for of in ("noise", "prediction")}
        # As the public code has it: the network's own outputs, position by position.
        conditional = model.unet(latents, 41, text.text).sample
        unconditional = model.unet(latents, 41, model.unconditional(2).text).sample
    for row in range(2):
        cosines = [
            float(torch.dot(u, c - u) / (u.norm() * (c - u).norm()))
            for u, c in zip(unconditional[row].flatten(1).T, conditional[row].flatten(1).T, strict=True)
        ]
        assert float(found["prediction"][row]) == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    assert torch.equal(found["noise"], found["prediction"]) == (prediction_type == "epsilon")


def test_the_angle_of_velocities_can_have_the_other_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Velocity v = -1 from latents x = 10 is noise a v + b x > 0; what the prompt adds, 1, is of one sign in both."""
    model = Diffusion(tiny_pipeline(0, "v_prediction"), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))
    latents, signal = torch.full((1, 4, 2, 2), 10.0), model.signal(41)

    def predict(latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        is_empty = torch.equal(text.text, model.unconditional(1).text)
        signal = model.signal(timestep)
        return signal**0.5 * (-1.0 if is_empty else 0.0) + (1 - signal) ** 0.5 * latents

    assert (1 - signal) ** 0.5 * 10 > signal**0.5
    monkeypatch.setattr(model, "predict_noise", predict)
    view = View(Predictions(model, latents, 981, model.encode([PROMPT.text])), [0], 0, [5])
    angles = {of: float(Anisotropy(angle_of=of).observe(view)["angle"]) for of in ("noise", "prediction")}
    assert angles == {"noise": pytest.approx(1, abs=1e-5), "prediction": pytest.approx(-1, abs=1e-5)}


def test_anisotropy_shares_the_first_of_fifty_steps() -> None:
    model = Diffusion(tiny_pipeline(), steps=50, guidance=3.0, similarity=Similarity(1.0, ()))
    _, costs = watch(model, {"a": Anisotropy(), "m": Magnitude(seeds=1, steps=1)}, [PROMPT])
    assert (costs["a"].row_passes, costs["a"].extra_row_passes) == (4, 2)


def test_bright_ending_looks_at_the_end_token_in_the_last_step(tiny: Diffusion) -> None:
    names = [f"down_blocks.0.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1)]
    detector, last = BrightEnding(), tiny.steps - 1
    assert (list(detector.layers(tiny, last)), list(detector.layers(tiny, last - 1))) == (names, [])
    side = tiny.latent_shape[1]
    maps = {name: torch.rand(2, side * side, 16) for name in names}
    view = View(view_of(tiny, [0, 1]).shared, [0, 1], last, [5, 16], maps)
    mask = detector.observe(view)["mask"]
    expected = (maps[names[0]] + maps[names[1]]) / 2
    for row, end in enumerate((4, 15)):
        torch.testing.assert_close(mask[row], expected[row, :, end].view(side, side))


def test_bright_ending_scores_the_steps_it_is_told_and_shows_its_mask(tiny: Diffusion) -> None:
    whole, part = look(tiny, BrightEnding(seeds=2)), look(tiny, BrightEnding(seeds=2, steps=1))
    assert part.details["by_step"] == pytest.approx(whole.details["by_step"][:1], rel=1e-2)
    assert len(whole.details["by_step"]) == tiny.steps
    assert whole.score == pytest.approx(sum(whole.details["by_step"]) / tiny.steps, rel=1e-3)
    height, width = (side * tiny.pipeline.vae_scale_factor for side in tiny.latent_shape[1:])
    assert whole.picture is not None
    assert whole.picture.shape == (3, 2 * height, 2 * width)
    latents, text = generation(tiny, 2)
    images = tiny.generate(text, latents)
    torch.testing.assert_close(whole.picture[:, :height, width:], images[1], rtol=0, atol=1e-3)


def test_attention_entropy_is_that_of_a_plain_generation(tiny: Diffusion) -> None:
    """Of four steps the last fifth is the last; all layers count alike, whatever their size."""
    latents, text = generation(tiny, 1)
    shares: list[list[Tensor]] = []

    def keep(layer: str, logits: Tensor) -> Tensor:
        if len(shares) == 0 or len(shares[-1]) == 16:
            shares.append([])
        shares[-1].append(logits[1].softmax(-1).mean((0, 1)))
        return logits

    with tiny.edit_attention(keep):
        tiny.generate(text, latents)
    means = [sum(step) / 16 for step in shares]
    first, last = (-(mean * mean.log()) for mean in (means[0], means[-1]))
    end = len(PROMPT.text.split()) + 1
    expected = float(last.sum() + last[end:].sum() - first[end:].sum())
    assert len(means) == tiny.steps == 4
    assert look(tiny, AttentionEntropy()).score == pytest.approx(expected, rel=1e-3)


def test_bright_ending_masks_what_every_step_adds(tiny: Diffusion) -> None:
    latents, text = generation(tiny, 2)
    mask = bright_ending(tiny, [PROMPT] * 2, text, latents)
    added: list[Tensor] = []

    def keep(step: Step) -> Tensor:
        added.append(step.difference)
        return step.guided(step.scale)

    tiny.generate(text, latents, rule=keep)
    by_step = [float(sum((d[i] * mask[i]).square().sum().sqrt() / mask[i].mean() for i in range(2)) / 2) for d in added]
    found = look(tiny, BrightEnding(seeds=2))
    assert found.details["by_step"] == pytest.approx(by_step, rel=1e-3)
    assert found.details["mask_mean"] == pytest.approx(float(mask.mean()), rel=1e-3)


def test_masks_are_drawn_from_darkest_to_brightest() -> None:
    mask = torch.tensor([[[0.1, 0.3]]])
    drawn = picture(torch.zeros(1, 3, 2, 4), mask)
    assert drawn[0, 2:].tolist() == [[0, 0, 1, 1]] * 2


def test_tiled_l2_is_the_mean_over_pairs_and_negative(tiny: Diffusion) -> None:
    images = torch.zeros(3, 3, 8, 8)
    images[1] += 0.5
    images[2] += 1.0
    assert TiledL2(seeds=3).judge(tiny, PROMPT, [], images).score == pytest.approx(-(0.5 + 0.5 + 1.0) / 3)


@pytest.mark.parametrize("make", [None, tiny_sd2])
def test_one_step_is_what_heuns_method_does(tiny: Diffusion, make: Any) -> None:
    """Against diffusers' Heun sampler, from the largest noise level in a single step, as Karras' schedule has it."""
    model = Diffusion(make(), steps=4, guidance=3.0) if make else tiny
    scheduler = HeunDiscreteScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(timesteps=[999])
    assert len(scheduler.timesteps) == 1
    timestep, sigma = scheduler.timesteps[0], float(scheduler.sigmas[0])
    latents, text = generation(model, 2)
    noise = latents * sigma
    both = Conditioning(torch.cat([model.unconditional(2).text, text.text]))
    scaled = scheduler.scale_model_input(torch.cat([noise, noise]), timestep)
    with torch.no_grad():
        empty, prompted = model.unet(scaled, timestep, both.text).sample.chunk(2)
    there = scheduler.step(empty + 7.5 * (prompted - empty), timestep, noise).prev_sample
    expected = (noise - there).square().mean((1, 2, 3)).mean()
    assert look(model, OneStep(seeds=2)).score == pytest.approx(float(expected), rel=2e-3)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: NoiseDifference(seeds=1), "at least 2 seeds"),
        (lambda: TiledL2(seeds=1), "at least 2 seeds"),
        (lambda: TiledL2(tiles=0), "at least 1 tile"),
        (lambda: Magnitude(seeds=0), "at least 1 seeds"),
        (lambda: Magnitude(steps=0), "at least 1 step"),
        (lambda: Sharpness(eta=0), "a finite step above 0"),
        (lambda: Sharpness(eta=math.inf), "a finite step above 0"),
        (lambda: LayerEntropy(layer=-1), r"from 0, given detector\.layer=-1"),
        (lambda: Anisotropy(norm_weight=math.nan), r"finite numbers, given detector\.norm_weight=nan"),
        (lambda: Anisotropy(angle_weight=math.inf), r"detector\.angle_weight=inf"),
        (lambda: OneStep(guidance=math.inf), r"detector\.guidance=inf"),
        (lambda: BrightEnding(steps=0), "at least 1 step"),
    ],
)
def test_settings_that_make_no_sense_are_errors(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()
