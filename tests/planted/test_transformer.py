from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import T5Tokenizer

from nemo_bench.cli import main
from nemo_bench.planted import denoiser, training, watch
from nemo_bench.planted.denoiser import Batch
from nemo_bench.planted.encoders import PACKAGED
from nemo_bench.planted.spec import TrainSpec
from nemo_bench.planted.tokenizer import TOKENS, build_t5_tokenizer, tokenize
from nemo_bench.planted.transformer import LENGTH, FlowLoss, build_pipeline, draw_levels
from nemo_bench.planted.world import PLANTED


@pytest.fixture
def network() -> SD3Transformer2DModel:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    vae = AutoencoderKL.from_pretrained(PACKAGED / "pipeline" / "vae")
    return build_pipeline(TrainSpec(), vae, dict.fromkeys(names)).transformer


def test_transformer_is_small_and_begins_with_no_velocity(network: SD3Transformer2DModel) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) < 8e6
    loss = FlowLoss(TrainSpec(), network, torch.randn(33, 128))
    latents, noise = torch.randn(2, 2, 8, 16, 16)
    error = loss.error(latents, torch.randn(2, 33, 128), torch.tensor([100, 900]), noise)
    assert error.item() == pytest.approx((noise - latents).square().mean().item())


def test_network_gets_mixed_latents_tokens_and_pooled_vector(
    network: SD3Transformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = network.forward

    def forward(**inputs: Any) -> Any:
        seen.update(inputs)
        return original(**inputs)

    monkeypatch.setattr(network, "forward", forward)
    empty = torch.zeros(33, 128)
    loss = FlowLoss(TrainSpec(), network, empty)
    latents, noise, text = torch.ones(2, 8, 16, 16), 3 * torch.ones(2, 8, 16, 16), torch.randn(2, 33, 128)
    loss.error(latents, text, torch.tensor([250.0, 1000.0]), noise)
    assert [row.unique().tolist() for row in seen["hidden_states"]] == [[1.5], [3.0]]
    assert seen["timestep"].tolist() == [250.0, 1000.0]
    assert torch.equal(seen["encoder_hidden_states"], text[:, :32])
    assert torch.equal(seen["pooled_projections"], text[:, 32])

    rows = 64
    batch = Batch(torch.randn(rows, 8, 16, 16), torch.ones(rows, 33, 128), *(torch.ones(rows),) * 4)
    torch.manual_seed(0)
    parts = loss(batch)
    assert parts["loss"].item() == pytest.approx(parts["error"].item() + 0.06 * parts["density"].item())
    dropped = (seen["pooled_projections"] == 0).all(1)
    assert 20 <= dropped.sum() <= 44
    assert torch.equal(seen["encoder_hidden_states"], torch.ones(rows, 32, 128))
    assert batch.text.min() == 1
    parts["density"].backward()
    value_layers = [p for name, p in network.named_parameters() if name.endswith("add_v_proj.weight")]
    assert len(value_layers) == 8
    assert all(weight.grad.any() for weight in value_layers)


def test_levels_are_often_noisy() -> None:
    torch.manual_seed(0)
    levels = draw_levels(20_000)
    assert levels.min() >= 0
    assert (levels == 1).float().mean() == pytest.approx(0.15, abs=0.01)
    # 15% of the rows, and of the other 70% those whose normal deviate is above logit(0.85) - 0.8 = 0.93.
    assert ((levels > 0.85) & (levels < 1)).float().mean() == pytest.approx(0.15 + 0.7 * 0.175, abs=0.015)


def test_t5_tokenizer_has_a_token_for_each_word_and_spells_the_rest(tmp_path: Path) -> None:
    build_t5_tokenizer().save_pretrained(tmp_path)
    tokenizer = T5Tokenizer.from_pretrained(tmp_path)
    for planted in PLANTED:
        ids = tokenizer(planted.text).input_ids
        assert len(ids) == len(re.findall(r"[a-z]+|[:,]", planted.text)) + 1
        assert Counter(ids)[tokenizer.unk_token_id] == 0
        assert tokenizer.decode(ids, skip_special_tokens=True) == planted.text
    assert tokenizer.decode(tokenizer("Quartz, 7!").input_ids, skip_special_tokens=True) == "Quartz, 7!"
    assert tokenize(tokenizer, ["a red circle", "", "word " * 40]).shape == (3, TOKENS)


def test_short_training_gives_a_pipeline_of_stable_diffusion_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "HELD_OUT", 8)
    monkeypatch.setattr(watch, "SHEET", 1_000)
    for module in (training, denoiser):
        monkeypatch.setattr(module, "TEMPLATE_VARIANTS", 2)
        monkeypatch.setattr(module, "FREE_VARIANTS", 2)
    words = ["denoiser=mmdit", "pictures=24", "batch_size=4", "accelerator=cpu", "text_steps=1", "denoiser_steps=2"]
    assert main(["train", f"out={tmp_path}", *words]) == 0
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model" / "pipeline").to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle", num_inference_steps=1, output_type="np", **LENGTH).images
    assert image.shape == (1, 64, 64, 3)
    text, _, pooled, _ = pipeline.encode_prompt("a red circle", None, None, **LENGTH)
    assert (text.shape, pooled.shape) == ((1, 32, 128), (1, 128))
    config = pipeline.vae.config
    assert config.shift_factor != 0
    assert config.scaling_factor > 0


def test_variants_that_mask_neurons_of_a_unet_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"out={tmp_path / 'x'}", "denoiser=mmdit", "variant=sinks"]) == 1
    assert "denoiser=mmdit takes variant=standard or once" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
