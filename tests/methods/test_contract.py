"""What every method that changes embeddings, noise, guidance, attention or weights must keep to, whatever it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from acting_methods import IDLE, METHODS, prepared
from batches import batch_of, images_of
from nemo_bench import Diffusion
from nemo_bench.diffusion import Similarity
from nemo_bench.diffusion.noise import LATE, masked_magnitude, mean_cosine, norms, unit
from nemo_bench.methods import (
    PRSS,
    SAIL,
    AnisotropyOptimization,
    Batch,
    BrightEndingOptimization,
    EmbeddingOptimization,
    Method,
    OptimizedNoise,
)
from nemo_bench.methods.bright_ending import bright_ending
from tiny import tiny_pipeline, tiny_sd2, tiny_sdxl

PIPELINES = {"sd1": tiny_pipeline, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


@pytest.fixture(scope="module", params=[*PIPELINES])
def model(request: pytest.FixtureRequest) -> Diffusion:
    return Diffusion(PIPELINES[request.param](), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))  # type: ignore[operator]


@pytest.mark.parametrize("name", METHODS)
def test_method_changes_images_and_leaves_the_model_as_it_was(model: Diffusion, name: str) -> None:
    batch, method = batch_of(model, [(0, 0), (0, 1), (1, 0)]), prepared(model, name)
    before, plain = model.state_digest(), model.generate(batch.text, batch.latents)
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    changed = images_of(model, method, batch)
    assert model.state_digest() == before
    assert hooks == sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    assert torch.equal(model.generate(batch.text, batch.latents), plain)
    assert all((changed - plain).flatten(1).abs().amax(1) > 1e-3)


@pytest.mark.parametrize("name", IDLE)
def test_without_strength_images_are_exactly_the_models_own(model: Diffusion, name: str) -> None:
    batch = batch_of(model, [(0, 0), (0, 1), (1, 0)])
    plain = model.generate(batch.text, batch.latents)
    assert torch.equal(images_of(model, prepared(model, name, IDLE), batch), plain)


def magnitudes(model: Diffusion, batch: Batch) -> torch.Tensor:
    return norms(model.text_noise(batch.latents, model.timestep(), batch.text))


def anisotropies(model: Diffusion, batch: Batch) -> torch.Tensor:
    late = model.timestep(LATE)
    unconditional = model.predict_noise(batch.latents, late, model.unconditional(len(batch.text)))
    added = model.predict_noise(batch.latents, late, batch.text) - unconditional
    return magnitudes(model, batch) + 2 * mean_cosine(unconditional, added)


def masked(model: Diffusion, batch: Batch) -> torch.Tensor:
    masks = bright_ending(model, batch.prompts, batch.text, batch.latents)
    return masked_magnitude(model.text_noise(batch.latents, model.timestep(), batch.text), masks)


def sharpnesses(model: Diffusion, batch: Batch) -> torch.Tensor:
    direction = unit(model.text_noise(batch.latents, model.timestep(), batch.text))
    ahead = model.text_noise(batch.latents + direction, model.timestep(), batch.text)
    return norms(ahead) + 0.05 * norms(batch.latents)


Values = Callable[[Diffusion, Batch], torch.Tensor]
GATED: dict[str, tuple[Callable[[float], Method], Values]] = {
    "anisotropy_optimization": (lambda t: AnisotropyOptimization(t, steps=3, images=None), anisotropies),
    "bright_ending_optimization": (lambda t: BrightEndingOptimization(t, steps=3), masked),
    "embedding_optimization": (lambda t: EmbeddingOptimization(t, steps=3, images=None), magnitudes),
    "optimized_noise": (lambda t: OptimizedNoise(t, steps=3), magnitudes),
    "prss": (lambda t: PRSS(search_target=t, anchor_from=0.0, anchor_full=1e-3, steps=3), magnitudes),
    "sail": (lambda t: SAIL(t, steps=3, candidates=1, restarts=0), sharpnesses),
}
"""Methods by target, and what they compare with it."""


@pytest.mark.parametrize("name", GATED)
def test_images_below_the_target_stay_the_same_beside_others(model: Diffusion, name: str) -> None:
    if name == "bright_ending_optimization" and model.family.pipeline_class == "StableDiffusionXLPipeline":
        pytest.skip("SDXL has no cross-attention in its first block")
    make, measure = GATED[name]
    batch = batch_of(model, [(0, 0), (1, 0), (2, 0)])
    plain, values = model.generate(batch.text, batch.latents), measure(model, batch)
    target = float(values.min() + values.max()) / 2
    changed = images_of(model, make(target), batch)
    assert [bool((image != own).any()) for image, own in zip(changed, plain, strict=True)] == (values > target).tolist()


@pytest.mark.parametrize("name", METHODS)
def test_images_generated_one_after_the_other_are_the_same(model: Diffusion, name: str) -> None:
    """A context that is still open keeps nothing of the images before."""
    batch = batch_of(model, [(0, 0), (1, 0)])
    with prepared(model, name).apply(model, batch) as changed:
        first, second = (changed.generate_checked(model).images for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", METHODS)
def test_images_in_inference_mode_are_the_same(model: Diffusion, name: str) -> None:
    batch = batch_of(model, [(0, 0), (1, 0)])
    with torch.inference_mode():
        there = images_of(model, prepared(model, name), batch_of(model, [(0, 0), (1, 0)]))
    torch.testing.assert_close(images_of(model, prepared(model, name), batch), there.clone(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", METHODS)
def test_an_error_inside_leaves_no_trace(model: Diffusion, name: str) -> None:
    batch, before = batch_of(model, [(0, 0)]), model.state_digest()
    plain = model.generate(batch.text, batch.latents)
    with pytest.raises(KeyError), prepared(model, name).apply(model, batch):
        raise KeyError
    assert model.state_digest() == before
    assert torch.equal(model.generate(batch.text, batch.latents), plain)


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_as_if_they_were_alone(model: Diffusion, name: str) -> None:
    batch = batch_of(model, [(0, 0), (0, 1), (1, 0)])
    together = images_of(model, prepared(model, name), batch)
    in_parts = prepared(model, name, batch_size=8)
    torch.testing.assert_close(images_of(model, in_parts, batch), together, rtol=0, atol=2e-2)
    for row in range(3):
        alone = images_of(model, prepared(model, name), batch.rows([row]))
        torch.testing.assert_close(together[[row]], alone, rtol=0, atol=2e-2)
