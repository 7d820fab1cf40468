"""Spikes by hand, and which rows they are attenuated in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from batches import batch_of
from nemo_bench import Diffusion
from nemo_bench.diffusion.families.unet import StableDiffusion
from nemo_bench.methods import AttentionAttenuation
from nemo_bench.methods.attention_attenuation import spikes

LARGEST = [5.0, 1.0, 1.0, 1.0, 3.0]
"""Largest logits of five tokens: without the start their mean is 1.5 and their standard deviation 1."""


class Layer:
    """Stands in for a model: feeds the edit with logits of one head, (rows, queries, tokens)."""

    begins = (0,)
    family = StableDiffusion

    def __init__(self, logits: list[list[list[float]]]) -> None:
        self.logits, self.edited, self.blocks = torch.tensor(logits)[:, None], torch.empty(0), ("",)

    @contextmanager
    def edit_attention(
        self, edit: Callable[[str, torch.Tensor], torch.Tensor], blocks: tuple[str, ...]
    ) -> Iterator[None]:
        self.blocks = blocks
        yield
        self.edited = edit("layer", self.logits)[:, 0]


def applied(tiny: Diffusion, logits: list[list[list[float]]], **settings: Any) -> tuple[Layer, dict[str, float]]:
    """The layer after its logits are edited for one image, and the notes of the image."""
    layer = Layer(logits)
    with AttentionAttenuation(**settings).apply(layer, batch_of(tiny, [(0, 0)])) as changed:  # type: ignore[arg-type]
        pass
    return layer, dict(changed.notes[0])


def test_a_spike_is_a_token_whose_largest_logit_stands_out() -> None:
    logits = torch.tensor([LARGEST, [0.0, -9.0, -9.0, -9.0, -9.0]])[None, None]
    assert spikes(logits, 0.1).tolist() == [[[False, False, False, False, True]]]
    assert spikes(logits, 1.49).tolist() == [[[False, False, False, False, True]]]
    assert not spikes(logits, 1.51).any()


def test_probabilities_are_compared_where_they_are_the_measure() -> None:
    # The last token has the largest logit of all but the start, in a pixel whose attention the start takes.
    logits = torch.tensor([[[[9.0, 0.0, 0.0, 3.0], [0.0, 0.0, 2.0, 0.0]]]])
    assert spikes(logits, 0.5).tolist() == [[[False, False, False, True]]]
    assert spikes(logits, 0.5, "probability").tolist() == [[[False, False, True, False]]]


def test_padding_that_is_masked_is_no_token_and_without_a_begin_token_the_first_may_be_a_spike() -> None:
    logits = torch.tensor([[[[3.0, 1.0, 1.0, 1.0, -torch.inf]]]])  # mean 1.5, standard deviation 1
    assert spikes(logits, 1.49, begins=()).tolist() == [[[True, False, False, False, False]]]
    assert not spikes(logits, 1.51, begins=()).any()
    assert spikes(logits, -1.0, "probability", begins=()).tolist() == [[[True, True, True, True, False]]]
    assert not spikes(logits[..., :1], 0.0, begins=()).any()  # one token has no deviation


def test_every_head_and_image_has_spikes_of_its_own() -> None:
    one, other = torch.tensor(LARGEST), torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0])
    logits = torch.stack([torch.stack([one, other]), torch.stack([other, one])])[:, :, None]
    assert spikes(logits, 0.1).int().argmax(2).tolist() == [[4, 1], [1, 4]]


def test_the_conditional_half_alone_is_attenuated(tiny: Diffusion) -> None:
    layer, notes = applied(tiny, [[LARGEST, LARGEST], [LARGEST, LARGEST]], threshold=0.1)
    assert layer.blocks == ("down_blocks.", "mid_block.")
    assert layer.edited[0].tolist() == [LARGEST] * 2
    torch.testing.assert_close(layer.edited[1], torch.tensor([[5.0, 1.0, 1.0, 1.0, 0.9]] * 2))
    assert notes == {"spikes": 0.25, "raised": 0.0}


def test_a_pass_without_guidance_is_conditional(tiny: Diffusion) -> None:
    layer, _ = applied(tiny, [[LARGEST]], factor=0.0, blocks="mid")
    assert layer.edited.tolist() == [[[5, 1, 1, 1, 0]]]
    assert layer.blocks == ("mid_block.",)


@pytest.mark.parametrize(("queries", "raised"), [([[0.0, -9.0, -9.0, -1.0]], 1.0), ([[0.0, -9.0, -9.0, 2.0]] * 3, 0.0)])
def test_negative_logits_of_spikes_are_raised_and_counted(
    tiny: Diffusion, queries: list[list[float]], raised: float
) -> None:
    layer, notes = applied(tiny, [queries], threshold=0.5)
    assert bool((layer.edited[0, :, 3] > torch.tensor(queries)[:, 3]).all()) == bool(raised)
    assert notes == {"spikes": pytest.approx(1 / 3, abs=1e-4), "raised": raised}
