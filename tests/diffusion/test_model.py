from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_bench import Diffusion, Neurons
from nemo_bench.diffusion import value_layers
from tiny import tiny_pipeline, tiny_texts


def test_seven_value_layers_in_network_order(tiny: Diffusion) -> None:
    short = [name.split(".transformer")[0] for name in tiny.value_layers]
    downs = [f"down_blocks.{block}.attentions.{layer}" for block in range(3) for layer in range(2)]
    assert short == [*downs, "mid_block.attentions.0"]
    assert len(value_layers(tiny.unet, "all")) == 7 + 9


def test_v_prediction_is_converted_to_noise() -> None:
    velocity = Diffusion(tiny_pipeline(prediction_type="v_prediction"), steps=4)
    text, latents = velocity.encode(tiny_texts(1)), velocity.latents([0])
    output = velocity.unet(latents, 500, encoder_hidden_states=text.text).sample
    alpha = velocity.scheduler.alphas_cumprod[500]
    expected = alpha.sqrt() * output + (1 - alpha).sqrt() * latents
    torch.testing.assert_close(velocity.predict_noise(latents, 500, text), expected)
    epsilon = Diffusion(tiny_pipeline(prediction_type="epsilon"), steps=4)
    torch.testing.assert_close(epsilon.predict_noise(latents, 500, text), output)


def test_long_prompts_are_cut_in_silence(tiny: Diffusion) -> None:
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, libraries = Handler(), [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [library.level for library in libraries]
    try:
        for library in libraries:
            library.addHandler(handler)
        tiny.encode(["red " * 40])
        assert said == []
        assert [library.level for library in libraries] == levels
        tiny.pipeline.encode_prompt("red " * 40, "cpu", 1, do_classifier_free_guidance=False)
        assert any("truncated" in line for line in said)
    finally:
        for library in libraries:
            library.removeHandler(handler)


def test_first_timestep_is_stable_diffusions() -> None:
    for steps in (4, 50):
        assert Diffusion(tiny_pipeline(), steps=steps).timestep() == 981


def test_latents_depend_on_their_seed_alone(tiny: Diffusion) -> None:
    torch.manual_seed(1)
    together = tiny.latents([3, 2**62, 5])
    torch.manual_seed(2)
    assert torch.equal(together[1:2], tiny.latents([2**62]))
    assert not torch.equal(together[0], together[2])


def test_images_do_not_depend_on_their_batch(tiny: Diffusion) -> None:
    text, latents = tiny.encode(tiny_texts(3)), tiny.latents(range(3))
    together = tiny.generate(text, latents)
    assert together.shape == (3, 3, 32, 32)
    assert together.min() >= 0
    assert together.max() <= 1
    for row in range(3):
        torch.testing.assert_close(
            together[row : row + 1], tiny.generate(text.rows([row]), latents[row : row + 1]), atol=1e-4, rtol=1e-3
        )


def test_export_gives_the_images_of_blocking_and_leaves_no_trace(tmp_path: Path) -> None:
    model = Diffusion(tiny_pipeline(), steps=4)
    before = model.state_digest()
    neurons = Neurons({name: range(0, width, 2) for name, width in model.masks.widths.items()})
    text, latents = model.encode(tiny_texts(2)), model.latents([1, 2])
    with model.block(neurons):
        blocked = model.generate(text, latents)
    model.export(tmp_path / "exported", neurons)
    assert model.state_digest() == before
    exported = Diffusion.load(str(tmp_path / "exported"), steps=4)
    torch.testing.assert_close(exported.generate(text, latents), blocked)
    assert exported.state_digest() != before


def test_truncation_is_noticed(tiny: Diffusion) -> None:
    assert not tiny.truncated("red sun")
    assert tiny.truncated("red " * 40)


def test_derivatives_of_a_pass_count_as_another_one(tiny: Diffusion) -> None:
    text, latents = tiny.encode(tiny_texts(2)), tiny.latents([0, 1])

    def spent(work: Callable[[], object]) -> int:
        before = tiny.row_passes
        work()
        return tiny.row_passes - before

    def predict(x: torch.Tensor) -> torch.Tensor:
        return tiny.predict_noise(x, 500, text)

    assert spent(lambda: predict(latents)) == 2
    leaf = latents.clone().requires_grad_()
    assert spent(lambda: torch.autograd.grad(predict(leaf).sum(), leaf)) == 4
    with sdpa_kernel(SDPBackend.MATH):
        assert spent(lambda: torch.func.jvp(predict, (latents,), (latents,))) == 4


def test_importing_the_package_leaves_out_libraries_that_only_loading_needs() -> None:
    names = [
        "diffusers",
        "transformers",
        "peft",
        "huggingface_hub.hf_api",
        "torch._dynamo",
        "torchmetrics",
        "lightning",
    ]
    code = "import sys, nemo_bench.diffusion, nemo_bench.localization; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules
    assert not set(names) & set(modules)
