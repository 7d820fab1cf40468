from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_bench import Diffusion, ModelError, Neurons
from nemo_bench.diffusion import Conditioning, Sampling, Similarity, Step, cross_attentions
from nemo_bench.diffusion.sampling import Rule
from nemo_bench.diffusion.schedule import ddim
from tiny import tiny_pipeline, tiny_sd2, tiny_sdxl, tiny_texts


@pytest.fixture(params=[tiny_pipeline, tiny_sd2, tiny_sdxl])
def model(request: pytest.FixtureRequest) -> Diffusion:
    make: Callable[[], DiffusionPipeline] = request.param
    return Diffusion(make(), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))


def by_pipeline(model: Diffusion, text: Conditioning, latents: torch.Tensor) -> torch.Tensor:
    """Images of the diffusers pipeline itself, with the scheduler that the model samples by."""
    pipeline = copy.copy(model.pipeline)
    pipeline.scheduler = ddim(model.pipeline.scheduler.config)
    empty = model.unconditional(len(text))
    prompts = {"prompt_embeds": text.text, "negative_prompt_embeds": empty.text}
    if text.pooled is not None:
        prompts |= {"pooled_prompt_embeds": text.pooled, "negative_pooled_prompt_embeds": empty.pooled}
    options = {"num_inference_steps": model.steps, "guidance_scale": model.guidance, "output_type": "pt"}
    images: torch.Tensor = pipeline(**prompts, latents=latents, **options).images
    return images.float()


EXACT = {
    "sd1": tiny_pipeline,
    "sd2": tiny_sd2,
    "sd2-base": partial(tiny_sd2, prediction_type="epsilon"),
    "sdxl": tiny_sdxl,
    "sdxl-without-zeros": partial(tiny_sdxl, zeros_for_empty=False),
}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", EXACT)
def test_images_are_those_of_the_pipeline_bit_for_bit(family: str, guidance: float) -> None:
    model = Diffusion(EXACT[family](), steps=4, guidance=guidance)
    text, latents = model.encode(tiny_texts(2)), model.latents([4, 5])
    images = model.generate(text, latents)
    assert torch.equal(images, by_pipeline(model, text, latents))
    assert images.std() > 0.01


def test_text_is_projected_once_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Diffusion(tiny_pipeline(), steps=4, guidance=3.0)
    calls: Counter[torch.nn.Module] = Counter()
    forward = torch.nn.Linear.forward

    def count(layer: torch.nn.Linear, given: torch.Tensor) -> torch.Tensor:
        calls[layer] += 1
        return forward(layer, given)

    monkeypatch.setattr(torch.nn.Linear, "forward", count)
    other = model.encode(tiny_texts(3)).rows([2])
    text, latents = model.encode(tiny_texts(1)), model.latents([0])
    attentions = cross_attentions(model.unet)
    projections = {part for layer in attentions.values() for part in (layer.to_k, layer.to_v)}
    model.generate(text, latents)
    assert {calls[layer] for layer in projections} == {1}
    assert {calls[layer.to_q] for layer in attentions.values()} == {4}
    calls.clear()
    # Another text in between is projected as ever, and is not taken for the first.
    model.generate(text, latents, rule=lambda step: model.predict_noise(step.latents, step.timestep, other))
    assert {calls[layer] for layer in projections} == {1 + 4}


def test_a_pass_that_fails_leaves_no_projection_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Diffusion(tiny_pipeline(), steps=2, guidance=3.0)
    own = model.text_projections[0].forward
    monkeypatch.setattr(model.text_projections[0], "forward", own)
    kept = [vars(layer).get("forward") for layer in model.text_projections]
    assert kept[0] is own

    def fail(*_: object) -> None:
        raise RuntimeError("mid block")

    hook = model.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mid block"):
        model.generate(tiny_texts(1)[0], [0])
    hook.remove()
    assert [vars(layer).get("forward") for layer in model.text_projections] == kept


class _Readings(TorchDispatchMode):
    """Counts the values that are read from tensors, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [None, lambda step: step.guided(2.0)])
def test_a_step_reads_nothing_from_the_device(rule: Rule | None) -> None:
    model = Diffusion(tiny_pipeline(), steps=3)
    sampling = Sampling(model, model.encode(tiny_texts(2)), model.latents([0, 1]))
    with _Readings() as readings, model.block(Neurons()):
        readings.count = 0
        for _ in range(model.steps):
            sampling.predict()
            sampling.advance(rule(sampling.step) if rule else None)
        assert readings.count == 0
        assert int(sampling.latents.isfinite().all()) == readings.count == 1


def test_hooks_that_work_in_place_see_every_step_anew() -> None:
    model = Diffusion(tiny_pipeline(), steps=4, guidance=3.0)
    layer = model.text_projections[-1]

    def generate(hook: Callable[..., torch.Tensor]) -> torch.Tensor:
        handle = layer.register_forward_hook(hook)
        images = model.generate(tiny_texts(1)[0], [0])
        handle.remove()
        return images

    plain = generate(lambda _layer, _given, output: output * 0.5)
    assert torch.equal(generate(lambda _layer, _given, output: output.mul_(0.5)), plain)


def test_a_step_is_predicted_before_it_is_looked_at_and_advanced_once() -> None:
    model = Diffusion(tiny_pipeline(), steps=2, guidance=3.0)
    sampling = Sampling(model, model.encode(tiny_texts(1)), model.latents([0]))
    with pytest.raises(ModelError, match=r"step 0 was not predicted; call predict\(\)"):
        sampling.advance()
    sampling.predict()
    sampling.advance()
    with pytest.raises(ModelError, match="step 1 was not predicted"):
        _ = sampling.step


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl])
def test_encoding_undoes_the_scaling_of_decoding(make: Callable[[], DiffusionPipeline], statistics: bool) -> None:
    model = Diffusion(make(), steps=2)
    config = model.pipeline.vae.config
    if statistics:
        model.pipeline.vae.register_to_config(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[2.0, 1.0, 0.5, 3.0])
        config = model.pipeline.vae.config
    latents = model.latents([0, 1])
    torch.testing.assert_close(model.family.scaled(config, model.family.unscaled(config, latents)), latents)


def test_a_network_that_takes_the_scale_of_guidance_is_refused() -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ModelError, match="takes the scale of guidance as an input"):
        Diffusion(pipeline)


@pytest.mark.parametrize("family", EXACT)
def test_prompts_are_encoded_as_the_pipeline_does(family: str) -> None:
    model = Diffusion(EXACT[family](), steps=2, guidance=3.0)
    texts, latents = tiny_texts(2), model.latents([4, 5])
    pipeline = copy.copy(model.pipeline)
    pipeline.scheduler = ddim(model.pipeline.scheduler.config)
    plain = pipeline(texts, latents=latents, num_inference_steps=2, guidance_scale=3.0, output_type="pt").images
    # The pipeline encodes the empty prompt once a row, which may round otherwise.
    torch.testing.assert_close(model.generate(model.encode(texts), latents), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", EXACT)
def test_images_of_half_precision_are_those_of_the_pipeline_but_for_the_last_rounding(
    family: str, dtype: torch.dtype
) -> None:
    """Pixels are brought into [0, 1] in float32 here, and in half precision by the pipeline."""
    model = Diffusion(EXACT[family]().to(dtype), steps=4, guidance=3.0)
    text, latents = model.encode(tiny_texts(2)), model.latents([4, 5])
    images = model.generate(text, latents)
    torch.testing.assert_close(images, by_pipeline(model, text, latents), rtol=0, atol=torch.finfo(dtype).eps)


def test_sdxl_decodes_in_single_precision_where_its_autoencoder_asks_for_it() -> None:
    pipeline = tiny_sdxl().to(torch.float16)
    pipeline.vae.decoder.conv_out.weight.data *= 3e5  # finite, unlike what comes out
    overflowing = Diffusion(pipeline, steps=2, guidance=3.0)
    assert pipeline.vae.config.force_upcast
    assert overflowing.generate_checked("red sun map", [0]).failed == (None,)
    assert {parameter.dtype for parameter in pipeline.vae.parameters()} == {torch.float16}
    pipeline.vae.register_to_config(force_upcast=False)
    (reason,) = overflowing.generate_checked("red sun map", [0]).failed
    assert reason == "pixels are not finite, decoded from finite latents in float16"


def test_sdxl_autoencoders_may_have_a_mean_and_a_deviation() -> None:
    pipeline = tiny_sdxl()
    pipeline.vae.register_to_config(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[2.0, 1.0, 0.5, 3.0])
    model = Diffusion(pipeline, steps=2, guidance=3.0)
    text, latents = model.encode(tiny_texts(2)), model.latents([4, 5])
    images = model.generate(text, latents)
    assert torch.equal(images, by_pipeline(model, text, latents))
    assert not torch.allclose(images, Diffusion(tiny_sdxl(), steps=2, guidance=3.0).generate(text, latents))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl])
def test_the_pipeline_given_keeps_its_scheduler(make: Callable[[], DiffusionPipeline]) -> None:
    pipeline = make()
    scheduler, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    Diffusion(pipeline, steps=2, guidance=3.0).generate(tiny_texts(1)[0], [0])
    assert pipeline.scheduler is scheduler
    assert dict(scheduler.config) == config
    assert getattr(scheduler, "num_inference_steps", None) is None


def test_a_compiled_network_serves_rules_and_other_neurons_without_breaks_or_compiling_again() -> None:
    plain, compiled = (Diffusion(tiny_pipeline(), steps=4, guidance=3.0) for _ in range(2))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled.unet.compile(backend="eager", fullgraph=True)
    compiled.compiled = True
    layers = list(plain.value_layers)

    def images(model: Diffusion, scale: float, *sets: Neurons) -> torch.Tensor:
        with model.block(sets):
            text = model.encode(tiny_texts(2))
            return model.generate(text, model.latents([0, 1]), rule=lambda step: step.guided(scale * step.scale))

    first = [Neurons({layers[0]: [1]}), Neurons({layers[2]: [0, 3]})]
    torch.testing.assert_close(images(compiled, 0.5, *first), images(plain, 0.5, *first), rtol=0, atol=1e-4)
    before = counters["stats"]["unique_graphs"]
    others = [Neurons({layers[1]: [5]}), Neurons({layers[-1]: [0, 2]})]
    torch.testing.assert_close(images(compiled, 2.0, *others), images(plain, 2.0, *others), rtol=0, atol=1e-4)
    assert not torch.allclose(images(compiled, 2.0, *others), images(compiled, 2.0, *2 * [Neurons()]), atol=1e-3)
    assert counters["stats"]["unique_graphs"] == before > 0
    assert not counters["graph_break"]


def test_a_rule_that_guides_as_the_pipeline_does_changes_nothing(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    plain = model.generate(text, latents)
    guided = model.generate(text, latents, rule=lambda step: step.guided(step.scale))
    assert torch.equal(guided, plain)
    assert torch.equal(model.generate(text, latents), plain)


def test_images_that_a_rule_leaves_alone_are_exactly_those_without_it(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    plain = model.generate(text, latents)
    guided = model.generate(text, latents, rule=lambda step: step.guided(torch.tensor([0.0, step.scale])))
    assert torch.equal(guided[1], plain[1])
    assert not torch.allclose(guided[0], plain[0])


def test_a_rule_with_another_scale_gives_the_images_of_that_guidance_scale(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    guided = model.generate(text, latents, rule=lambda step: step.guided(5.0))
    model.guidance = 5.0
    torch.testing.assert_close(guided, model.generate(text, latents), rtol=0, atol=1e-3)


def test_a_step_holds_the_predictions_of_the_network(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    steps: list[Step] = []

    def rule(step: Step) -> torch.Tensor:
        again = model.predict_noise(step.latents, step.timestep, text)
        torch.testing.assert_close(step.conditional, again, rtol=1e-3, atol=1e-4)
        steps.append(step)
        return step.guided(step.scale)

    model.generate(text, latents, rule=rule)
    assert [step.number for step in steps] == [0, 1, 2, 3]
    assert [step.timestep for step in steps] == model.timesteps()
    assert torch.equal(steps[0].latents, latents)
    first = steps[0]
    torch.testing.assert_close(first.magnitude[1], (first.conditional[1] - first.unconditional[1]).norm())


def test_text_noise_is_conditional_minus_unconditional_noise(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    conditional = model.predict_noise(latents, 981, text)
    unconditional = model.predict_noise(latents, 981, model.unconditional(2))
    found = model.text_noise(latents, 981, text)
    torch.testing.assert_close(found, conditional - unconditional, rtol=1e-3, atol=1e-4)
    if model.scheduler.config.prediction_type == "v_prediction":
        # Latents cancel: what is left of velocities is their difference times sqrt(abar).
        v = model.unet(latents, 981, text.text).sample - model.unet(latents, 981, model.unconditional(2).text).sample
        expected = model.scheduler.alphas_cumprod[981].sqrt() * v
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_scales_of_a_batch_stay_with_their_images(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    both = model.generate(text, latents, rule=lambda step: step.guided(torch.tensor([0.0, 5.0])))
    for row, scale in enumerate((0.0, 5.0)):
        alone = model.generate(text.rows([row]), latents[[row]], rule=lambda step, scale=scale: step.guided(scale))
        torch.testing.assert_close(both[[row]], alone, rtol=0, atol=1e-3)


def test_a_rule_without_guidance_is_an_error() -> None:
    model = Diffusion(tiny_pipeline(), steps=2, guidance=1.0)
    with pytest.raises(ModelError, match=r"model\.guidance above 1"):
        model.generate(tiny_texts(1)[0], [0], rule=lambda step: step.guided(1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_velocities_of_half_precision_come_back_as_they_were(dtype: torch.dtype) -> None:
    """Scale 0 is the network's own unconditional output, whatever the way there and back through noise."""
    model = Diffusion(tiny_sd2().to(dtype), steps=4, guidance=3.0)
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    by_rule, by_output = Sampling(model, text, latents), Sampling(model, text, latents)
    for _ in range(model.steps):
        by_rule.predict()
        by_output.predict()
        assert by_output.output is not None
        by_output.output = by_output.output.chunk(2)[0].repeat(2, 1, 1, 1)
        by_rule.advance(by_rule.step.guided(0.0))
        by_output.advance()
        eps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(by_rule.latents.float(), by_output.latents.float(), rtol=eps, atol=eps)


def test_velocities_are_not_converted_to_noise_where_latents_are_pure_noise() -> None:
    pipeline = tiny_sd2()
    pipeline.scheduler = pipeline.scheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    model = Diffusion(pipeline, steps=4, guidance=3.0)
    text, latents = model.encode(tiny_texts(1)), model.latents([0])
    message = r"timestep 999 .* zero terminal SNR.*set rescale_betas_zero_snr=false"
    with pytest.raises(ModelError, match=message):
        model.text_noise(latents, model.timesteps()[0], text)
    with pytest.raises(ModelError, match=message):
        model.generate(text, latents, rule=lambda step: step.guided(0.0))
    assert model.generate(text, latents).isfinite().all()


def model_of(pipeline: object) -> Diffusion:
    return Diffusion(pipeline, steps=3, guidance=3.0, similarity=Similarity(1.0, ()))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_latents_that_diverge_fail_their_own_image_alone(make: object, wrong: float) -> None:
    model = model_of(make())  # type: ignore[operator]
    text, latents = model.encode(tiny_texts(3)), model.latents(range(3))
    fine = model.generate_checked(text, latents)
    assert fine.failed == (None, None, None)
    broken = text.text.clone()
    broken[1] = wrong
    images, failed = model.generate_checked(Conditioning(broken, text.pooled), latents)
    assert failed == (None, "latents are not finite after step 1 of 3, in float32", None)
    assert images[1].isnan().all()
    assert torch.equal(images[[0, 2]], fine.images[[0, 2]])


def test_the_step_at_which_latents_diverged_is_named(tiny: Diffusion) -> None:
    def later(step: Step) -> torch.Tensor:
        noise = step.guided(step.scale).clone()
        if step.number == 2:
            noise[0] = torch.inf
        return noise

    text, latents = tiny.encode(tiny_texts(2)), tiny.latents([0, 1])
    _, failed = tiny.generate_checked(text, latents, rule=later)
    assert failed == ("latents are not finite after step 3 of 4, in float32", None)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_pixel_is_neither_white_nor_black(sign: int) -> None:
    model = model_of(tiny_pipeline())

    def overflow(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1, 0, 3, 4] = sign * torch.inf
        return output

    hook = model.pipeline.vae.decoder.conv_out.register_forward_hook(overflow)
    images, failed = model.generate_checked("red sun map", [0, 1])
    hook.remove()
    assert failed == (None, "pixels are not finite, decoded from finite latents in float32")
    assert torch.equal(images[0], model.generate("red sun map", [0, 1])[0])
    assert images[1].isnan().all()


def test_an_image_whose_autoencoder_overflows_in_half_precision_fails() -> None:
    pipeline = tiny_pipeline()
    pipeline.vae.decoder.conv_out.weight.data *= 1e6
    assert model_of(pipeline).generate_checked("red sun map", [0]).failed == (None,)
    _, failed = model_of(pipeline.to(torch.float16)).generate_checked("red sun map", [0])
    assert failed == ("pixels are not finite, decoded from finite latents in float16",)
