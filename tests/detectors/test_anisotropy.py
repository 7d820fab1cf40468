"""Anisotropy, by hand and against the public code's formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detector_views import PROMPT, view_of
from nemo_bench.detectors import (
    Anisotropy,
    Magnitude,
    watch,
)
from nemo_bench.diffusion import Conditioning, Diffusion, Similarity
from tiny import tiny_pipeline


def test_anisotropy_equals_the_one_computed_by_hand(tiny: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of two channels and two positions; their starting latents identify them to the fake network.

    Cosines of unconditional noise and difference are 0 and -1 for the first image, 1 and 0 for the second.
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

    view = view_of(tiny, starts)
    values = Anisotropy(seeds=2).observe(view)
    assert values["norm"].tolist() == [5.0, 10.0]
    assert values["angle"].tolist() == pytest.approx([-0.5, 0.5])
    assert sorted(asked) == [41, 41, 981, 981]
    weighted = Anisotropy(seeds=2, norm_weight=3, angle_weight=10)
    assert weighted.score(tiny, PROMPT, [values], None).score == pytest.approx(22.5)
    assert Anisotropy().observe(view_of(tiny, starts).rows([1]))["norm"].tolist() == [10.0]
    # Conditional noise of the first is (1, 3) and (0, -2).
    both = Anisotropy(angle_between="unconditional_conditional").observe(view)["angle"]
    assert both.tolist() == pytest.approx([(1 / math.sqrt(10) - 1) / 2, 0.5])
    other = Anisotropy(angle_between="conditional_difference").observe(view)["angle"]
    assert other.tolist() == pytest.approx([(3 / math.sqrt(10) + 1) / 2, 0.5])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_angle_is_that_of_noise_or_of_network_outputs(prediction_type: str) -> None:
    model = Diffusion(tiny_pipeline(0, prediction_type), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))
    view = view_of(model, model.latents([0, 1]), model.timestep())
    with torch.no_grad():
        found = {of: Anisotropy(angle_of=of).observe(view)["angle"] for of in ("noise", "prediction")}
        # As the public code has it: the network's own outputs, position by position.
        conditional = model.unet(view.latents, 41, view.text.text).sample
        unconditional = model.unet(view.latents, 41, model.unconditional(2).text).sample
    for row in range(2):
        cosines = [
            float(torch.dot(u, c - u) / (u.norm() * (c - u).norm()))
            for u, c in zip(unconditional[row].flatten(1).T, conditional[row].flatten(1).T, strict=True)
        ]
        assert float(found["prediction"][row]) == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    assert torch.equal(found["noise"], found["prediction"]) == (prediction_type == "epsilon")


def test_angle_of_velocities_can_have_the_other_sign_than_that_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Velocity v = -1 from latents x = 10 is noise a v + b x > 0; the difference, 1, has the same sign in both."""
    model = Diffusion(tiny_pipeline(0, "v_prediction"), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))
    latents, signal = torch.full((1, 4, 2, 2), 10.0), model.signal(41)

    def predict(latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        is_empty = torch.equal(text.text, model.unconditional(1).text)
        signal = model.signal(timestep)
        return signal**0.5 * (-1.0 if is_empty else 0.0) + (1 - signal) ** 0.5 * latents

    assert (1 - signal) ** 0.5 * 10 > signal**0.5
    monkeypatch.setattr(model, "predict_noise", predict)
    view = view_of(model, latents, 981)
    angles = {of: float(Anisotropy(angle_of=of).observe(view)["angle"]) for of in ("noise", "prediction")}
    assert angles == {"noise": pytest.approx(1, abs=1e-5), "prediction": pytest.approx(-1, abs=1e-5)}


def test_anisotropy_of_fifty_steps_shares_the_first_one() -> None:
    model = Diffusion(tiny_pipeline(), steps=50, guidance=3.0, similarity=Similarity(1.0, ()))
    _, costs = watch(model, {"a": Anisotropy(), "m": Magnitude(seeds=1, steps=1)}, [PROMPT])
    assert (costs["a"].row_passes, costs["a"].extra_row_passes) == (4, 2)
