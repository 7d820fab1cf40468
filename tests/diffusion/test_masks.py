from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench import Diffusion, Neurons
from nemo_bench.diffusion import value_layers
from nemo_bench.errors import ModelError
from tiny import tiny_pipeline, tiny_texts

LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": 8,
    "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v": 8,
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": 16,
}
neuron_sets = st.dictionaries(st.sampled_from(sorted(LAYERS)), st.lists(st.integers(0, 7), max_size=8)).map(Neurons)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(neuron_sets, min_size=1, max_size=4), factor=st.sampled_from([0.0, -0.5, 2.0]))
def test_each_row_is_blocked_as_if_it_were_alone(tiny: Diffusion, rows: list[Neurons], factor: float) -> None:
    text, latents = tiny.encode(tiny_texts(len(rows))), tiny.latents(range(len(rows)))
    with tiny.block(rows, factor):
        together = tiny.predict_noise(latents, 981, text)
    for row, neurons in enumerate(rows):
        with tiny.block(neurons, factor):
            alone = tiny.predict_noise(latents[row : row + 1], 981, text.rows([row]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-3)


def test_blocking_equals_zero_rows_of_the_value_weight() -> None:
    model = Diffusion(tiny_pipeline(), steps=4)
    neurons = Neurons({layer: range(0, width, 3) for layer, width in LAYERS.items()})
    text, latents = model.encode(tiny_texts(2)), model.latents([1, 2])
    with model.block(neurons):
        blocked = model.predict_noise(latents, 981, text)
    plain = model.predict_noise(latents, 981, text)
    for layer, ids in neurons.items():
        model.value_layers[layer].weight[list(ids)] = 0
    torch.testing.assert_close(model.predict_noise(latents, 981, text), blocked)
    assert not torch.allclose(plain, blocked, atol=1e-3)


def test_nothing_blocked_changes_no_bit(tiny: Diffusion) -> None:
    text, latents = tiny.encode(tiny_texts(2)), tiny.latents([1, 2])
    plain = tiny.predict_noise(latents, 981, text)
    with tiny.block([Neurons(), Neurons()]):
        assert torch.equal(tiny.predict_noise(latents, 981, text), plain)
    assert torch.equal(tiny.predict_noise(latents, 981, text), plain)


def test_factors_reach_both_halves_of_guidance(tiny: Diffusion) -> None:
    """A pipeline stacks unconditional rows on conditional ones; both are blocked (specs: every batch row)."""
    everything = Neurons({name: range(width) for name, width in tiny.masks.widths.items()})
    text, latents = tiny.encode(tiny_texts(2)), tiny.latents([1, 2])
    with tiny.block([everything, Neurons()]):
        mixed = tiny.generate(text, latents)
    with tiny.block([everything]):
        first = tiny.generate(text.rows([0]), latents[:1])
    torch.testing.assert_close(mixed[:1], first, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(mixed[1:], tiny.generate(text.rows([1]), latents[1:]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        (Neurons({"mid_block.attentions.0.transformer_blocks.0.attn2.to_w": [0]}), "Did you mean 'mid_block"),
        (Neurons({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [16]}), "0 to 15, given 16"),
        (Neurons({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [-1]}), "0 to 15, given -1"),
    ],
)
def test_unknown_neurons_are_refused(tiny: Diffusion, neurons: Neurons, message: str) -> None:
    with pytest.raises(ModelError, match=message), tiny.block(neurons):
        pass


def test_nested_blocks_are_refused_and_the_first_stays_usable(tiny: Diffusion) -> None:
    with pytest.raises(ModelError, match="already"), tiny.block(Neurons()), tiny.block(Neurons()):
        pass
    with tiny.block(Neurons()):
        pass


def test_a_batch_that_sets_can_not_be_shared_out_over_is_refused(tiny: Diffusion) -> None:
    text, latents = tiny.encode(tiny_texts(3)), tiny.latents(range(3))
    with pytest.raises(ModelError, match="2 neuron sets"), tiny.block([Neurons(), Neurons()]):
        tiny.predict_noise(latents, 981, text)


def test_hooks_that_do_not_fire_are_an_error() -> None:
    model = Diffusion(tiny_pipeline(), steps=4)
    attention = model.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.fuse_projections()
    text, latents = model.encode(tiny_texts(1)), model.latents([0])
    attention.processor = _Fused()
    with pytest.raises(ModelError, match="no effect in 1 of 7"), model.block(Neurons({next(iter(LAYERS)): [0]})):
        model.predict_noise(latents, 981, text)


class _Fused:
    """Attention through the fused projection, as fused processors do it."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):  # type: ignore[no-untyped-def]
        query = attn.to_q(hidden_states)
        _, value = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        return attn.to_out[0](query + value.mean(1, keepdim=True))


def test_the_network_is_compiled_after_it_got_its_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = []
    monkeypatch.setattr(
        UNet2DConditionModel,
        "compile",
        lambda unet: hooks.extend(layer._forward_hooks for layer in value_layers(unet).values()),
    )
    assert Diffusion(tiny_pipeline(), compiled=True).compiled
    assert hooks
    assert all(hooks)


def test_blocking_is_refused_where_all_projections_are_fused() -> None:
    model = Diffusion(tiny_pipeline())
    model.pipeline.fuse_qkv_projections()
    text = model.encode(["red sun"])
    with pytest.raises(ModelError, match="unfuse"), torch.no_grad(), model.block(Neurons({next(iter(LAYERS)): [0]})):
        model.predict_noise(model.latents([0]), 981, text)


def test_a_block_without_a_pass_is_no_error(tiny: Diffusion) -> None:
    with tiny.block(Neurons({next(iter(LAYERS)): [0]})):
        pass
