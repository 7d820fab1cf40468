"""Token significance, against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from detector_views import PROMPT, view_of
from nemo_bench.detectors import (
    TokenSignificance,
)
from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.records.data import Prompt


def test_significance_equals_the_gradient_by_each_token(tiny: Diffusion) -> None:
    view = view_of(tiny, tiny.latents([0, 1]))
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


def test_details_name_the_tokens_between_begin_and_end(tiny: Diffusion) -> None:
    words = PROMPT.text.split()
    values = torch.arange(16.0)
    observed = [{"significance": torch.stack([values, 3 * values])}]
    found = TokenSignificance(seeds=2).score(tiny, PROMPT, observed, None)
    assert [token.removesuffix("</w>") for token, _ in found.details["tokens"]] == words
    assert [value for _, value in found.details["tokens"]] == [2.0, 4.0, 6.0]
    assert found.score == 6.0
    assert TokenSignificance(seeds=2).score(tiny, Prompt("e", ""), observed, None).score == 0.0
