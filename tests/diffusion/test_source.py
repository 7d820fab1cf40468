from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from nemo_bench import Diffusion
from nemo_bench.diffusion import Source
from nemo_bench.errors import ModelError
from tiny import tiny_pipeline, tiny_sdxl, tiny_texts

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "model"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloaded models, with some/model at two commits, as the hub's client lays them out."""
    model = tmp_path / "models--some--model"
    for commit, seed in zip(COMMITS, (0, 1), strict=True):
        tiny_pipeline(seed).save_pretrained(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMITS[0])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return model


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file(original_layout(tiny_pipeline()), path)
    return path


def original_layout(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Weights of a pipeline under the names of the checkpoints that Stable Diffusion 1.x was published as."""
    unet = pipeline.unet.state_dict()
    names = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    names |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    for block in range(4):
        for layer in range(3):
            place, up = 3 * block + layer, f"up_blocks.{block}"
            names[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{place + 1}.0"
            names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{place + 1}.1"
            names[f"{up}.resnets.{layer}"] = f"output_blocks.{place}.0"
            names[f"{up}.attentions.{layer}"] = f"output_blocks.{place}.1"
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{3 * block + 3}.0.op"
        attention = any(name.startswith(f"up_blocks.{block}.attentions") for name in unet)
        names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{3 * block + 2}.{1 + attention}.conv"
    names |= {f"mid_block.resnets.{layer}": f"middle_block.{2 * layer}" for layer in range(2)}
    names["mid_block.attentions.0"] = "middle_block.1"
    parts = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    parts |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    weights = {}
    for name, tensor in unet.items():
        start = next(start for start in names if name.startswith(f"{start}."))
        rest = name.removeprefix(start)
        if ".resnets." in name:
            rest = "." + parts[rest.split(".")[1]] + "." + rest.split(".")[2]
        weights[f"model.diffusion_model.{names[start]}{rest}"] = tensor
    blocks = len(pipeline.vae.config.block_out_channels)
    words = {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_out.0": "proj_out", "to_q": "q"}
    words |= {"to_k": "k", "to_v": "v", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
    words |= {f"mid_block.resnets.{i}": f"mid.block_{i + 1}" for i in range(2)}
    for i in range(blocks):
        words |= {f"down_blocks.{i}.": f"down.{i}.", f"up_blocks.{i}.": f"up.{blocks - 1 - i}."}
    words |= {".resnets.": ".block.", "downsamplers.0.conv": "downsample.conv", "upsamplers.0.conv": "upsample.conv"}
    for name, tensor in pipeline.vae.state_dict().items():
        linear = ".attentions." in name and tensor.dim() == 2
        for word, other in words.items():
            name = name.replace(word, other)
        weights[f"first_stage_model.{name}"] = tensor[:, :, None, None] if linear else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in weights.items()}


@pytest.mark.usefixtures("no_network")
def test_loading_a_folder_asks_no_network(folder: Path) -> None:
    assert Diffusion.load(str(folder), steps=4).dtype is torch.float32


def test_half_precision_weights_load_in_the_format_asked_for(tmp_path: Path) -> None:
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "model")
    model = Diffusion.load(str(tmp_path / "model"), dtype="float32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.usefixtures("no_network")
def test_a_single_file_is_the_pipeline_it_was_made_of(folder: Path, single_file: Path) -> None:
    whole, file = Diffusion.load(str(folder), steps=2), Diffusion.load(str(single_file), config=str(folder), steps=2)
    assert file.state_digest() == whole.state_digest()
    for model in (whole, file):
        assert (model.timestep(), len(model.value_layers)) == (981, 7)
    text, latents = whole.encode(tiny_texts(2)), whole.latents([0, 1])
    torch.testing.assert_close(file.encode(tiny_texts(2)).text, text.text)
    torch.testing.assert_close(file.generate(text, latents), whole.generate(text, latents))


@pytest.mark.usefixtures("no_network")
def test_a_single_file_takes_settings_that_were_downloaded_before(hub: Path, single_file: Path) -> None:
    source = Source(str(single_file), config="some/model", local_files_only=True)
    assert Diffusion(source.load()).state_digest() == Diffusion(tiny_pipeline()).state_digest()


@pytest.mark.usefixtures("no_network")
def test_missing_settings_are_not_downloaded_where_only_local_files_are_wanted(hub: Path, single_file: Path) -> None:
    shutil.rmtree(hub / "snapshots" / COMMITS[0] / "tokenizer")
    with pytest.raises(ModelError, match="tokenizer knows 2 of 546 tokens"):
        Source(str(single_file), config="some/model", local_files_only=True).load()
    shutil.rmtree(hub / "snapshots" / COMMITS[0] / "unet")
    with pytest.raises(ModelError, match="can't be loaded"):
        Source(str(single_file), config="some/model", local_files_only=True).load()


def test_a_single_file_of_another_shape_is_an_error(single_file: Path, tmp_path: Path) -> None:
    tiny_pipeline(block_out_channels=(8, 16, 16, 16)).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"can't be loaded \(.*size mismatch.*\); check that it is a pipeline like"
    ) as told:
        Source(str(single_file), config=str(tmp_path / "model")).load()
    assert len(str(told.value)) < 800


def test_a_file_without_networks_is_an_error(folder: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="can't be loaded"):
        Source(str(tmp_path / "other.safetensors"), config=str(folder)).load()
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="can't be loaded"):
        Source(str(tmp_path / "torn.safetensors"), config=str(folder)).load()


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"),
        ("vae", "first_stage_model.encoder.conv_in.weight"),
    ],
)
def test_a_file_that_lacks_a_weight_is_an_error(folder: Path, tmp_path: Path, part: str, name: str) -> None:
    weights = original_layout(tiny_pipeline())
    del weights[name]
    save_file(weights, tmp_path / "partial.safetensors")
    with pytest.raises(ModelError, match=rf"holds \d+ of the \d+ weights of the {part}"):
        Source(str(tmp_path / "partial.safetensors"), config=str(folder)).load()


@pytest.mark.usefixtures("no_network")
def test_a_hub_id_is_taken_at_its_revision(hub: Path) -> None:
    first = Diffusion(Source("some/model", local_files_only=True).load())
    second = Diffusion(Source("some/model", COMMITS[1], local_files_only=True).load())
    assert first.state_digest() == Diffusion(tiny_pipeline(0)).state_digest()
    assert second.state_digest() == Diffusion(tiny_pipeline(1)).state_digest()


@pytest.mark.usefixtures("no_network")
def test_the_digest_of_a_hub_id_is_that_of_its_commit(hub: Path) -> None:
    def of(revision: str | None) -> str:
        return Source("some/model", revision, local_files_only=True).digest()

    assert of(None) == of("main") == of(COMMITS[0]) != of(COMMITS[1])
    (hub / "refs" / "main").write_text(COMMITS[1])
    assert of(None) == of(COMMITS[1])


@pytest.mark.parametrize(
    ("path", "config", "message"),
    [
        ("/nowhere/at/all", None, r"no pipeline folder \(there is no model_index\.json"),
        ("./missing", None, r"model_index\.json"),
        ("~/missing", None, r"model_index\.json"),
        ("word", None, "no hub id such as"),
        ("models/missing.safetensors", None, "does not exist"),
        ("{here}", None, "no pipeline folder"),
        ("{here}/weights.ckpt", None, "must be a .safetensors file"),
        ("{here}/weights.safetensors", None, "set model.config to a pipeline like it.*sd2-community"),
        ("{here}/weights.safetensors", "{here}", "no pipeline folder"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_what_is_no_pipeline_is_an_error_before_loading(
    path: str, config: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "weights.ckpt").touch()
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ModelError, match=message):
        Source(path.format(here=tmp_path), config=config and config.format(here=tmp_path))


@pytest.mark.usefixtures("no_network", "hub")
def test_a_hub_id_that_is_not_there_is_an_error_before_loading() -> None:
    with pytest.raises(ModelError, match=r"'some/other' can't be found among the downloaded models .*such as"):
        Source("some/other", local_files_only=True).digest()
    with pytest.raises(ModelError, match="'some/model' can't be found"):
        Source("some/model", "3" * 40, local_files_only=True).digest()


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_other_pipelines_are_refused_before_loading(name: str, folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    source = Source(str(tmp_path))
    for ask in (source.digest, source.load):
        with pytest.raises(ModelError, match=f"{name} are not .* StableDiffusionPipeline, StableDiffusionXLPipeline"):
            ask()


def test_a_broken_folder_is_an_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="can't be loaded"):
        Diffusion.load(str(tmp_path / "model"))
    (tmp_path / "model" / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="not a valid JSON file"):
        Source(str(tmp_path / "model")).digest()


def test_the_digest_follows_contents_not_places(folder: Path, single_file: Path, tmp_path: Path) -> None:
    copy, file = tmp_path / "model", tmp_path / "copy.safetensors"
    shutil.copytree(folder, copy)
    shutil.copy(single_file, file)
    for name in ("unet/._config.json", ".cache/huggingface/download.json"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("left by a system")
    assert Source(str(folder)).digest() == Source(str(copy)).digest()
    first = Source(str(single_file), config=str(folder)).digest()
    assert first == Source(str(file), config=str(copy)).digest()
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.5}))
    assert Source(str(folder)).digest() != Source(str(copy)).digest()
    assert first != Source(str(file), config=str(copy)).digest()
    save_file(original_layout(tiny_pipeline(1)), file)
    assert first != Source(str(file), config=str(folder)).digest()


def test_the_family_is_that_of_the_class(folder: Path, tmp_path: Path) -> None:
    tiny_sdxl().save_pretrained(tmp_path / "xl")
    families = [type(Source(str(path)).family).__name__ for path in (folder, tmp_path / "xl")]
    assert families == ["StableDiffusion", "StableDiffusionXL"]
