"""Noise differences, against those of the localization."""

from __future__ import annotations

import pytest
import torch

from detector_views import PROMPT, generation, score_of
from nemo_bench.detectors import (
    Magnitude,
    NoiseDifference,
    watch,
)
from nemo_bench.diffusion import Diffusion, Similarity
from nemo_bench.localization import noise_differences, pair_similarities, pair_values, scaled_difference
from nemo_bench.records.data import Prompt
from tiny import tiny_pipeline, tiny_texts


def test_noise_difference_equals_the_memorization_score(tiny: Diffusion) -> None:
    latents, text = generation(tiny, 4)
    pairs = pair_values(pair_similarities(noise_differences(tiny, text, latents), tiny.similarity))
    assert len(pairs) == 6
    assert score_of(tiny, NoiseDifference(seeds=4)).score == pytest.approx(float(pairs.mean()), rel=1e-4)
    assert score_of(tiny, NoiseDifference(seeds=4, pairs="max")).score == pytest.approx(float(pairs.max()), rel=1e-4)


def test_noise_difference_by_the_reference_protocol_equals_that_of_the_public_scripts(tiny: Diffusion) -> None:
    """Second timestep, and one batch of noise for all prompts, which batches of 4 images divide."""
    prompts = [PROMPT, Prompt("q", tiny_texts(2)[1])]
    found, costs = watch(tiny, {"it": NoiseDifference(seeds=3, protocol="reference")}, prompts, batch_size=4)
    assert costs["it"].row_passes == costs["it"].extra_row_passes == 6
    noise = torch.randn((3, *tiny.latent_shape), generator=torch.Generator().manual_seed(1))
    for prompt, finding in zip(prompts, found["it"], strict=True):
        predicted = tiny.predict_noise(noise, 961, tiny.encode([prompt.text]).rows([0] * 3))
        differences = scaled_difference(predicted - noise)
        pairs = pair_values(pair_similarities(differences, tiny.similarity, "published"))
        assert finding.score == pytest.approx(float(pairs.mean()), rel=1e-4)
    assert found["it"][0].score != pytest.approx(score_of(tiny, NoiseDifference(seeds=3)).score, rel=1e-3)


def test_noise_difference_of_fifty_steps_shares_the_first_one() -> None:
    model = Diffusion(tiny_pipeline(), steps=50, guidance=3.0, similarity=Similarity(1.0, ()))
    assert model.timesteps()[0] == model.timestep() == 981
    _, costs = watch(model, {"n": NoiseDifference(seeds=2), "m": Magnitude(seeds=2, steps=1)}, [PROMPT])
    assert (costs["n"].row_passes, costs["n"].extra_row_passes) == (2, 0)
