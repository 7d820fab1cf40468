"""Images that are not finite are said to be, and leave the others of their batch alone."""

from __future__ import annotations

import pytest
import torch

from nemo_bench import Diffusion
from nemo_bench.diffusion import Conditioning, Similarity, Step
from tiny import tiny_pipeline, tiny_sdxl, tiny_texts


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


def test_an_autoencoder_that_overflows_in_half_precision_is_found_out() -> None:
    pipeline = tiny_pipeline()
    pipeline.vae.decoder.conv_out.weight.data *= 1e6
    assert model_of(pipeline).generate_checked("red sun map", [0]).failed == (None,)
    _, failed = model_of(pipeline.to(torch.float16)).generate_checked("red sun map", [0])
    assert failed == ("pixels are not finite, decoded from finite latents in float16",)
