"""What searches for one picture have in common: numbers by hand, and of a model."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_bench import Diffusion
from nemo_bench.benchmark.diagnostics import agreement, diagnose, discrepancy, spread
from nemo_bench.diffusion import Conditioning
from nemo_bench.methods import Wanda
from nemo_bench.methods.embedding_search import random_embeddings
from tiny import tiny_texts


def test_spread_by_hand() -> None:
    """Distances 3, 4 and 5, at right angles seen from the origin but for one pair."""
    text = Conditioning(torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]], [[0.0, 0.0]]]))
    found = spread(text)
    assert (found.embeddings, found.mean, found.low, found.median, found.high) == (3, 4.0, 3.5, 4.0, 4.5)
    assert found.cosine == 0
    pooled = spread(Conditioning(torch.zeros(2, 1, 2), torch.tensor([[1.0, 0.0], [1.0, 2.0]])))
    assert pooled.mean == 2
    assert pooled.cosine == pytest.approx(1 / math.sqrt(5))


def test_discrepancy_by_hand() -> None:
    assert discrepancy(torch.tensor([[3.0, 0.0], [0.0, 4.0]])) == pytest.approx(5 / 3.5)
    assert discrepancy(torch.zeros(2, 3)) == 0


@pytest.mark.parametrize(
    ("sets", "iou", "empty"),
    [
        ([{1, 2}, {2, 3}], 1 / 3, 0),
        ([{1, 2}, {1, 2}], 1.0, 0),
        ([set(), set(), {1}], 1 / 3, 1),
        ([{0}, {0, 1, 2, 3}, {1}], (1 / 4 + 0 + 1 / 4) / 3, 0),
    ],
)
def test_agreement_by_hand(sets: list[set[int]], iou: float, empty: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_bench.benchmark.diagnostics.COLUMNS", 3)
    chosen = torch.tensor([[number in each for number in range(10)] for each in sets])
    found = agreement(chosen)
    assert (found.iou, found.empty) == (pytest.approx(iou), empty)
    share = sum(map(len, sets)) / len(sets) / 10
    assert (found.share, found.random) == (pytest.approx(share), pytest.approx(share / (2 - share)))


def test_equal_embeddings_do_not_differ_and_others_do(tiny: Diffusion) -> None:
    wanda = Wanda(ratio=0.1)
    starts = random_embeddings(tiny, tiny.encode(tiny_texts(2)), [1, 2])
    same = tiny.encode(tiny_texts(1)).rows([0, 0])
    digest = tiny.state_digest()
    one = diagnose(tiny, same, starts, tiny_texts(3), [], seed=4, wanda=wanda)
    assert set(one.spread) == {"found", "starts"}  # there are no general prompts
    assert one.spread["found"].mean == pytest.approx(0, abs=1e-5)
    assert one.spread["starts"].mean > 10
    assert {"mid_block", "down_blocks.0", "up_blocks.0", *tiny.value_layers} <= set(one.activations)
    for each in one.activations.values():
        assert each["found"] == pytest.approx(0, abs=1e-3)
        assert each["memorized"] > 1e-3
    assert len(one.agreement) == 16  # a feed-forward block beside each cross-attention
    assert all(layer.iou == 1 for layer in one.agreement.values())
    assert any(0 < layer.share <= 0.1 for layer in one.agreement.values())
    other = diagnose(tiny, starts, starts, [], tiny_texts(2), seed=4, wanda=wanda)
    assert other.spread["general"].mean < other.spread["found"].mean == other.spread["starts"].mean
    assert all(set(each) == {"found"} for each in other.activations.values())
    assert any(layer.iou < 1 for layer in other.agreement.values())
    assert tiny.state_digest() == digest
