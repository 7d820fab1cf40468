from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DiffusionPipeline

from nemo_bench import Diffusion, ModelError
from nemo_bench.diffusion import Similarity, Step
from tiny import tiny_pipeline, tiny_sd2, tiny_sdxl, tiny_texts


@pytest.fixture(params=[tiny_pipeline, tiny_sd2, tiny_sdxl])
def model(request: pytest.FixtureRequest) -> Diffusion:
    make: Callable[[], DiffusionPipeline] = request.param
    return Diffusion(make(), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))


def test_a_rule_that_guides_as_the_pipeline_does_changes_nothing(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    plain = model.generate(text, latents)
    with model.guide(lambda step: step.guided(step.scale)):
        guided = model.generate(text, latents)
    assert torch.equal(guided, plain)
    assert torch.equal(model.generate(text, latents), plain)


def test_images_that_a_rule_leaves_alone_are_exactly_those_without_it(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    plain = model.generate(text, latents)
    with model.guide(lambda step: step.guided(torch.tensor([0.0, step.scale]))):
        guided = model.generate(text, latents)
    assert torch.equal(guided[1], plain[1])
    assert not torch.allclose(guided[0], plain[0])


def test_another_scale_is_what_the_pipeline_makes_of_it(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    with model.guide(lambda step: step.guided(5.0)):
        guided = model.generate(text, latents)
    model.guidance = 5.0
    torch.testing.assert_close(guided, model.generate(text, latents), rtol=0, atol=1e-3)


def test_a_step_tells_what_the_network_predicts(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    steps: list[Step] = []

    def rule(step: Step) -> torch.Tensor:
        again = model.predict_noise(step.latents, step.timestep, text)
        torch.testing.assert_close(step.conditional, again, rtol=1e-3, atol=1e-4)
        steps.append(step)
        return step.guided(step.scale)

    with model.guide(rule):
        model.generate(text, latents)
    assert [step.number for step in steps] == [0, 1, 2, 3]
    assert [step.timestep for step in steps] == model.pipeline.scheduler.timesteps.tolist()
    assert torch.equal(steps[0].latents, latents)
    first = steps[0]
    torch.testing.assert_close(first.magnitude[1], (first.conditional[1] - first.unconditional[1]).norm())


def test_what_a_prompt_adds_is_conditional_minus_unconditional_noise(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    conditional = model.predict_noise(latents, 981, text)
    unconditional = model.predict_noise(latents, 981, model.unconditional(2))
    found = model.text_noise(latents, 981, text)
    torch.testing.assert_close(found, conditional - unconditional, rtol=1e-3, atol=1e-4)
    if model.pipeline.scheduler.config.prediction_type == "v_prediction":
        # Latents cancel: what is left of velocities is their difference times sqrt(abar).
        v = model.unet(latents, 981, text.text).sample - model.unet(latents, 981, model.unconditional(2).text).sample
        expected = model.pipeline.scheduler.alphas_cumprod[981].sqrt() * v
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_noise_that_is_predicted_apart_from_sampling_is_left_alone(model: Diffusion, rows: int) -> None:
    text, latents = model.encode(tiny_texts(rows)), model.latents(range(rows))
    plain, generated = model.predict_noise(latents, 981, text), model.generate(text, latents)
    with model.guide(lambda step: 0 * step.conditional):
        assert torch.equal(model.predict_noise(latents, 981, text), plain)
        assert not torch.allclose(model.generate(text, latents), generated)


def test_scales_of_a_batch_stay_with_their_images(model: Diffusion) -> None:
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    with model.guide(lambda step: step.guided(torch.tensor([0.0, 5.0]))):
        both = model.generate(text, latents)
    for row, scale in enumerate((0.0, 5.0)):
        with model.guide(lambda step, scale=scale: step.guided(scale)):
            alone = model.generate(text.rows([row]), latents[[row]])
        torch.testing.assert_close(both[[row]], alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [{"guidance": 1.0}, {"compiled": True}])
def test_guidance_that_can_not_be_changed_is_an_error(options: dict[str, float]) -> None:
    model = Diffusion(tiny_pipeline(), **{"steps": 2, "guidance": 3.0, **options})  # type: ignore[arg-type]
    with (
        pytest.raises(ModelError, match=r"model\.guidance above 1 and model\.compiled=false"),
        model.guide(lambda step: step.guided(1.0)),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_velocities_of_half_precision_come_back_as_they_were(dtype: torch.dtype) -> None:
    """Scale 0 is the network's own unconditional output, whatever the way there and back through noise."""
    model = Diffusion(tiny_sd2().to(dtype), steps=4, guidance=3.0)
    text, latents = model.encode(tiny_texts(2)), model.latents([0, 1])
    own, taken = [], []

    def output(_unet: torch.nn.Module, _args: object, found: tuple[torch.Tensor]) -> None:
        own.append(found[0].chunk(2)[0].clone())

    def replaced(_unet: torch.nn.Module, _args: object, found: tuple[torch.Tensor]) -> None:
        taken.append(found[0].chunk(2)[0].clone())

    first = model.unet.register_forward_hook(output)
    with model.guide(lambda step: step.guided(0.0)):
        last = model.unet.register_forward_hook(replaced)
        model.generate(text, latents)
    first.remove()
    last.remove()
    assert len(own) == len(taken) == 4
    for before, after in zip(own, taken, strict=True):
        torch.testing.assert_close(after.float(), before.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_where_latents_are_noise_alone_no_noise_is_made_up() -> None:
    pipeline = tiny_sd2()
    pipeline.scheduler = pipeline.scheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    model = Diffusion(pipeline, steps=4, guidance=3.0)
    text, latents = model.encode(tiny_texts(1)), model.latents([0])
    message = r"timestep 999 .* zero terminal SNR.*set rescale_betas_zero_snr=false"
    with pytest.raises(ModelError, match=message):
        model.text_noise(latents, model.timesteps()[0], text)
    with pytest.raises(ModelError, match=message), model.guide(lambda step: step.guided(0.0)):
        model.generate(text, latents)
    assert model.generate(text, latents).isfinite().all()
