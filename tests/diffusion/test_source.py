from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from checkpoints import original_layout
from nemo_bench import Diffusion
from nemo_bench.diffusion import Source
from nemo_bench.errors import ModelError
from tiny import tiny_pipeline, tiny_sdxl, tiny_texts

COMMITS = ("1" * 40, "2" * 40)


@pytest.mark.usefixtures("no_network")
def test_loading_a_folder_asks_no_network(folder: Path) -> None:
    assert Diffusion.load(str(folder), steps=4).dtype is torch.float32


def test_half_precision_weights_load_in_the_format_asked_for(tmp_path: Path) -> None:
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "model")
    model = Diffusion.load(str(tmp_path / "model"), dtype="float32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.usefixtures("no_network")
def test_another_unet_takes_the_place_of_the_pipelines(folder: Path, tmp_path: Path) -> None:
    other = tiny_pipeline().unet
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    other.save_pretrained(tmp_path / "unet")
    source = Source(str(folder), unet=str(tmp_path / "unet"))
    loaded = Diffusion.load(source, steps=4)
    assert torch.equal(loaded.unet.conv_in.weight, other.conv_in.weight)
    assert torch.equal(loaded.vae.decoder.conv_in.weight, Diffusion.load(str(folder)).vae.decoder.conv_in.weight)
    assert source.latent_size == Source(str(folder)).latent_size
    assert source.digest() != Source(str(folder)).digest()
    digest = source.digest()
    other.conv_out.bias.data.add_(1)
    other.save_pretrained(tmp_path / "unet")
    assert source.digest() != digest


@pytest.mark.parametrize("missing", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_folder_without_a_unet_is_an_error_before_loading(folder: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    (tmp_path / "unet" / missing).unlink()
    with pytest.raises(ModelError, match=r"model\.unet=.* is no UNet folder: expected .* give the folder of a UNet"):
        Source(str(folder), unet=str(tmp_path / "unet"))


def test_a_damaged_unet_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "unet", tmp_path / "unet")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"model\.unet=.* can't be loaded \(.*\); check that it is a complete UNet"):
        Source(str(folder), unet=str(tmp_path / "unet")).load()


@pytest.mark.usefixtures("no_network")
def test_a_single_file_is_the_pipeline_it_was_made_of(folder: Path, single_file: Path) -> None:
    whole, file = (
        Diffusion.load(str(folder), steps=2),
        Diffusion.load(Source(str(single_file), config=str(folder)), steps=2),
    )
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
    with pytest.raises(ModelError, match=r"can't be loaded: tokenizer/merges.txt, tokenizer/vocab.json missing"):
        Source(str(single_file), config="some/model", local_files_only=True).load()
    shutil.rmtree(hub / "snapshots" / COMMITS[0] / "unet")
    with pytest.raises(ModelError, match="can't be loaded"):
        Source(str(single_file), config="some/model", local_files_only=True).load()


def test_a_tokenizer_that_lacks_words_is_an_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] = {**content["model"], "vocab": {"!": 0, '"': 1}, "merges": []}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"tokenizer knows \d of 546 tokens"):
        Source(str(tmp_path / "model")).load()


def test_a_single_file_of_another_shape_is_an_error(single_file: Path, tmp_path: Path) -> None:
    tiny_pipeline(block_out_channels=(8, 16, 16, 16)).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"can't be loaded \(.*size mismatch.*\); check that it is a pipeline like"
    ) as caught:
        Source(str(single_file), config=str(tmp_path / "model")).load()
    assert len(str(caught.value)) < 800


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
        ("text_encoder", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
    ],
)
def test_a_file_that_lacks_a_weight_is_an_error(folder: Path, tmp_path: Path, part: str, name: str) -> None:
    weights = original_layout(tiny_pipeline())
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
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
def test_a_path_without_a_pipeline_is_an_error_before_loading(
    path: str, config: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "weights.ckpt").touch()
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ModelError, match=message):
        Source(path.format(here=tmp_path), config=config and config.format(here=tmp_path))


@pytest.mark.usefixtures("no_network", "hub")
def test_a_missing_hub_id_is_an_error_before_loading() -> None:
    with pytest.raises(ModelError, match=r"'some/other': it can't be found among the downloaded.*HF_HOME.*such as"):
        Source("some/other", local_files_only=True).digest()
    with pytest.raises(ModelError, match=r"'some/model': it can't be found at '3+'"):
        Source("some/model", "3" * 40, local_files_only=True).digest()


@pytest.mark.parametrize("name", ["KandinskyPipeline", "StableDiffusionXLImg2ImgPipeline"])
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
    with pytest.raises(ModelError, match=r"can't be loaded: unet/diffusion_pytorch_model.safetensors missing"):
        Diffusion.load(str(tmp_path / "model"))
    (tmp_path / "model" / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="not a valid JSON file"):
        Source(str(tmp_path / "model")).digest()


@pytest.mark.parametrize("has_accelerate", [True, False])
@pytest.mark.parametrize(
    ("network", "weight"),
    [
        ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight"),
        ("vae", "decoder.conv_in.bias"),
        ("text_encoder", "final_layer_norm.weight"),
    ],
)
def test_a_network_that_lacks_a_weight_is_an_error_in_place_of_a_random_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, weight: str, has_accelerate: bool
) -> None:
    place = copied(folder, tmp_path / "model")
    (file,) = (place / network).glob("*.safetensors")
    weights = load_file(file)
    (name,) = (name for name in weights if name.endswith(weight))
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    monkeypatch.setattr("nemo_bench.diffusion.source.find_spec", lambda name: object() if has_accelerate else None)
    expected = rf"model '{place}' can't be loaded \(1 weight of \w+ not in its files, such as \S*{weight}\); check that"
    with pytest.raises(ModelError, match=expected):
        Source(str(place)).load()
    if network == "unet":
        with pytest.raises(ModelError, match=r"model\.unet=.* \(1 weight of UNet2DConditionModel not in its files"):
            Source(str(folder), unet=str(place / "unet")).load()


def test_without_accelerate_nothing_is_asked_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers would print advice to install it at every start."""
    monkeypatch.setattr("nemo_bench.diffusion.source.find_spec", lambda name: None)
    asked = []
    original = StableDiffusionPipeline.from_pretrained

    def from_pretrained(place: str, **options: Any) -> Any:
        asked.append(options["low_cpu_mem_usage"])
        return original(place, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    Source(str(folder)).load()
    assert asked == [False]


def test_a_network_of_another_library_is_an_error(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "model")
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps({**index, "vae": ["shutil", "rmtree"]}))
    with pytest.raises(ModelError, match=r"its vae is shutil\.rmtree, expected a class of diffusers or transformers"):
        Source(str(place)).load()


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"])
@pytest.mark.parametrize(("content", "message"), [("[]", "holds no object"), ("[" * 100_000, "not a valid JSON file")])
def test_settings_that_are_no_json_object_are_named(
    name: str, content: str, message: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    source = Source(str(tmp_path / "model"))
    with pytest.raises(ModelError, match=f"{name}.*{message}"):
        print(source.family, source.scheduler, source.latent_size)


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


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))


def half(pipeline: StableDiffusionPipeline, place: Path, **options: Any) -> Path:
    """Saves a pipeline as ``*.fp16.safetensors`` only."""
    pipeline.to(torch.float16).save_pretrained(place, variant="fp16", **options)
    return place


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_the_only_variant_of_a_folder_is_loaded(tmp_path: Path, shard: str) -> None:
    place = half(tiny_pipeline(), tmp_path / "half", max_shard_size=shard)
    assert not list(place.glob("*/model.safetensors"))
    found, named = Source(str(place)), Source(str(place), variant="fp16")
    found.check()
    expected = Diffusion(tiny_pipeline().to(torch.float16).to(torch.float32)).state_digest()
    assert Diffusion(found.load()).state_digest() == expected
    assert found.digest() == named.digest()
    with pytest.raises(ModelError, match=r"model.variant=ema, but the variants of its weights are: fp16"):
        Source(str(place), variant="ema").check()


def test_plain_weights_come_before_a_variant_unless_it_is_named(folder: Path, tmp_path: Path) -> None:
    place = half(tiny_pipeline(1), copied(folder, tmp_path / "both"))
    plain, named = Source(str(place)), Source(str(place), variant="fp16")
    assert Diffusion(plain.load()).state_digest() == Diffusion(tiny_pipeline(0)).state_digest()
    expected = Diffusion(tiny_pipeline(1).to(torch.float16).to(torch.float32)).state_digest()
    assert Diffusion(named.load()).state_digest() == expected
    assert plain.digest() != named.digest()


def test_one_of_several_variants_must_be_named(tmp_path: Path) -> None:
    place = half(tiny_pipeline(), tmp_path / "model")
    tiny_pipeline().save_pretrained(place, variant="ema")
    with pytest.raises(ModelError, match=r"as ema and as fp16: choose one, such as model.variant=ema"):
        Source(str(place)).check()


def test_pickled_weights_are_refused_and_the_command_in_the_message_converts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "old"
    tiny_pipeline().save_pretrained(place, safe_serialization=False)
    for file in place.glob("text_encoder/*.safetensors"):  # transformers writes nothing else any more
        torch.save(tiny_pipeline().text_encoder.state_dict(), file.with_name("pytorch_model.bin"))
        file.unlink()
    with pytest.raises(ModelError, match=r"weights of its .* as .*\.bin only.*convert it once") as caught:
        Source(str(place)).check()
    command = str(caught.value).partition('python -c "')[2].rstrip('"')
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    converted = Diffusion(Source(str(tmp_path / "converted")).load())
    assert converted.state_digest() == Diffusion(tiny_pipeline()).state_digest()


def test_parts_that_nothing_uses_may_be_absent(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "model")
    index = json.loads((place / "model_index.json").read_text())
    unused = {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    (place / "model_index.json").write_text(json.dumps({**index, **unused}))
    assert Diffusion(Source(str(place)).load()).state_digest() == Diffusion(tiny_pipeline()).state_digest()


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])
def test_a_missing_file_is_an_error_before_loading(folder: Path, tmp_path: Path, name: str) -> None:
    place = copied(folder, tmp_path / "model")
    (place / name).unlink()
    with pytest.raises(ModelError, match=name.replace("tokenizer.json", "vocab.json")):
        Source(str(place)).check()


def test_a_missing_shard_is_an_error_before_loading(tmp_path: Path) -> None:
    place = tmp_path / "model"
    tiny_pipeline().save_pretrained(place, max_shard_size="20KB")
    Source(str(place)).check()
    lost = sorted(place.glob("unet/*-of-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        Source(str(place)).check()


class Answers(BaseHTTPRequestHandler):
    """A hub that says no; what it answers is the repository's name."""

    def do_GET(self) -> None:
        code = int(re.search(r"status(\d+)", self.path)[1])  # type: ignore[index] # the tests ask for such names
        self.send_response(code)
        for word, error in {"gated": "GatedRepo", "404": "RepoNotFound"}.items():
            if word in self.path:
                self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def asks(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("some/status404", r"can't be found on the hub; if it is private, log in"),
        ("some/gated-status403", r"is gated: accept its conditions at .*/some/gated-status403, then log in"),
        ("some/status403", r"the hub refuses it \(.*403"),
        ("some/status503", r"the network is unreachable.*503"),
    ],
)
def test_every_refusal_of_the_hub_has_its_own_message(
    place: str, message: str, server: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks(server, monkeypatch)
    with pytest.raises(ModelError, match=rf"^model '{place}': [^:]*{message}"):
        Source(place).check()


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_hub_out_of_reach_is_one_message_within_seconds(
    kind: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_bench.hub.PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if kind == "refused":
            silent.close()
        asks(f"http://127.0.0.1:{port}", monkeypatch)
        start = time.perf_counter()
        with pytest.raises(ModelError, match=r"network is unreachable.*HF_HOME.*model.local_files_only=true") as caught:
            Source("some/other").digest()
        assert "\n" not in str(caught.value)
        # What was downloaded is taken, as ever, but without half a minute of tries.
        assert Source("some/model").digest() == Source("some/model", COMMITS[0], local_files_only=True).digest()
        assert time.perf_counter() - start < 10
        assert Diffusion(Source("some/model").load()).state_digest() == Diffusion(tiny_pipeline()).state_digest()
