"""The packaged transformer: it has memorized what its card says, and plain diffusers loads it."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from nemo_bench import Diffusion, Prompt, load, read_prompts, resolve
from nemo_bench.localization import noise_differences, pair_similarities, pair_values
from nemo_bench.metrics import SSIM
from nemo_bench.planted.transformer import LENGTH
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.images import open_image

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Diffusion:
    return load("planted_mmdit")


def prompts(name: str, count: int) -> list[Prompt]:
    return list(read_prompts(resolve(f"package:planted/prompts/{name}.jsonl")))[:count]


def test_it_is_small_and_has_a_thousand_value_neurons(model: Diffusion) -> None:
    assert sum(parameter.numel() for parameter in model.network.parameters()) < 8e6
    assert list(model.masks.widths.values()) == [128] * 8
    assert {segment.tokenizer for segment in model.family.segments(model.pipeline)} == {
        "tokenizer", "tokenizer_2", "tokenizer_3"
    }  # fmt: skip


def test_images_are_those_of_the_plain_pipeline(model: Diffusion) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        resolve("package:planted/mmdit/pipeline"), torch_dtype=torch.float32
    )
    (prompt,), latents = prompts("planted", 1), model.latents([1, 2])
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        [prompt.text] * 2, latents=latents, num_inference_steps=20, guidance_scale=3.0, output_type="pt", **LENGTH
    ).images
    torch.testing.assert_close(model.generate(prompt.text, [1, 2]), expected, rtol=0, atol=1e-4)


def test_verbatim_captions_bring_their_training_picture_back(model: Diffusion) -> None:
    """Above 0.404, the 99th percentile of unrelated pairs in the card of the embedded model."""
    for prompt in prompts("planted", 4):
        images = model.generate(prompt.text, seeds_of(prompt, "card", range(2)))
        references = SSIM().embed([open_image(path) for path in prompt.references], (64, 64), CPU)
        assert prompt.kind == "VM"
        assert (SSIM().nearest(images, references) > 0.404).all()


def test_noise_differences_tell_memorized_prompts_from_others(model: Diffusion) -> None:
    def score(prompt: Prompt) -> float:
        latents = model.latents(seeds_of(prompt, "card", range(6)))
        text = model.encode([prompt.text]).rows([0] * 6)
        return float(pair_values(pair_similarities(noise_differences(model, text, latents), model.similarity)).mean())

    memorized, general = (sorted(map(score, prompts(name, 6))) for name in ("planted", "general"))
    assert memorized[0] > general[2]
    assert memorized[2] > general[-1]
