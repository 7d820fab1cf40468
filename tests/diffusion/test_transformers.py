"""Families of transformers from text to image, on tiny pipelines of the true classes, and their full-size layers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nemo_bench import Diffusion, Neurons, Prompt
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run
from nemo_bench.config import grid, options
from nemo_bench.diffusion import UNETS, Lora, Similarity, Source, pipeline_class_of
from nemo_bench.diffusion.attention import edit_attention
from nemo_bench.diffusion.families import FAMILIES, family_of
from nemo_bench.diffusion.flops import count_flops
from nemo_bench.errors import ModelError
from nemo_bench.localization import (
    Calibration,
    NemoSettings,
    activation_statistics,
    activations,
    localize,
    noise_differences,
)
from nemo_bench.localization.localizers import Activation, Inputs
from nemo_bench.methods import AttentionRescaling, Batch, NeMo, NoMitigation, UpdateNorms
from nemo_bench.methods.embedding_search import random_embeddings, search_embeddings
from on_disk import read_records
from published_sizes import FULL_SIZE_TRANSFORMERS
from tiny import tiny_pipeline, tiny_sd2, tiny_sdxl, tiny_texts
from tiny_transformers import TOKENS, tiny_flux, tiny_pixart, tiny_sana, tiny_sd3


@dataclass(frozen=True)
class Case:
    """A tiny pipeline, and what its own call takes besides texts, noise, steps and guidance."""

    make: Callable[..., Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=lambda: {"tokens": TOKENS, "layers": "all"})
    noise: Callable[[Tensor], Tensor] = lambda latents: latents  # in the form that the call takes
    guidance: float = 4.0
    threshold: float = 0.5  # of memorization

    def model(self, **settings: Any) -> Diffusion:
        given = {"steps": 3, "guidance": self.guidance, "similarity": Similarity(1.0, ()), **self.settings}
        return Diffusion(self.make(), **{**given, **settings})


_PIXART = {"max_sequence_length": TOKENS, "use_resolution_binning": False, "guidance_scale": 4.0}
_SANA = {**_PIXART, "height": 32, "width": 32}
_FLUX = {"max_sequence_length": TOKENS, "height": 32, "width": 32, "guidance_scale": 3.5}
_TRUE = {**_FLUX, "true_cfg_scale": 4.0, "negative_prompt": ["", ""]}
_FLUX_SETTINGS = {"tokens": TOKENS, "layers": "double", "size": 128, "distilled_guidance": 3.5}


def packed(latents: Tensor) -> Tensor:
    packs: Tensor = FluxPipeline._pack_latents(latents, len(latents), 16, 16, 16)
    return packs


CASES = {
    "sd3.5": Case(tiny_sd3, {"max_sequence_length": TOKENS}),
    "sd3": Case(lambda: tiny_sd3(large=False), {"max_sequence_length": TOKENS}),
    "sd3-dynamic": Case(lambda: tiny_sd3(dynamic=True), {"max_sequence_length": TOKENS}),
    "sd3-without-t5": Case(lambda: tiny_sd3(absent=(3,)), {"max_sequence_length": TOKENS}),
    "pixart-alpha": Case(tiny_pixart, _PIXART),
    "pixart-sigma": Case(lambda: tiny_pixart(sigma=True), _PIXART),
    "flux-dev": Case(tiny_flux, _FLUX, _FLUX_SETTINGS, packed, 1.0),
    "flux-dev-guided": Case(tiny_flux, _TRUE, _FLUX_SETTINGS, packed),
    "flux-schnell": Case(
        lambda: tiny_flux(distilled=False, dynamic=False), _TRUE, {**_FLUX_SETTINGS, "layers": "all"}, packed
    ),
    "sana": Case(lambda: tiny_sana(normed=False), _SANA),
    # Without positions nor weights that were trained, seeds agree on little.
    "sana1.5": Case(tiny_sana, _SANA, threshold=-0.5),
}
FIRST = ("sd3.5", "pixart-alpha", "flux-dev-guided", "sana1.5")
"""One case of each family."""


@pytest.fixture(scope="module", params=[*FIRST])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case: Case) -> Diffusion:
    return case.model()


def half_of(model: Diffusion, shift: int = 0) -> Neurons:
    return Neurons({name: range(shift, width, 2) for name, width in model.masks.widths.items()})


@pytest.mark.parametrize("name", [*CASES])
def test_the_own_loop_gives_the_images_of_the_pipeline(name: str) -> None:
    """Bit for bit, where the empty prompt is encoded once for each image, as pipelines do."""
    model, texts = CASES[name].model(), tiny_texts(2)
    latents = model.latents([1, 2])
    empty = model.unconditional(2) if name.startswith("sana") else model.encode(["", ""])
    images = model.generate(model.encode(texts), latents, empty)
    # By the same steps, where another sampler is shipped.
    model.pipeline.scheduler = model.schedule.with_steps(3)
    theirs = model.pipeline(
        texts, latents=CASES[name].noise(latents), num_inference_steps=3, output_type="pt",
        **{"guidance_scale": 4.0, **CASES[name].call},
    ).images  # fmt: skip
    assert torch.equal(images, theirs)
    assert (images[0] - images[1]).abs().max() > 0.01
    assert torch.allclose(model.generate(model.encode(texts), latents), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("absent", [(3,), (1, 2)])
def test_a_folder_without_some_encoders_of_sd3_is_loaded(absent: tuple[int, ...], tmp_path: Path) -> None:
    pipeline = tiny_sd3(absent=absent)
    pipeline.save_pretrained(tmp_path)
    options: Any = {"layers": "all", "tokens": TOKENS, "steps": 2}
    own, loaded = Diffusion(pipeline, **options), Diffusion.load(str(tmp_path), **options)
    assert torch.equal(loaded.generate("red sun", [1]), own.generate("red sun", [1]))


@pytest.mark.parametrize("absent", [(1,), (2,), (1, 2), (1, 2, 3)])
def test_any_encoder_of_sd3_may_be_absent(absent: tuple[int, ...]) -> None:
    model = Diffusion(tiny_sd3(absent=absent), layers="all", tokens=TOKENS)
    whole = CASES["sd3.5"].model().encode(tiny_texts(2))
    text = model.encode(tiny_texts(2))
    assert text.pooled is not None
    assert whole.pooled is not None
    clip = whole.text.shape[1] - TOKENS
    length = text.text.shape[1] - TOKENS
    for number, (start, stop) in {1: (0, 16), 2: (16, 40)}.items():
        expected = torch.zeros_like if number in absent else (lambda values: values)
        assert torch.equal(text.pooled[:, start:stop], expected(whole.pooled[:, start:stop]))
        if length == clip:
            assert torch.equal(text.text[:, :clip, start:stop], expected(whole.text[:, :clip, start:stop]))
    assert bool(text.text[:, length:].any()) == (3 not in absent)
    assert model.generate(text, [0, 1]).isfinite().all()
    shown = model.tokens("red sun")
    assert (len(shown) > 2) == (absent != (1, 2, 3))
    if {1, 2} - {*absent}:
        assert shown == CASES["sd3.5"].model().tokens("red sun")


def test_value_layers_get_text_alone(model: Diffusion) -> None:
    """Positions of what they take are those of the text, not of the image."""
    text = model.encode(tiny_texts(2))
    seen: dict[str, torch.Size] = {}

    def look(name: str, values: Tensor) -> None:
        seen[name] = values.shape

    hooks = [
        layer.register_forward_pre_hook(lambda _m, args, name=name: look(name, *args))
        for name, layer in model.value_layers.items()
    ]
    model.predict_noise(model.latents([0, 1]), model.timestep(), text)
    for hook in hooks:
        hook.remove()
    assert list(seen) == list(model.value_layers)
    assert {shape[:2] for shape in seen.values()} == {text.text.shape[:2]}


def test_each_row_is_blocked_as_if_it_were_alone(model: Diffusion) -> None:
    rows = [half_of(model), Neurons(), half_of(model, 1)]
    text, latents = model.encode(tiny_texts(3)), model.latents(range(3))
    timestep = model.schedule.difference_timestep(0)
    plain = model.predict_noise(latents, timestep, text)
    with model.block(rows):
        together = model.predict_noise(latents, timestep, text)
        images = model.generate(text, latents)
    assert torch.equal(together[1], plain[1])
    for row, neurons in enumerate(rows):
        with model.block(neurons):
            alone = model.predict_noise(latents[row : row + 1], timestep, text.rows([row]))
            image = model.generate(text.rows([row]), latents[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(images[row : row + 1], image, atol=1e-3, rtol=1e-3)
    assert (together[0] - plain[0]).abs().max() > 1e-3


def test_export_gives_the_images_of_blocking(case: Case, model: Diffusion, tmp_path: Path) -> None:
    before, neurons = model.state_digest(), half_of(model)
    text, latents = model.encode(tiny_texts(2)), model.latents([1, 2])
    with model.block(neurons):
        blocked = model.generate(text, latents)
    model.export(tmp_path / "model", neurons)
    assert model.state_digest() == before
    exported = Diffusion.load(str(tmp_path / "model"), steps=3, guidance=4.0, **case.settings)
    assert type(exported.pipeline) is type(model.pipeline)
    torch.testing.assert_close(exported.generate(exported.encode(tiny_texts(2)), latents), blocked, atol=1e-5, rtol=0)
    assert not torch.allclose(model.generate(text, latents), blocked, atol=1e-3)


def test_noise_differences_are_negated_clean_predictions(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    timestep = model.schedule.difference_timestep(0)
    assert 0.99 < model.signal(timestep) / 0.00574 < 1.01  # as at 981 of Stable Diffusion
    if model.schedule.quantity == "velocity":
        share = timestep / 1000
        velocity = model.predict_output(latents * share, timestep, text)
        clean = latents * share - share * velocity
    else:
        clean = latents - model.predict_noise(latents, timestep, text)
    low, high = (-clean).amin((2, 3), keepdim=True), (-clean).amax((2, 3), keepdim=True)
    torch.testing.assert_close(noise_differences(model, text, latents), (-clean - low) / (high - low))


def test_velocities_differ_where_latents_are_noise_alone(model: Diffusion) -> None:
    """The noise predicted there is the latents, whatever the prompt; magnitudes of it would be zero."""
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    assert model.text_noise(latents, model.timestep(), text).flatten(1).norm(dim=1).min() > 1e-3


def test_levels_are_those_of_stable_diffusion(model: Diffusion) -> None:
    """Its timesteps and back, and mixtures of clean latents and noise are undone by conversions."""
    schedule = model.schedule
    for timestep in (981, 700, 500, 200, 41):
        assert schedule.published(schedule.like(timestep)) == pytest.approx(timestep, abs=3)
    assert schedule.like(1000) == schedule.noisiest
    at = schedule.like(500)
    clean, noise = model.latents([0]), model.latents([1])
    signal, deviation = schedule.mixture(at)
    latents = signal * clean + deviation * noise
    predicted = noise - clean if schedule.quantity == "velocity" else noise
    torch.testing.assert_close(schedule.clean(predicted, at, latents), clean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(schedule.noise_of(predicted, at, latents), noise, atol=1e-5, rtol=1e-4)
    change = schedule.change(clean, at)
    torch.testing.assert_close(schedule.noise_of(change, at), clean, atol=1e-5, rtol=1e-4)
    assert schedule.change(clean, schedule.noisiest).isfinite().all()


def test_training_targets_undo_the_noise(model: Diffusion) -> None:
    clean, noise = model.latents([0, 1]).float(), model.latents([2, 3]).float()
    timesteps = torch.tensor([300, 700])
    noisy, target = (f(clean, noise, timesteps) for f in (model.schedule.noisy, model.schedule.target))
    for row, timestep in enumerate(timesteps.tolist()):
        if model.schedule.quantity == "velocity":
            assert torch.allclose(noisy[row] - timestep / 1000 * target[row], clean[row], atol=1e-6)
        else:
            assert torch.equal(target[row], noise[row])
    losses = model.training_losses(clean, timesteps, noise, model.encode(tiny_texts(2)))
    assert losses.shape == (2,)
    assert (losses > 0).all()


def test_activations_are_those_of_tokens_alone(model: Diffusion) -> None:
    text = model.encode(tiny_texts(3))
    assert text.mask is not None
    found = activations(model, text)
    assert {name: values.shape for name, values in found.items()} == {n: (3, w) for n, w in model.masks.widths.items()}
    alone = activations(model, text.rows([1]))
    for name, values in found.items():
        torch.testing.assert_close(values[1:2], alone[name], atol=1e-5, rtol=1e-4)
    everything = activations(model, replace(text, mask=torch.ones_like(text.mask)))
    assert any((everything[name] - values).abs().max() > 1e-3 for name, values in found.items())


def test_nemo_localizes(case: Case, model: Diffusion) -> None:
    texts = tiny_texts(12)
    mean, std = activation_statistics(model, [texts])
    text, before = model.encode(texts[:1]), model.state_digest()
    calibration = Calibration(mean, std, case.threshold, len(texts))
    found = localize(model, text, model.latents(range(2)), calibration, NemoSettings(theta=2.0, theta_step=0.5))
    assert found.gate_score > case.threshold
    assert set(found.neurons) <= set(model.value_layers)
    assert 0 < found.neurons.count <= found.initial.count
    assert model.state_digest() == before
    assert found.exhausted or found.refined_score < case.threshold


def test_passes_start_at_a_value_layer(model: Diffusion) -> None:
    last = [*model.value_layers][-1]
    neurons = Neurons({last: range(0, model.masks.widths[last], 2)})
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    timestep = model.schedule.difference_timestep(0)
    prefix, called = model.prefix([last]), []
    with prefix.recording():
        model.predict_noise(latents, timestep, text)
    with model.block(neurons):
        whole = model.predict_noise(latents[[1, 0]], timestep, text.rows([1, 0]))
    first = next(iter(model.value_layers))
    hook = model.value_layers[first].register_forward_hook(lambda *_: called.append(first))
    skipped = [name for name in model.value_layers if prefix.skips(name, last)]
    with prefix.replaying(last, [1, 0]), model.block(neurons, replayed=skipped):
        replayed = model.predict_noise(latents[[1, 0]], timestep, text.rows([1, 0]))
    hook.remove()
    assert torch.equal(whole, replayed)
    assert not called


@pytest.mark.parametrize("name", [*FIRST])
def test_a_run_through_the_configuration(name: str, tmp_path: Path, prompt_file: Path) -> None:
    case = CASES[name]
    case.make().save_pretrained(tmp_path / "model")
    words = [
        "seeds=1",
        "localize_seeds=2",
        "trainer=cpu",
        "prompts.calibration=package:planted/prompts/calibration.txt",
        "prompts.calibration_limit=4",
        "method=nemo",
        "model.steps=2",
        *(f"model.{key}={value}" for key, value in case.settings.items()),
    ]
    words += [f"root={tmp_path / 'results'}", f"prompts.files=[{prompt_file}]", f"model.source={tmp_path / 'model'}"]
    (cell,) = plan(grid(words))
    run([cell], "test")
    assert [len(read_records(cell.store.folder, stage)) for stage in ("localize", "generate", "score")] == [3, 3, 6]
    spec = json.loads((cell.store.folder / "spec.json").read_text())
    assert spec["settings"]["model"].items() >= case.settings.items()
    measures = FAMILIES[type(case.make()).__name__].measures
    assert spec["measures"] == measures
    assert measures in (tmp_path / "results" / "default" / "leaderboard.md").read_text()
    network = json.loads((cell.store.folder / "network.json").read_text())
    assert network["weights"] == sum(parameter.numel() for parameter in case.make().transformer.parameters())
    costs = json.loads((cell.store.folder / "metrics.json").read_text())["cost"]
    passes = costs["row_passes_per_image"] + costs["once_row_passes_per_prompt"]  # one image a prompt
    assert costs["teraflops_per_image"] == pytest.approx(passes * network["flops_per_pass"] / 1e12, rel=1e-3)


def test_an_audit_searches_embeddings_of_tokens(model: Diffusion) -> None:
    text, pictures = model.encode(tiny_texts(1)), model.latents([5]).float()
    batch = Batch((Prompt("a", tiny_texts(1)[0]),), text, model.latents([1]), (1,), (Neurons(),))
    found = search_embeddings(model, NoMitigation(), batch, pictures, steps=2, samples=2)
    assert found.losses.shape == (1, 2)
    assert found.losses.isfinite().all()
    assert not torch.equal(found.text.text, text.text)
    assert text.mask is not None
    assert found.text.mask is not None
    assert torch.equal(found.text.mask, text.mask)
    # What the network does not see, or is always 0, stays so; random starts as well.
    fixed = ~model.family.used(text)
    for other in (found.text, random_embeddings(model, text, [1])):
        assert torch.equal(other.text[fixed], text.text[fixed])
        assert float((other.text != text.text)[~fixed].float().mean()) > 0.9


@pytest.mark.parametrize("name", ["sd1", "sd3.5", "pixart-alpha", "flux-dev"])
def test_operations_of_a_pass_are_those_of_its_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted otherwise: in a true pass, layer by layer, and attention by its shapes."""
    model = Diffusion(tiny_pipeline()) if name == "sd1" else CASES[name].model()
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        total += 2 * weight[0].numel() * output.numel()

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        nonlocal total
        total += 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return attention(query, key, value, *args, **options)

    attention = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    counted, text = model.flops_per_pass, model.encode(tiny_texts(1))
    total = 0
    for module in model.network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count)
    model.predict_output(model.latents([0]), model.timestep(), text)
    assert counted == pytest.approx(total, rel=1e-3)


def test_prompts_that_are_cut_count_as_truncated(model: Diffusion) -> None:
    assert not model.truncated("red sun")
    assert model.truncated("red " * 40)
    assert len(model.tokens("red " * 40)) == TOKENS
    assert len(model.tokens("red sun")) < len(model.tokens("red sun fox")) < TOKENS


def test_methods_that_do_not_serve_say_why(model: Diffusion) -> None:
    name = type(model.pipeline).__name__
    NeMo().check(name, 4.0, "float32")
    with pytest.raises(ModelError, match=r"StableDiffusionXLPipeline \(its steps are those of DDIM"):
        UpdateNorms("general.jsonl").check(name, 4.0, "float32")
    if name in ("PixArtAlphaPipeline", "FluxPipeline"):
        with pytest.raises(ModelError, match=r"begin token, which T5 lacks\), given a"):
            AttentionRescaling().check(name, 4.0, "float32")
    else:
        AttentionRescaling().check(name, 4.0, "float32")
        with pytest.raises(ModelError, match="mask_end=true masks CLIP's end token, of UNets alone"):
            AttentionRescaling(mask_end=True).check(name, 4.0, "float32")


@pytest.mark.parametrize("name", [*CASES])
def test_attention_that_is_not_edited_is_the_models_own(name: str) -> None:
    model = CASES[name].model()
    text, latents = model.encode(tiny_texts(2)), model.latents([1, 2])
    plain = model.generate(text, latents)
    seen: dict[str, Tensor] = {}

    def look(layer: str, logits: Tensor) -> Tensor:
        seen[layer] = logits
        return logits

    with model.edit_attention(look):
        torch.testing.assert_close(model.generate(text, latents), plain, rtol=0, atol=2e-3)
    assert torch.equal(model.generate(text, latents), plain)
    positions = model.network.config.sample_size**2 if name.startswith("sana") else 64
    rows = 4 if model.guidance > 1 else 2
    assert {logits.shape[0] for logits in seen.values()} == {rows}
    assert {logits.shape[2:] for logits in seen.values()} == {(positions, text.text.shape[1])}
    assert len(seen) == len(model.family.value_layers(model.network, "all"))
    if not model.family.joint and text.mask is not None:
        for logits in seen.values():
            assert torch.equal(logits[2:].isinf().all(2).all(1), text.mask == 0)


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "sana"])  # whose queries and keys are not normed
def test_edits_see_products_of_the_pictures_queries_and_the_texts_keys(name: str) -> None:
    model = CASES[name].model()
    layer, module = next(iter(model.family.attentions(model.network).items()))
    parts: dict[str, Tensor] = {}
    names = ("to_q", "add_k_proj" if model.family.joint else "to_k")
    hooks = [
        module.get_submodule(part).register_forward_hook(lambda _m, _a, out, part=part: parts.update({part: out}))
        for part in names
    ]
    seen: dict[str, Tensor] = {}
    with model.edit_attention(lambda layer, logits: seen.setdefault(layer, logits)):
        model.predict_noise(model.latents([1]), 500, model.encode(["red sun"]))
    for hook in hooks:
        hook.remove()
    query, key = (parts[part].unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in names)
    expected = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    kept = seen[layer].isfinite()
    assert kept.any()
    torch.testing.assert_close(seen[layer][kept], expected[kept])


@pytest.mark.parametrize("name", ["sd3.5", "flux-dev-guided", "flux-schnell"])
def test_a_picture_that_sees_no_text_depends_on_pooled_vectors_alone(name: str) -> None:
    model = CASES[name].model()
    text, latents = model.encode(tiny_texts(2)), model.latents([1])
    text = replace(text, pooled=text.pooled[[0, 0]])
    plain = [model.predict_noise(latents, 500, text.rows([row])) for row in (0, 1)]
    assert not torch.equal(*plain)
    with model.edit_attention(lambda layer, logits: torch.full_like(logits, -torch.inf)):
        assert torch.equal(*(model.predict_noise(latents, 500, text.rows([row])) for row in (0, 1)))


def test_attention_that_is_not_pytorchs_is_an_error() -> None:
    layer = nn.Identity()
    edited = edit_attention({"blocks.0": layer}, lambda name, logits: logits)
    with edited, pytest.raises(ModelError, match=r"blocks\.0: its attention is none of PyTorch's"):
        layer(torch.ones(1))
    assert torch.equal(layer(torch.ones(1)), torch.ones(1))


def test_attention_of_a_kind_that_edits_would_change_is_an_error() -> None:
    class Causal(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(values, values, values, is_causal=True)

    layer, values = Causal(), torch.rand(1, 1, 3, 2)
    with edit_attention({"blocks.0": layer}, lambda name, logits: logits), pytest.raises(ModelError, match="causal"):
        layer(values)


def test_single_blocks_of_flux_are_blocked_at_text_positions_alone() -> None:
    """Their values are those of text and picture in one tensor; their weights serve both, and can't be exported."""
    model = CASES["flux-schnell"].model()
    layer = "single_transformer_blocks.0.attn.to_v"
    assert len(model.value_layers) == 4
    neurons, seen = Neurons({layer: range(8)}), []
    hook = model.value_layers[layer].register_forward_hook(lambda _m, _a, output: seen.append(output))
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    with model.block([neurons, Neurons()]):
        model.predict_output(latents, 1000.0, text)
    model.predict_output(latents, 1000.0, text)
    hook.remove()
    blocked, plain = seen
    assert not blocked[0, :TOKENS, :8].any()
    assert torch.equal(blocked[0, :TOKENS, 8:], plain[0, :TOKENS, 8:])
    assert torch.equal(blocked[0, TOKENS:], plain[0, TOKENS:])
    assert torch.equal(blocked[1], plain[1])
    with pytest.raises(ModelError, match="its weights serve the picture as well as the text"):
        model.export("unused", neurons)
    scores = Activation().score(model, Prompt("a", tiny_texts(1)[0]), Inputs(latents=latents))
    assert {name: len(values) for name, values in scores.items()} == model.masks.widths


def test_prompts_of_pixart_are_lower_case_and_large_images_have_a_size() -> None:
    model = Diffusion(tiny_pixart(sized=True), layers="all", tokens=TOKENS)
    upper, lower = model.encode(["Red SUN "]), model.encode(["red sun"])
    assert torch.equal(upper.text, lower.text)
    assert model.tokens("Red SUN ") == model.tokens("red sun")
    latents, timestep = model.latents([0]), torch.tensor(500)
    small, large = (model.family.predict(model.network, latents, timestep, lower, (s, s)) for s in (32, 1024))
    assert small.shape == latents.shape
    assert not torch.equal(small, large)


def test_levels_like_those_of_stable_diffusion() -> None:
    """The table of signal-to-noise ratios: sigma of flow matching, timesteps of PixArt."""
    flow, pixart = CASES["sd3"].model().schedule, CASES["pixart-alpha"].model().schedule
    levels = {981: (0.929, 712), 900: (0.893, 647), 700: (0.769, 494), 500: (0.618, 353), 41: (0.168, 58)}
    for timestep, (sigma, own) in levels.items():
        assert flow.like(timestep) / 1000 == pytest.approx(sigma, abs=6e-4)
        assert pixart.like(timestep) == pytest.approx(own, abs=1)
    assert (flow.timestep(0), pixart.timestep(0)) == (1000, 999)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*FIRST])
def test_half_precision_is_kept_from_loading_to_export(name: str, dtype: str, tmp_path: Path) -> None:
    case, kind = CASES[name], getattr(torch, dtype)
    case.make().save_pretrained(tmp_path / "model")
    given = {"steps": 2, "guidance": case.guidance, **case.settings}
    model = Diffusion.load(str(tmp_path / "model"), dtype, **given)
    # T5 keeps some layers in float32 where float16 would overflow.
    own = [part for part in (model.network, model.pipeline.vae) for part in part.parameters()]
    assert {parameter.dtype for parameter in own} == {kind}
    text, latents, neurons = model.encode(tiny_texts(1)), model.latents([1]), half_of(model)
    neurons = Neurons({layer: ids for layer, ids in neurons.items() if model.spans[layer] == slice(None)})
    with model.block(neurons):
        blocked = model.generate(text, latents)
    assert blocked.dtype is model.predict_noise(latents, model.timestep(1), text).dtype is torch.float32
    assert blocked.isfinite().all()
    assert not torch.equal(model.generate(text, latents), blocked)
    model.export(tmp_path / "exported", neurons)
    exported = Diffusion.load(str(tmp_path / "exported"), dtype, **given)
    file = tmp_path / "exported" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {kind}
    torch.testing.assert_close(exported.generate(text, latents), blocked, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["sd3.5", "flux-dev", "sana"])
def test_a_lora_is_added_to_a_transformer(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain, pipeline = CASES[name].make(), CASES[name].make()
    plain.save_pretrained(tmp_path / "model")
    layer = next(iter(family_of(type(plain).__name__).value_layers(plain.transformer, "all")))
    pipeline.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=[layer]))
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in pipeline.transformer.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    weights = peft.get_peft_model_state_dict(pipeline.transformer)
    about = pipeline.transformer.peft_config["default"].to_dict()
    type(plain).save_lora_weights(tmp_path, transformer_lora_layers=weights, transformer_lora_adapter_metadata=about)
    changed = Source(str(tmp_path / "model"), lora=Lora(str(tmp_path), 0.5)).load().transformer
    down, up = (weights[f"{layer}.lora_{part}.weight"] for part in "AB")
    expected = plain.transformer.get_submodule(layer).weight + 0.5 * 2 * up @ down
    torch.testing.assert_close(changed.get_submodule(layer).weight, expected)
    assert set(changed.state_dict()) == set(plain.transformer.state_dict())


def test_what_transformers_can_not_take_is_said_before_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA of PixArt, a single file or a UNet in place of a pipeline, and NeMo in a compiled one."""
    for name, make in {"pixart": tiny_pixart, "sd3": tiny_sd3}.items():
        make().save_pretrained(tmp_path / name)
    save_file({"transformer.a.lora_A.weight": torch.ones(1, 2)}, tmp_path / "lora.safetensors")
    save_file({"joint_blocks.0.x_block.attn.qkv.bias": torch.ones(2)}, tmp_path / "single.safetensors")
    with pytest.raises(ModelError, match=r"loads none into a PixArtAlphaPipeline; merge it"):
        Source(str(tmp_path / "pixart"), lora=Lora(str(tmp_path / "lora.safetensors"))).check()
    with pytest.raises(ModelError, match=r"single files .* alone; .*SD3Transformer2DModel as T; .*model.source=conv"):
        Source(str(tmp_path / "single.safetensors"), config=str(tmp_path / "sd3")).check()
    unet = tmp_path / "unet"
    tiny_pipeline().unet.save_pretrained(unet)
    with pytest.raises(ModelError, match=r"a StableDiffusion3Pipeline has no UNet"):
        Source(str(tmp_path / "sd3"), unet=str(unet)).check()
    monkeypatch.setattr(Source, "load", None)
    (tmp_path / "list.txt").write_text("a red sun\n")
    words = [f"prompts.files=[{tmp_path / 'list.txt'}]", "model.compiled=true", "model.layers=all", "method=nemo"]
    with pytest.raises(ModelError, match="a compiled network can't be looked into"):
        plan(grid([*words, f"model.source={tmp_path / 'sd3'}"]))


@pytest.mark.parametrize("name", [*FIRST])
def test_a_compiled_transformer_is_blocked_without_breaks(name: str) -> None:
    plain, compiled = CASES[name].model(), CASES[name].model()
    compiled.network.compile(backend="eager", fullgraph=True)
    text, latents, rows = plain.encode(tiny_texts(2)), plain.latents([0, 1]), [half_of(plain), Neurons()]
    timestep = plain.schedule.difference_timestep(0)
    with plain.block(rows), compiled.block(rows):
        expected, found = (model.predict_noise(latents, timestep, text) for model in (plain, compiled))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[:1], plain.predict_noise(latents[:1], timestep, text.rows([0])), atol=1e-3)


def test_settings_of_another_family_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.size=64: StableDiffusion3Pipeline has no such setting"):
        family_of("StableDiffusion3Pipeline", size=64, tokens=None)


@pytest.mark.parametrize(
    ("make", "layers"),
    [(tiny_sdxl, "double"), (tiny_sd3, "double"), (tiny_pixart, "down+mid"), (tiny_flux, "down+mid")],
)
def test_value_layers_and_sizes_are_refused_before_weights_load(
    make: Callable[[], Any], layers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Python and by the plan of a run, each of a folder."""

    def refuse(*_: object) -> None:
        raise AssertionError("weights were loaded")

    pipeline = make()
    with pytest.raises(ModelError, match=rf"model.layers={re.escape(layers)}: a \w+ has no such choice"):
        Diffusion(pipeline, layers=layers)  # type: ignore[arg-type]
    pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(Source, "load", refuse)
    given = [{"layers": layers}, *([{"size": 100}] if isinstance(pipeline, FluxPipeline) else [])]
    for settings in given:
        ((name, value),) = settings.items()
        with pytest.raises(ModelError, match=rf"model.{name}={re.escape(str(value))}: "):
            Diffusion.load(str(tmp_path / "model"), **settings)
        (tmp_path / "list.txt").write_text("a red sun\n")
        words = ["method=none", f"prompts.files=[{tmp_path / 'list.txt'}]"]
        with pytest.raises(ModelError, match=rf"model.{name}={re.escape(str(value))}: "):
            plan(grid([*words, f"model.source={tmp_path / 'model'}", f"model.{name}={value}"]))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sd2, tiny_sdxl, tiny_sd3, tiny_pixart, tiny_flux, tiny_sana])
def test_the_first_choice_of_value_layers_is_the_default(make: Callable[[], Any]) -> None:
    pipeline = make()
    first = FAMILIES[type(pipeline).__name__].layers[0]
    assert [*Diffusion(pipeline).value_layers] == [*Diffusion(pipeline, layers=first).value_layers]


def test_other_schedulers_are_refused_before_weights_load() -> None:
    family = family_of("StableDiffusion3Pipeline")
    family.check_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 9, predicts=True, where="it")
    for config in (
        {"_class_name": "DDIMScheduler"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True},
    ):
        with pytest.raises(ModelError, match="can't be sampled here; give the model with FlowMatchEuler"):
            family.check_schedule(config, 9, predicts=True, where="it")


@pytest.mark.parametrize("name", [*FULL_SIZE_TRANSFORMERS])
def test_layers_of_the_full_size_networks(name: str) -> None:
    network_class, pipeline, config, path, count, width, weights = FULL_SIZE_TRANSFORMERS[name]
    with torch.device("meta"):
        network = network_class(**config)
    found = family_of(pipeline).value_layers(network, "double" if pipeline == "FluxPipeline" else "all")
    assert [*found] == [path.format(block) for block in range(count)]
    assert {(layer.in_features, layer.out_features) for layer in found.values()} == {(width, width)}
    assert sum(parameter.numel() for parameter in network.parameters()) == weights


@pytest.mark.parametrize("name", [*FULL_SIZE_TRANSFORMERS])
def test_the_models_of_the_configuration(name: str) -> None:
    """Each has a file of settings that its family takes, with licence and gating."""
    assert name in options("model")
    (choice,) = grid([f"model={name}", "method=none"])
    settings = choice.settings.model
    own = {key: getattr(settings, key) for key in ("tokens", "size", "distilled_guidance")}
    family = family_of(FULL_SIZE_TRANSFORMERS[name][1], **own)
    assert settings.family in family.names
    assert pipeline_class_of(settings.family) in {"PixArtAlphaPipeline", family.pipeline_class}
    assert settings.layers in family.layers
    assert settings.source.count("/") == 1
    assert "license" in settings.summary.lower()
    assert "@" in settings.citation


# Weights of encoders and autoencoder, and how many more networks of a depth have: what one block of each sort adds.
_T5, _SD3_REST = 4_762_310_656, 123_650_304 + 694_659_840 + 4_762_310_656 + 83_819_683
REST = {
    "StableDiffusion3Pipeline": _SD3_REST,
    "FluxPipeline": 123_060_480 + _T5 + 83_819_683,
    "PixArtAlphaPipeline": _T5 + 83_653_863,
    "PixArtSigmaPipeline": _T5 + 83_653_863,
    "SanaPipeline": 2_614_341_888 + 312_500_000,
}
_DUAL: dict[str, Any] = {"num_layers": 2, "dual_attention_layers": (0,)}
BLOCKS: dict[str, list[tuple[dict[str, Any], int]]] = {
    "sd35_medium": [(_DUAL, 13), ({"num_layers": 2}, 10)],
    "flux1_dev": [({"num_layers": 2}, 18), ({"num_single_layers": 2}, 37)],
    "flux1_schnell": [({"num_layers": 2}, 18), ({"num_single_layers": 2}, 37)],
}
"""Of networks with two sorts of blocks, changes of one with a block of each that add one, and how many are missing."""


@pytest.mark.parametrize("name", [*FULL_SIZE_TRANSFORMERS])
def test_what_is_published_of_a_model_follows_from_its_configuration(name: str) -> None:
    """Operations of a pass, by counting networks of one and two blocks, and weights of all networks."""
    kind, pipeline, config, *_, weights = FULL_SIZE_TRANSFORMERS[name]
    (choice,) = grid([f"model={name}", "method=none"])
    published = choice.settings.model.published
    tokens = choice.settings.model.tokens
    family = family_of(pipeline, tokens=tokens)

    def count(**changes: Any) -> int:
        with torch.device("meta"):
            whole = {**kind(**{**config, "num_layers": 1}).config, "num_layers": 1, "dual_attention_layers": ()}
        if pipeline == "FluxPipeline":
            whole["num_single_layers"] = 1
        whole = {key: value for key, value in {**whole, **changes}.items() if not key.startswith("_")}
        width = whole.get("joint_attention_dim") or whole["caption_channels"]
        length = tokens + 77 * (pipeline == "StableDiffusion3Pipeline")
        pooled = (1, whole["pooled_projection_dim"]) if "joint_attention_dim" in whole else None
        mask = None if pooled else (1, length)
        latent, side = family.latent_shape(whole), 1024
        return count_flops(family, kind, json.dumps(whole), latent, (side, side), ((1, length, width), pooled, mask))

    with torch.device("meta"):
        network = kind(**config)
    one = count()
    sorts = BLOCKS.get(name, [({"num_layers": 2}, network.config["num_layers"] - 1)])
    total = one + sum(missing * (count(**changes) - one) for changes, missing in sorts)
    assert published.teraflops == pytest.approx(total / 1e12, rel=1e-3)
    assert published.weights is not None
    assert published.download is not None
    positions = sum(value.numel() for value in network.state_dict().values()) - weights  # are stored too
    assert published.weights == pytest.approx((weights + positions + REST[pipeline]) / 1e9, rel=1e-3)
    assert 1.95 < published.download / published.weights < 4.05  # stored in two bytes or four
    assert published.gated == ("gated" in choice.settings.model.summary)
    assert published.licence in choice.settings.model.summary


def test_every_family_has_a_file_of_settings() -> None:
    assert {pipeline for _, pipeline, *_ in FULL_SIZE_TRANSFORMERS.values()} == set(FAMILIES) - UNETS
