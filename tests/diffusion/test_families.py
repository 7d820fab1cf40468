"""Every family from text to image, on tiny pipelines of the true classes, and the layers of the full-size networks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)

from nemo_bench import Diffusion, Neurons
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run
from nemo_bench.benchmark.runner import load_model
from nemo_bench.config import grid, options
from nemo_bench.diffusion import Similarity, value_layers
from nemo_bench.diffusion.families import family_of
from nemo_bench.diffusion.flops import count_flops
from nemo_bench.diffusion.schedule import ddim
from nemo_bench.errors import ModelError
from nemo_bench.localization import Calibration, NemoSettings, activation_statistics, localize
from on_disk import read_records
from published_sizes import FULL_SIZE_UNETS
from tiny import tiny_pipeline, tiny_sd2, tiny_sdxl, tiny_texts

PIPELINES: dict[str, Callable[..., Any]] = {
    "sd1": tiny_pipeline,
    "sd2": tiny_sd2,
    "sd2-base": lambda seed=0: tiny_sd2(seed, "epsilon"),
    "sdxl": tiny_sdxl,
    "sdxl-without-zeros": lambda seed=0: tiny_sdxl(seed, zeros_for_empty=False),
}


def wrapped(family: str, seed: int = 0, **settings: Any) -> Diffusion:
    given = {"steps": 3, "guidance": 3.0, "similarity": Similarity(1.0, ()), **settings}
    return Diffusion(PIPELINES[family](seed), **given)


@pytest.fixture(scope="module", params=[*PIPELINES])
def model(request: pytest.FixtureRequest) -> Diffusion:
    return wrapped(request.param)


def half_of(model: Diffusion, shift: int = 0) -> Neurons:
    return Neurons({name: range(shift, width, 2) for name, width in model.masks.widths.items()})


def test_every_network_is_a_part_of_the_module(model: Diffusion) -> None:
    networks = {name for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert networks == set(dict(model.named_children()))
    assert networks >= {"unet", "vae", "text_encoder"}
    assert ("text_encoder_2" in networks) == ("XL" in type(model.pipeline).__name__)


def test_an_image_follows_its_text(model: Diffusion) -> None:
    latents = model.latents([4, 4])
    first, second = model.generate(model.encode(tiny_texts(2)), latents)
    assert (first - second).abs().max() > 0.01


def test_predicted_noise_is_that_of_the_pipelines_first_step(model: Diffusion) -> None:
    """Seen from outside: what the plain pipeline gives its UNet in the first of 50 steps, and what comes out."""
    texts, latents = tiny_texts(2), model.latents([4, 5])
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def keep(_: Any, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor]) -> None:
        seen.append((args[0], args[1], output[0]))

    hook = model.unet.register_forward_hook(keep)

    def stop(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    # With the scheduler that the model samples by.
    plain = copy.copy(model.pipeline)
    plain.scheduler = ddim(model.pipeline.scheduler.config)
    plain(
        texts, latents=latents, guidance_scale=1.0, output_type="latent", num_inference_steps=50,
        callback_on_step_end=stop,
    )  # fmt: skip
    hook.remove()
    sample, step, output = seen[0]
    assert int(step) == model.timestep() == 981
    assert torch.equal(sample, latents)
    if model.scheduler.config.prediction_type == "v_prediction":
        alpha = model.scheduler.alphas_cumprod[981]
        output = alpha.sqrt() * output + (1 - alpha).sqrt() * latents
    torch.testing.assert_close(model.predict_noise(latents, 981, model.encode(texts)), output)


def test_the_families_cover_both_prediction_types() -> None:
    kinds = {name: make().scheduler.config.prediction_type for name, make in PIPELINES.items()}
    assert [name for name, kind in kinds.items() if kind == "v_prediction"] == ["sd2"]


def test_each_row_is_blocked_as_if_it_were_alone(model: Diffusion) -> None:
    rows = [half_of(model), Neurons(), half_of(model, 1)]
    text, latents = model.encode(tiny_texts(3)), model.latents(range(3))
    with model.block(rows):
        together = model.predict_noise(latents, 981, text), model.generate(text, latents)
    for row, neurons in enumerate(rows):
        one, start = text.rows([row]), latents[row : row + 1]
        with model.block(neurons):
            alone = model.predict_noise(start, 981, one), model.generate(one, start)
        for many, single in zip(together, alone, strict=True):
            torch.testing.assert_close(many[row : row + 1], single, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(together[0][1:2], model.predict_noise(latents[:1], 981, text.rows([0])), atol=1e-3)


def test_rows_may_be_repeated(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([3, 3, 3])
    noise = model.predict_noise(latents, 981, text.rows([1, 0, 1]))
    assert len(text.rows([1, 0, 1])) == 3
    torch.testing.assert_close(noise[0], noise[2])
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)


@pytest.mark.parametrize("family", [*PIPELINES])
def test_export_gives_the_images_of_blocking(family: str, tmp_path: Path) -> None:
    model = wrapped(family)
    before, neurons = model.state_digest(), half_of(model)
    text, latents = model.encode(tiny_texts(2)), model.latents([1, 2])
    with model.block(neurons):
        blocked = model.generate(text, latents)
    model.export(tmp_path / "model", neurons)
    assert model.state_digest() == before
    exported = Diffusion.load(str(tmp_path / "model"), steps=3, guidance=3.0)
    assert type(exported.pipeline) is type(model.pipeline)
    torch.testing.assert_close(exported.generate(exported.encode(tiny_texts(2)), latents), blocked)
    assert not torch.allclose(model.generate(text, latents), blocked, atol=1e-3)


def test_nemo_localizes(model: Diffusion) -> None:
    texts = tiny_texts(24)
    mean, std = activation_statistics(model, [texts[:16], texts[16:]])
    assert {name: len(values) for name, values in mean.items()} == model.masks.widths
    before = model.state_digest()
    calibration = Calibration(mean, std, 0.3, len(texts))
    found = localize(model, model.encode(texts[:1]), model.latents(range(3)), calibration, NemoSettings())
    assert found.gate_score > 0.3
    assert set(found.neurons) <= set(model.value_layers)
    assert 0 < found.neurons.count <= found.initial.count
    assert model.state_digest() == before


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_run_through_the_configuration(family: str, tmp_path: Path, prompt_file: Path) -> None:
    PIPELINES[family]().save_pretrained(tmp_path / "model")
    words = [
        "seeds=2",
        "localize_seeds=2",
        "trainer=cpu",
        "prompts.calibration=package:planted/prompts/calibration.txt",
        "prompts.calibration_limit=6",
        "method=nemo",
    ]
    words += [f"root={tmp_path / 'results'}", f"prompts.files=[{prompt_file}]", "model.steps=2"]
    (cell,) = plan(grid([*words, f"model.source={tmp_path / 'model'}"]))
    run([cell], "test")
    loaded = load_model(cell.config.settings.model)
    assert json.loads((cell.store.folder / "layers.json").read_text()) == loaded.masks.widths
    assert cell.spec.digests["model"]
    assert [len(read_records(cell.store.folder, stage)) for stage in ("localize", "generate", "score")] == [3, 6, 9]


def test_either_tokenizer_may_be_too_short() -> None:
    model = wrapped("sdxl")
    assert not model.truncated("red sun")
    assert model.truncated("red " * 40)
    model.pipeline.tokenizer_2.model_max_length = 3
    assert model.truncated("red sun")


def test_sdxl_has_several_transformer_layers_and_none_in_the_first_block() -> None:
    short = [
        name.replace(".transformer_blocks", "").replace(".attn2.to_v", "") for name in wrapped("sdxl").value_layers
    ]
    downs = [f"down_blocks.1.attentions.{a}.0" for a in range(2)]
    downs += [f"down_blocks.2.attentions.{a}.{t}" for a in range(2) for t in range(2)]
    assert short == [*downs, "mid_block.attentions.0.0", "mid_block.attentions.0.1"]
    assert len(wrapped("sdxl", layers="all").value_layers) == len(short) + 9


def test_guidance_leads_sdxl_away_from_zeros_unless_the_pipeline_says_otherwise() -> None:
    zeros, empty = wrapped("sdxl").unconditional(2), wrapped("sdxl-without-zeros")
    assert zeros.pooled is not None
    assert not zeros.text.any()
    assert not zeros.pooled.any()
    assert len(zeros) == len(zeros.pooled) == 2
    torch.testing.assert_close(empty.unconditional(1).text, empty.encode([""]).text)
    torch.testing.assert_close(empty.unconditional(1).pooled, empty.encode([""]).pooled)


def test_size_and_pooled_text_matter_to_sdxl() -> None:
    model = wrapped("sdxl")
    text, latents = model.encode(tiny_texts(1)), model.latents([0])
    plain = model.unet(latents, 981, **model.family.unet_inputs(text, (32, 32))).sample
    larger = model.unet(latents, 981, **model.family.unet_inputs(text, (1024, 1024))).sample
    other = type(text)(text.text, model.encode(tiny_texts(2)).rows([1]).pooled)
    torch.testing.assert_close(model.predict_noise(latents, 981, text), plain)
    for changed in (larger, model.predict_noise(latents, 981, other)):
        assert (changed - plain).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_half_precision_works_and_leaves_the_weights_as_they_were(family: str) -> None:
    """SDXL's image decoder overflows in float16 and runs in float32 for a moment."""
    model, whole = Diffusion(PIPELINES[family]().to(torch.float16), steps=2, guidance=3.0), wrapped(family, steps=2)
    before, latents = model.state_digest(), whole.latents([0, 1])
    images = model.generate(model.encode(tiny_texts(2)), latents.half())
    assert images.dtype is model.predict_noise(latents.half(), 981, model.encode(tiny_texts(2))).dtype is torch.float32
    torch.testing.assert_close(images, whole.generate(whole.encode(tiny_texts(2)), latents), atol=0.05, rtol=0)
    assert model.state_digest() == before


def test_other_pipelines_are_refused() -> None:
    parts = tiny_pipeline().components
    parts = {name: part for name, part in parts.items() if name != "image_encoder"}
    parts["unet"] = UNet2DConditionModel(**{**parts["unet"].config, "in_channels": 9})
    other = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ModelError, match="StableDiffusionInpaintPipeline are not supported; give one of Stable"):
        Diffusion(other)


MILLION_WEIGHTS = {"1.x": 859.5, "2.x base": 865.9, "2.x": 865.9, "XL": 2567.5}


@pytest.fixture(scope="module", params=[*FULL_SIZE_UNETS])
def full_size(request: pytest.FixtureRequest) -> tuple[str, UNet2DConditionModel]:
    with torch.device("meta"):
        return request.param, UNet2DConditionModel(**FULL_SIZE_UNETS[request.param])


def test_the_full_size_networks_are_those_published(full_size: tuple[str, UNet2DConditionModel]) -> None:
    """Their well-known numbers of weights."""
    name, unet = full_size
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(MILLION_WEIGHTS[name], abs=0.1)


@pytest.mark.parametrize(
    ("name", "models", "rest"),
    [
        ("1.x", ("sd14", "sd15", "realistic_vision"), 123_060_480),
        ("2.x", ("sd20", "sd21"), 340_387_840),
        ("2.x base", ("sd21_base",), 340_387_840),
        ("XL", ("sdxl",), 123_060_480 + 694_659_840),
    ],
)
def test_what_is_published_of_a_model_follows_from_its_configuration(
    name: str, models: tuple[str, ...], rest: int
) -> None:
    """Operations of a pass, and weights of all networks; ``rest`` are those of the text encoders."""
    config, is_large = FULL_SIZE_UNETS[name], name == "XL"
    family = family_of("StableDiffusionXLPipeline" if is_large else "StableDiffusionPipeline")
    with torch.device("meta"):
        whole = {key: value for key, value in UNet2DConditionModel(**config).config.items() if key[0] != "_"}
    text = ((1, 77, config["cross_attention_dim"]), (1, 1280) if is_large else None, None)
    side = 8 * config["sample_size"]
    total = count_flops(family, UNet2DConditionModel, json.dumps(whole), family.latent_shape(whole), (side, side), text)
    weights = MILLION_WEIGHTS[name] / 1e3 + (rest + 83_653_863) / 1e9
    for model in models:
        (choice,) = grid([f"model={model}", "method=none"])
        published = choice.settings.model.published
        assert published.teraflops == pytest.approx(total / 1e12, rel=1e-3)
        assert published.weights == pytest.approx(weights, rel=1e-3)
        assert published.download == pytest.approx(4 * weights, rel=0.02)
        assert published.licence in choice.settings.model.summary
        assert not published.gated


def test_layers_of_the_full_size_networks(full_size: tuple[str, UNet2DConditionModel]) -> None:
    name, unet = full_size
    found = value_layers(unet)
    depths = {1: 2, 2: 10} if name == "XL" else {0: 1, 1: 1, 2: 1}
    places = [(f"down_blocks.{block}.attentions.{a}", depth) for block, depth in depths.items() for a in range(2)]
    places.append(("mid_block.attentions.0", [*depths.values()][-1]))
    expected = [f"{place}.transformer_blocks.{t}.attn2.to_v" for place, depth in places for t in range(depth)]
    assert [*found] == expected
    widths = [layer.out_features for layer in found.values()]
    if name == "XL":
        assert widths == [640] * 4 + [1280] * 30
    else:
        assert widths == [320, 320, 640, 640, 1280, 1280, 1280]
    assert {layer.in_features for layer in found.values()} == {FULL_SIZE_UNETS[name]["cross_attention_dim"]}


def test_all_layers_of_the_full_size_networks(full_size: tuple[str, UNet2DConditionModel]) -> None:
    name, unet = full_size
    parts = [layer.split(".")[0] for layer in value_layers(unet, "all")]
    down_and_mid, up = (34, 36) if name == "XL" else (7, 9)
    assert [*accumulate(part == "up_blocks" for part in parts)] == [0] * down_and_mid + [*range(1, up + 1)]


UNETS = [name for name in options("model") if name.startswith(("sd1", "sd2", "sdxl", "realistic"))]


@pytest.mark.parametrize("name", UNETS)
def test_the_models_of_the_configuration(name: str) -> None:
    (choice,) = grid([f"model={name}", "method=none"])
    settings = choice.settings.model
    assert settings.source.count("/") == 1
    assert (settings.steps, settings.layers, settings.clip) == (50, "down+mid", "ViT-B-32-quickgelu")
    assert "RAIL" in settings.summary
    assert "@" in settings.citation
