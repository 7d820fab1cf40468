"""Inversion of pictures: its loss and weight by hand, its checks, and what it says of a network that memorized."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_bench import Diffusion
from nemo_bench.benchmark.inversion import DivergenceWeight, Inversion, divergence, soft_texts
from nemo_bench.diffusion import Conditioning
from tiny import tiny_pipeline, tiny_texts

QUICK: dict[str, Any] = {"batch_size": 8, "samples": 2, "noises": 2, "guidances": (2.0, 3.0)}


def never(_images: Tensor) -> float:
    return 0.0


def inversion(model: Diffusion, **changed: Any) -> Inversion:
    target = torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(5))
    return Inversion(model, target, **{"replicates": never, "seed": 1, "steps": 2, "check": 2, **QUICK, **changed})


@pytest.mark.parametrize(
    ("mean", "log_variance", "expected"),
    [(0.0, 0.0, 0.0), (1.0, 0.0, 0.5), (0.0, math.log(4), (3 - math.log(4)) / 2)],
)
def test_divergence_by_hand(mean: float, log_variance: float, expected: float) -> None:
    shape = (4, 8, 8)
    assert float(divergence(torch.full(shape, mean), torch.full(shape, log_variance))) == pytest.approx(expected)


def test_the_weight_rises_until_the_loss_stalls() -> None:
    weight = DivergenceWeight(check=50)
    for _ in range(50):
        weight.update(1.0)
    assert weight.value == pytest.approx(1.05)  # nothing to compare with
    for _ in range(49):
        weight.update(1.0)
    assert weight.value == pytest.approx(1.099)
    weight.update(1.0)
    assert weight.value == pytest.approx(0.5495)


def test_the_weight_looks_at_the_last_hundred_losses_and_rises_while_they_fall() -> None:
    weight = DivergenceWeight(check=50)
    for loss in (9.0, 8.0, 1.0, 0.999):  # means of the last 100: 9, 8.5, 4.5, 0.9995; the last look falls by 3.5
        for _ in range(50):
            weight.update(loss)
    assert weight.value == pytest.approx(1.2)
    for _ in range(50):
        weight.update(0.9985)  # the mean of the last 100 falls by less than a thousandth
    assert weight.value == pytest.approx((1.2 + 0.049) / 2)


def test_tokens_that_are_certain_are_encoded_as_a_text_of_them(tiny: Diffusion) -> None:
    encoder, tokenizer = tiny.pipeline.text_encoder, tiny.pipeline.tokenizer
    ids = tokenizer(tiny_texts(2), padding="max_length", max_length=16, return_tensors="pt").input_ids
    certain = torch.nn.functional.one_hot(ids[:, 1:-1], len(encoder.get_input_embeddings().weight)).float()
    certain.requires_grad_()
    text = soft_texts(tiny, certain).text
    torch.testing.assert_close(text.detach(), tiny.encode(tiny_texts(2)).text, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(text.square().sum(), certain)
    assert float(gradient.abs().max()) > 0
    assert torch.equal(tiny.encode(tiny_texts(2)).text, tiny.encode(tiny_texts(2)).text)  # the hook is gone


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_predicted_clean_latents(prediction: str) -> None:
    model = Diffusion(tiny_pipeline(prediction_type=prediction), steps=2, guidance=3.0)
    run = inversion(model, steps=1, check=1, noises=1, guidances=(1.0,))
    drawn: list[tuple[Tensor, Tensor, Conditioning]] = []
    output = model.network_output

    def spied(latents: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
        drawn.append((latents.detach(), timestep, text))
        return output(latents, timestep, text)

    model.network_output = spied  # type: ignore[method-assign]
    found = run.run()
    latents, timesteps, text = drawn[0]
    losses = []
    with torch.no_grad():
        for row, timestep in enumerate(timesteps.tolist()):
            signal = model.signal(timestep)
            noise = model.predict_noise(latents[[row]], timestep, text.rows([row]))
            clean = (latents[[row]] - (1 - signal) ** 0.5 * noise) / signal**0.5
            losses.append(float((clean - run.target).square().mean()))
            # At the start noise is standard normal, since mean and logarithm of the variance are 0.
            normal = (latents[row] - signal**0.5 * run.target) / (1 - signal) ** 0.5
            assert float(normal.std()) == pytest.approx(1, abs=0.2)
    assert len(losses) == 2
    assert float(found.losses[0]) == pytest.approx(sum(losses) / 2, rel=1e-3)
    # The first step of Adam is its rate.
    assert float(found.mean.abs().max()) == pytest.approx(0.1, rel=1e-2)
    assert float(found.log_variance.abs().max()) == pytest.approx(0.1, rel=1e-2)
    assert float(found.logits.abs().max()) == pytest.approx(0.1, rel=1e-2)
    assert found.divergence == pytest.approx(float(divergence(found.mean, found.log_variance)))


def test_it_ends_where_all_images_of_a_guidance_replicate_the_picture_twice(tiny: Diffusion) -> None:
    """The first check has one image of two at guidance 2 and both at 3, but not again; the second has both at 2."""
    shares = iter([0.5, 1.0, 0.5, 1.0, 1.0])
    guidances = []

    def replicates(images: Tensor) -> float:
        assert images.shape == (2, 3, *reversed(tiny.image_size))
        guidances.append(tiny.guidance)
        return next(shares)

    found = inversion(tiny, steps=10, check=1, replicates=replicates).run()
    assert guidances == [2.0, 3.0, 3.0, 2.0, 2.0]
    assert tiny.guidance == 3.0
    assert (found.reached, len(found.losses), found.guidance) == (True, 2, 2.0)
    assert found.divergence < 0.05


def test_it_ends_unreached_after_its_last_step_with_a_check(tiny: Diffusion) -> None:
    before, digest = tiny.row_passes, tiny.state_digest()
    found = inversion(tiny, steps=3, check=2, guidances=(2.0,)).run()
    assert (found.reached, len(found.losses)) == (False, 3)
    # Steps forward and back, then two checks of two guided images.
    assert tiny.row_passes - before == 3 * 2 * 2 + 2 * (2 * 2 * tiny.steps)
    assert tiny.state_digest() == digest
    with torch.inference_mode():
        again = inversion(tiny, steps=3, check=2, guidances=(2.0,)).run()
    assert torch.equal(again.mean, found.mean)
    assert torch.equal(again.images, found.images)


def test_draws_do_not_depend_on_the_batch_size(tiny: Diffusion) -> None:
    whole, parts = (
        inversion(tiny, steps=1, check=1, noises=1, guidances=(1.0,), batch_size=size).run() for size in (8, 4)
    )
    torch.testing.assert_close(whole.losses, parts.losses, rtol=1e-3, atol=1e-5)
