"""Entropies of attention, by hand and against plain generations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from detector_views import PROMPT, generation, score_of, view_of
from nemo_bench.detectors import (
    AttentionEntropy,
    LayerEntropy,
)
from nemo_bench.detectors.attention_entropy import entropy_terms
from nemo_bench.diffusion import Diffusion, cross_attentions


def test_layer_entropy_is_that_of_the_average_not_the_average_entropy(tiny: Diffusion) -> None:
    layer, latents = [*cross_attentions(tiny.unet)][3], tiny.latents([0])
    # Half of the positions look at the first token, half at the second.
    maps = torch.zeros(1, 8, 16)
    maps[0, :4, 0] = maps[0, 4:, 1] = 1
    halves = view_of(tiny, latents, maps={layer: maps})
    assert float(LayerEntropy().observe(halves)["entropy"]) == pytest.approx(math.log(2))
    even = view_of(tiny, latents, maps={layer: torch.full((1, 8, 16), 1 / 16)})
    assert float(LayerEntropy().observe(even)["entropy"]) == pytest.approx(math.log(16))


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=9))
def test_entropy_terms_sum_to_the_entropy(tiny: Diffusion, weights: list[float]) -> None:
    shares = torch.tensor([weights]) / sum(weights)
    expected = torch.distributions.Categorical(probs=shares).entropy()
    view = view_of(tiny, tiny.latents([0]), maps={"layer": shares[:, None]})
    torch.testing.assert_close(entropy_terms(view, ["layer"]).sum(1), expected, rtol=1e-4, atol=1e-6)


def test_layer_entropy_is_that_of_the_layer_with_its_number(tiny: Diffusion) -> None:
    names = [*cross_attentions(tiny.unet)]
    latents, text = generation(tiny, 1)
    maps: dict[str, Tensor] = {}
    with tiny.edit_attention(lambda layer, logits: maps.setdefault(layer, logits)):
        tiny.predict_noise(latents, tiny.timesteps()[0], text)
    for layer in (3, 9):
        shares = maps[names[layer]].softmax(-1).mean((1, 2))
        expected = -(shares * shares.log()).sum()
        assert score_of(tiny, LayerEntropy(layer=layer)).score == pytest.approx(float(expected), rel=1e-4)


def test_attention_entropy_adds_the_growth_of_summary_tokens(tiny: Diffusion) -> None:
    first = {"entropy": torch.tensor([9.0]), "summary": torch.tensor([2.0])}
    last = {"entropy": torch.tensor([4.0]), "summary": torch.tensor([0.5])}
    observed = [first, {}, {}, last]
    assert AttentionEntropy().score(tiny, PROMPT, observed, None).score == 2.5
    assert AttentionEntropy(absolute=True).score(tiny, PROMPT, observed, None).score == 5.5


def test_attention_entropy_needs_all_layers_in_the_first_step_and_the_last_fifth(tiny: Diffusion) -> None:
    class Fifty:
        unet, steps = tiny.unet, 50

    needed = [n for n in range(50) if AttentionEntropy().layers(Fifty, n)]  # type: ignore[arg-type]
    assert needed == [0, *range(40, 50)]
    assert len(AttentionEntropy().layers(tiny, 0)) == 16
    names = [*cross_attentions(tiny.unet)]
    maps = dict.fromkeys(names, torch.full((2, 4, 16), 1 / 16))
    view = view_of(tiny, tiny.latents([0, 1]), lengths=[16, 3], maps=maps)
    values = AttentionEntropy().observe(view)
    each = math.log(16) / 16
    # Of a prompt of 16 tokens the end alone is a summary token; of one of 3, the end at 2 and all padding after it.
    assert values["summary"].tolist() == pytest.approx([each, 14 * each])


def test_attention_entropy_equals_that_of_a_plain_generation(tiny: Diffusion) -> None:
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
    assert score_of(tiny, AttentionEntropy()).score == pytest.approx(expected, rel=1e-3)
