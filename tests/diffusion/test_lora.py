from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from nemo_bench import Diffusion
from nemo_bench.diffusion import Lora, Source
from nemo_bench.errors import ConfigError, ModelError
from tiny import tiny_pipeline

COMMIT = "1" * 40


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the value and query layers of the tiny pipeline, as peft and diffusers save it."""
    peft = pytest.importorskip("peft")
    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["attn2.to_v", "attn2.to_q"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("lora")
    layers = peft.get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict()
    )
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_is_added_to_the_weights(folder: Path, lora: Path, scale: float) -> None:
    changed = Diffusion(Source(str(folder), lora=Lora(str(lora), scale)).load())
    plain = Diffusion(tiny_pipeline())
    weights, layer = load_file(lora), "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    down, up = (weights[f"unet.{layer}.lora_{part}.weight"] for part in "AB")
    # Hu et al. 2021: W + alpha / r * B A; here alpha is 4 and r is 2.
    expected = plain.unet.get_submodule(layer).weight + scale * 2 * up @ down
    torch.testing.assert_close(changed.unet.get_submodule(layer).weight, expected)
    assert changed.value_layers.keys() == plain.value_layers.keys()
    assert type(changed.unet.get_submodule(layer)) is torch.nn.Linear
    assert set(changed.state_dict()) == set(plain.state_dict())


def test_a_lora_is_part_of_the_digest(folder: Path, lora: Path, tmp_path: Path) -> None:
    def of(path: Path | None, scale: float = 1.0) -> str:
        return Source(str(folder), lora=Lora(str(path), scale) if path else None).digest()

    moved = tmp_path / "moved.safetensors"
    shutil.copy(lora, moved)
    assert of(lora) == of(lora.parent) == of(moved)
    assert len({of(None), of(lora), of(lora, 0.5)}) == 3


def test_a_lora_in_place_of_a_model_is_an_error(lora: Path, hub: Path, single_file: Path) -> None:
    for given in (lora, lora.parent):
        with pytest.raises(ModelError, match=r"is a LoRA, .* set model.lora=.*, and model.source to the model"):
            Source(str(given))
    with pytest.raises(ModelError, match=r"holds no LoRA; the model itself is model.source"):
        Lora(str(single_file)).check()
    snapshot = hub.parent / "models--some--lora" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.copy(lora, snapshot)
    with pytest.raises(ModelError, match="'some/lora' is a LoRA"):
        Source("some/lora", COMMIT, local_files_only=True).check()


@pytest.mark.usefixtures("no_network")
def test_a_lora_of_the_hub_is_taken_from_what_was_downloaded(folder: Path, lora: Path, hub: Path) -> None:
    snapshot = hub.parent / "models--some--lora" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    shutil.copy(lora, snapshot / "style.safetensors")
    shutil.copy(lora, snapshot / "other.safetensors")
    with pytest.raises(ModelError, match=r"name one file of weights in it. .*: other.safetensors, style.safetensors"):
        Lora("some/lora", local_files_only=True).check()
    given = Lora("some/lora/style.safetensors", local_files_only=True)
    given.check()
    here = Diffusion(Source(str(folder), lora=Lora(str(lora))).load()).state_digest()
    assert Diffusion(Source(str(folder), lora=given).load()).state_digest() == here


def test_a_lora_that_fits_nothing_is_an_error(folder: Path, tmp_path: Path) -> None:
    layer = "unet.no_such_block.attn2.to_v.lora_{}.weight"
    save_file(
        {layer.format("A"): torch.ones(2, 8), layer.format("B"): torch.ones(8, 2)}, tmp_path / "other.safetensors"
    )
    with pytest.raises(ModelError, match=r"does not fit the model .*give the model that it was trained on"):
        Source(str(folder), lora=Lora(str(tmp_path / "other.safetensors"))).load()


def test_a_lora_without_peft_says_what_to_install(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_bench.diffusion.lora.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'nemo-bench\[lora\]'"):
        Lora(str(lora)).check()
