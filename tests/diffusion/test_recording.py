from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from nemo_bench import Diffusion
from nemo_bench.diffusion import AttentionRecorder, Similarity, cross_attention_layers
from tiny import tiny_pipeline, tiny_sd2, tiny_sdxl, tiny_texts


@pytest.fixture(params=[tiny_pipeline, tiny_sd2, tiny_sdxl])
def model(request: pytest.FixtureRequest) -> Diffusion:
    make: Callable[[], DiffusionPipeline] = request.param
    return Diffusion(make(), steps=3, guidance=3.0, similarity=Similarity(1.0, ()))


def test_layers_of_stable_diffusion_are_six_one_and_nine(tiny: Diffusion) -> None:
    names = cross_attention_layers(tiny)
    assert [name.split(".")[0] for name in names] == ["down_blocks"] * 6 + ["mid_block"] + ["up_blocks"] * 9
    assert names[3] == "down_blocks.1.attentions.1.transformer_blocks.0.attn2"


def test_recorded_probabilities_are_those_that_make_the_output(model: Diffusion) -> None:
    """The weighted sum of values under the recorded map is what the layer gives."""
    name, rows = cross_attention_layers(model)[-1], 2
    layer = model.unet.get_submodule(name)
    outputs: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    recorder = AttentionRecorder(model, rows)
    recorder.wanted = {name}
    text, latents = model.encode(tiny_texts(rows)), model.latents([0, 1])
    with recorder.recording():
        model.predict_noise(latents, 500, text)
    hook.remove()
    maps = recorder.maps[name]
    torch.testing.assert_close(maps.sum(3), torch.ones(maps.shape[:3]))
    assert maps.shape[:2] == (rows, layer.heads)
    assert maps.shape[3] == text.text.shape[1]
    values = layer.head_to_batch_dim(layer.to_v(text.text)).unflatten(0, (rows, layer.heads))
    expected = layer.to_out[0](layer.batch_to_head_dim((maps @ values).flatten(0, 1)))
    torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)


def test_of_guided_sampling_it_is_the_conditional_half(model: Diffusion) -> None:
    name = cross_attention_layers(model)[0]
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    guided, alone = AttentionRecorder(model, 2), AttentionRecorder(model, 2)
    guided.wanted = alone.wanted = {name}
    first: list[torch.Tensor] = []

    def keep(step):  # type: ignore[no-untyped-def]
        first.append(guided.maps[name])
        return step.guided(step.scale)

    with guided.recording(), model.guide(keep):
        model.generate(text, latents)
    with alone.recording():
        model.predict_noise(latents, model.timesteps()[0], text)
    torch.testing.assert_close(first[0], alone.maps[name], rtol=1e-3, atol=1e-5)
    assert (first[0][0] - first[0][1]).abs().max() > 1e-4


def test_nothing_changes_while_it_records_or_afterwards(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    plain, before = model.generate(text, latents), model.state_digest()
    kept = dict(model.unet.attn_processors)
    recorder = AttentionRecorder(model, 2)
    recorder.wanted = cross_attention_layers(model)
    with recorder.recording():
        assert torch.equal(model.generate(text, latents), plain)
        with recorder.paused():
            recorder.maps.clear()
            model.predict_noise(latents, 500, text)
        assert not recorder.maps
    assert model.unet.attn_processors == kept
    assert model.state_digest() == before
    with pytest.raises(RuntimeError, match="stop"), recorder.recording():
        raise RuntimeError("stop")
    assert model.unet.attn_processors == kept


def test_it_agrees_with_attention_computed_step_by_step(tiny: Diffusion) -> None:
    """Against diffusers' own unfused processor, its softmax looked at."""
    name = cross_attention_layers(tiny)[3]
    layer, seen = tiny.unet.get_submodule(name), list[torch.Tensor]()

    class Spy(AttnProcessor):
        def __call__(self, attn, *args, **options):  # type: ignore[no-untyped-def]
            original = attn.get_attention_scores

            def look(*inner):  # type: ignore[no-untyped-def]
                seen.append(original(*inner))
                return seen[-1]

            attn.get_attention_scores = look
            try:
                return super().__call__(attn, *args, **options)
            finally:
                del attn.get_attention_scores

    text, latents = tiny.encode(tiny_texts(2)), tiny.latents([0, 1])
    recorder = AttentionRecorder(tiny, 2)
    recorder.wanted = {name}
    with recorder.recording():
        tiny.predict_noise(latents, 500, text)
    kept = layer.processor
    layer.set_processor(Spy())
    try:
        tiny.predict_noise(latents, 500, text)
    finally:
        layer.set_processor(kept)
    torch.testing.assert_close(recorder.maps[name].flatten(0, 1), seen[0], rtol=1e-5, atol=1e-6)
