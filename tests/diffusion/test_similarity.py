from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from nemo_bench.diffusion import MEASURES, Measure, Similarity
from nemo_bench.errors import ConfigError
from nemo_bench.localization import similarity


def test_the_published_window_is_eleven_wide() -> None:
    assert Similarity().kernel == 11


@given(
    side=st.integers(1, 100),
    sigma=st.sampled_from([0.15, 0.4, 0.9, 1.0, 1.5, 3.0]),
    scales=st.integers(0, 5),
    measure=st.sampled_from(MEASURES),
)
def test_latents_that_do_not_fit_are_an_error_that_names_settings_that_fit(
    side: int, sigma: float, scales: int, measure: Measure
) -> None:
    settings = Similarity(sigma, (0.33,) * scales)
    a = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(side))
    if settings.fits(side, measure):
        assert similarity(a, a, settings, measure).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
        return
    with pytest.raises(ConfigError, match=f"latents of {side}x{side} are too small for model.similarity") as caught:
        similarity(a, a, settings, measure)
    for word in str(caught.value).split():
        if word.startswith("model.similarity.betas="):
            betas = json.loads(word.split("=")[1].rstrip(","))
            assert Similarity(sigma, tuple(betas)).fits(side, measure)
            assert not Similarity(sigma, (*betas, 0.33)).fits(side, measure)
        if word.startswith("model.similarity.sigma="):
            assert Similarity(float(word.split("=")[1].rstrip(",")), settings.betas).fits(side, measure)


def test_sizes_that_torchmetrics_refuses_do_not_fit() -> None:
    for side, scales in [(43, 3), (32, 3), (16, 2), (8, 1)]:
        a, settings = torch.rand(1, 1, side, side), Similarity(betas=(0.33,) * scales)
        refused = False
        try:
            multiscale_structural_similarity_index_measure(a, a, betas=settings.betas, data_range=1.0)
        except (ValueError, RuntimeError):
            refused = True
        assert settings.fits(side) is not refused
