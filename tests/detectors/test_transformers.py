"""What detectors compute in families that they were not published for, on tiny transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detector_views import generation, score_of, view_of
from nemo_bench.detectors import Anisotropy, IntrinsicDimension, OneStep, Sharpness, TokenSignificance
from nemo_bench.diffusion.dimension import noise_along
from nemo_bench.records.data import Prompt
from tiny_transformers import TRANSFORMERS, tiny_transformer


def test_one_step_of_a_flow_goes_as_far_as_its_velocity() -> None:
    """From pure noise to the clean latents that the guided velocity leads to."""
    model = tiny_transformer("sd3")
    latents, text = generation(model, 2)
    empty, own = (model.predict_output(latents, 1000.0, each) for each in (model.unconditional(2), text))
    for guidance in (7.5, 1.0):
        clean = latents - (empty + guidance * (own - empty))
        found = score_of(model, OneStep(seeds=2, guidance=guidance)).score
        assert found == pytest.approx(float((latents - clean).square().mean()), rel=1e-4)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_angle_is_that_of_noises_at_low_noise(family: str) -> None:
    model = tiny_transformer(family)
    latents, text = generation(model, 1)
    late = model.schedule.like(41)
    assert model.signal(late) == pytest.approx(0.96, abs=0.01)  # as at 41 of Stable Diffusion
    outputs = [model.predict_output(latents, late, each) for each in (model.unconditional(1), text)]
    if model.schedule.quantity == "velocity":  # x0 + s v are latents, and noise is x0 + v
        outputs = [latents - late / 1000 * output + output for output in outputs]
    angle = torch.cosine_similarity(outputs[0], outputs[1] - outputs[0], dim=1).mean()
    found = score_of(model, Anisotropy())
    assert found.details["angle"] == pytest.approx(float(angle), abs=1e-3)
    norm = float(model.text_noise(latents, model.timestep(), text).norm())
    assert found.details["norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_sharpness_equals_a_finite_difference(family: str) -> None:
    view = view_of(tiny_transformer(family), tiny_transformer(family).latents([0, 1]))
    exact, rough = (Sharpness(eta=eta).observe(view)["sharpness"] for eta in (None, 0.05))
    torch.testing.assert_close(exact, rough, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_noise_and_its_slope_follow_from_the_velocity(family: str) -> None:
    model = tiny_transformer(family)
    latents, text = generation(model, 1)
    direction = model.latents([7])
    at = model.schedule.like(200)
    noise, slope = noise_along(model, latents, at, text, direction)
    ahead, behind = (
        model.schedule.noise_of(model.predict_noise(x, at, text), at, x)
        for x in (latents + 0.05 * direction, latents - 0.05 * direction)
    )
    torch.testing.assert_close(slope, (ahead - behind) / 0.1, rtol=0.05, atol=0.02)
    share = at / 1000
    clean = model.schedule.clean(model.predict_noise(latents, at, text), at, latents)
    torch.testing.assert_close((1 - share) * clean + share * noise, latents, rtol=1e-4, atol=1e-5)
    assert torch.tensor(score_of(model, IntrinsicDimension(step=20)).score).isfinite()


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_significance_is_of_words_without_begin_and_end(family: str) -> None:
    model = tiny_transformer(family)
    prompt = Prompt("p", "red sun")
    clip, t5 = ["red</w>", "sun</w>"], ["▁red", "▁sun"]
    words = {"sd3": clip + t5, "flux": t5, "pixart": t5, "sana": ["r", "e", "d", "▁", "s", "u", "n"]}[family]
    view = replace(view_of(model, model.latents([0, 1])), text=model.encode([prompt.text] * 2))
    observed = TokenSignificance(seeds=2).observe(view)
    significance = observed["significance"].mean(0)
    positions = [position for position, _ in model.words(prompt.text)]
    used = model.family.used(view.text)[0].any(1)
    assert bool((significance[~used] == 0).all())
    if family == "sana":  # behind the instruction, up to the last token that is not masked
        assert view.text.mask is not None
        assert positions[-1] == int(view.text.mask[0].sum()) - 1
    found = TokenSignificance(seeds=2).score(model, prompt, [observed], None)
    assert [token for token, _ in found.details["tokens"]] == words
    assert found.score == pytest.approx(float(significance[positions].max()))
    assert ("pooled" in found.details) == (family in ("sd3", "flux"))
