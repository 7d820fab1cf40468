from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from batches import batch_of
from nemo_bench import ConfigError, Diffusion
from nemo_bench.diffusion import Conditioning
from nemo_bench.methods import AttentionRescaling

INF = float("inf")


class Layer:
    """Stands in for a model: feeds the edit with given logits of one head and one query."""

    begins = (0,)

    def __init__(self, lengths: dict[str, int], logits: list[list[float]]) -> None:
        self.lengths, self.logits, self.edited = lengths, torch.tensor(logits)[:, None, None], [[0.0]]

    def tokens(self, text: str) -> list[str]:
        return ["token"] * self.lengths[text]

    @contextmanager
    def edit_attention(self, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        yield
        self.edited = edit("layer", self.logits)[:, 0, 0].tolist()


def edited(tiny: Diffusion, rows: int, **settings: Any) -> list[list[float]]:
    """What becomes of logits 1, 2, 3, 4, 5 where the first prompt has three tokens and the second four."""
    batch = replace(batch_of(tiny, [(0, 0), (1, 0)], ["three", "four"]), text=Conditioning(torch.empty(2, 5, 1)))
    layer = Layer({"three": 3, "four": 4}, [[1.0, 2.0, 3.0, 4.0, 5.0]] * rows)
    with AttentionRescaling(**settings).apply(layer, batch):  # type: ignore[arg-type]
        pass
    return layer.edited


def test_the_mask_follows_each_prompt_and_the_factor_the_conditional_half(tiny: Diffusion) -> None:
    assert edited(tiny, 4, factor=2.0) == [
        [1, 2, 3, -INF, -INF],
        [1, 2, 3, 4, -INF],
        [2, 2, 3, -INF, -INF],
        [2, 2, 3, 4, -INF],
    ]


def test_a_pass_without_guidance_is_conditional(tiny: Diffusion) -> None:
    assert edited(tiny, 2, factor=2.0, mask=False) == [[2, 2, 3, 4, 5]] * 2


def test_the_end_token_can_be_masked_as_well(tiny: Diffusion) -> None:
    assert edited(tiny, 2, factor=1.0, mask_end=True) == [[1, 2, -INF, -INF, -INF], [1, 2, 3, -INF, -INF]]


def test_lengths_count_start_and_end(tiny: Diffusion) -> None:
    assert len(tiny.tokens("red sun map")) == 5
    assert len(tiny.tokens("red " * 30)) == 16


def test_end_token_is_masked_with_the_padding_only() -> None:
    with pytest.raises(ConfigError, match="set mask=true"):
        AttentionRescaling(mask=False, mask_end=True)
