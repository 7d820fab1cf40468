"""The networks of open_clip: weights and their activation, downloads, and embeddings."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_bench.errors import ModelError
from nemo_bench.metrics import OpenClip
from nemo_bench.metrics.networks import loaded
from small_networks import CLIP, clip, picture

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (OpenClip("ViT-B-32", "no-tag"), "no weights for open_clip model 'ViT-B-32', pretrained 'no-tag'.*openai"),
        (OpenClip("ViT-B-32-quickgelu", "laion2b_s34b_b79k"), "belong to 'ViT-B-32': name that as the model"),
        (OpenClip("ViT-B-32"), "set pretrained to a tag or file"),
        (OpenClip("ViT-B-0", "openai"), "unknown open_clip model 'ViT-B-0'.*Did you mean 'ViT-B-32"),
        (OpenClip("local-dir:gone"), "no open_clip_config.json in that folder"),
    ],
)
def test_unknown_open_clip_models_fail_the_check(space: OpenClip, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        space.check()


@pytest.mark.parametrize(
    ("model", "tag"),
    [
        ("ViT-B-32-quickgelu", "openai"),
        ("ViT-L-14-quickgelu", "openai"),
        ("ViT-H-14", "laion2b_s32b_b79k"),
        ("ViT-g-14", "laion2b_s12b_b42k"),
    ],
)
def test_the_open_clip_models_of_the_papers_are_known(model: str, tag: str) -> None:
    OpenClip(model, tag).check()
    assert OpenClip(model, tag).title == f"CLIP {model}"


@pytest.mark.parametrize("model_and_tag", open_clip.list_pretrained(), ids=":".join)
def test_every_mismatch_that_open_clip_warns_of_is_refused_with_the_right_name(model_and_tag: tuple[str, str]) -> None:
    model, tag = model_and_tag
    architecture, weights = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
    # The condition of the warning in open_clip's create_model.
    if architecture.get("quick_gelu", False) == weights.get("quick_gelu", False):
        OpenClip(model, tag).check()
        return
    with pytest.raises(ModelError, match="GELU") as refused:
        OpenClip(model, tag).check()
    if f"{model}-quickgelu" in open_clip.list_models():
        assert f"name '{model}-quickgelu' as the model" in str(refused.value)
        OpenClip(f"{model}-quickgelu", tag).check()


@pytest.fixture
def architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adds ``small`` and ``small-quickgelu`` to open_clip, with a tag ``quick`` of one file; returns that file."""
    sharpened = {**CLIP["model_cfg"], "vision_cfg": {**CLIP["model_cfg"]["vision_cfg"], "layers": 2}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", sharpened)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-quickgelu", {**sharpened, "quick_gelu": True})
    torch.manual_seed(0)
    weights = open_clip.create_model("small-quickgelu").state_dict()
    path = tmp_path / "weights" / "open_clip_model.safetensors"
    path.parent.mkdir()
    # Larger than as they are drawn, so that the activation shows well.
    save_file({k: 3 * v if v.is_floating_point() else v for k, v in weights.items()}, path)
    listed = {"quick": {"file": str(path), "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}}
    for name in ("small", "small-quickgelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, listed)
    return path


def by_open_clip(model: str, file: Path) -> Tensor:
    network = open_clip.create_model(model, pretrained=str(file)).eval()
    normalized = (np.asarray(picture(1, (16, 16))) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    with torch.no_grad():
        vector: Tensor = network.encode_image(torch.from_numpy(normalized).permute(2, 0, 1)[None].float())[0]
    return vector


def test_weights_are_used_with_the_activation_they_were_trained_with(architectures: Path) -> None:
    space = OpenClip("small-quickgelu", "quick")
    space.check()
    vector = space.embed([picture(1, (16, 16))], (64, 64), CPU)[0]
    torch.testing.assert_close(vector, by_open_clip("small-quickgelu", architectures), atol=1e-4, rtol=1e-4)
    assert (vector - by_open_clip("small", architectures)).abs().max() > 0.01
    with pytest.raises(ModelError, match="'small' has GELU, but its weights 'quick' were trained with QuickGELU"):
        OpenClip("small", "quick").check()


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")  # what counts is that it's an error whatever filters are set
def test_a_mismatch_of_activations_fails_loading(architectures: Path) -> None:
    with pytest.raises(ModelError, match="QuickGELU mismatch"):
        OpenClip("small", "quick").load()


def test_the_activation_of_a_file_is_read_from_settings_beside_it(architectures: Path) -> None:
    given, beside = str(architectures), architectures.parent
    OpenClip("small-quickgelu", given).check()
    with pytest.raises(ModelError, match=r"nothing tells whether .* name 'small-quickgelu' as the model; if not, put"):
        OpenClip("small", given).check()
    (beside / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    with pytest.raises(ModelError, match="were trained with QuickGELU; name 'small-quickgelu' as the model"):
        OpenClip("small", given).check()
    (beside / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": False}}))
    OpenClip("small", given).check()
    with pytest.raises(ModelError, match="were trained with GELU; name 'small' as the model"):
        OpenClip("small-quickgelu", given).check()
    (beside / "config.json").write_text(json.dumps({"text_config": {"hidden_act": "quick_gelu"}}))
    with pytest.raises(ModelError, match="were trained with QuickGELU"):
        OpenClip("small", given).check()


def test_the_activation_of_a_listed_file_is_known_by_its_digest(
    architectures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The digest that OpenAI publishes for ViT-B/32, as its address holds it.
    published = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    monkeypatch.setattr("nemo_bench.metrics.clip.file_digest", lambda path: published)
    with pytest.raises(ModelError, match="were trained with QuickGELU; name 'small-quickgelu'"):
        OpenClip("small", str(architectures)).check()
    folder = architectures.parent
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP))
    with pytest.raises(ModelError, match=r"has GELU, but its weights were trained with QuickGELU; correct quick_gelu"):
        OpenClip(f"local-dir:{folder}").check()


def test_downloaded_weights_of_a_tag_are_used_without_asking_the_hub(
    architectures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = OpenClip("small-quickgelu", "quick").embed([picture(1)], (64, 64), CPU)
    listed = open_clip.pretrained._PRETRAINED["small-quickgelu"]["quick"]
    del listed["file"]
    listed["hf_hub"] = "some/clip/"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--clip" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--clip" / "refs").mkdir()
    (tmp_path / "models--some--clip" / "refs" / "main").write_text("1" * 40)

    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded.cache_clear()
    space = OpenClip("small-quickgelu", "quick")
    assert not space.is_fetched
    start = time.perf_counter()
    with pytest.raises(ModelError, match=r"'quick' of open_clip model .*the network is unreachable.*HF_HOME"):
        space.fetch()
    shutil.copy(architectures, snapshot / "open_clip_model.safetensors")
    assert space.is_fetched
    space.fetch()
    torch.testing.assert_close(space.embed([picture(1)], (64, 64), CPU), expected)
    assert time.perf_counter() - start < 5  # the hub's client alone would try for 46 s


def test_an_open_clip_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CLIP))
    with pytest.raises(ModelError, match=r"no weights for open_clip model 'local-dir:.*give a known pair"):
        loaded(OpenClip(f"local-dir:{tmp_path}"), CPU)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="no weights for open_clip model"):
        loaded(OpenClip(f"local-dir:{tmp_path}"), CPU)


def test_open_clip_embeds_as_open_clip_does(tmp_path: Path) -> None:
    space = clip(tmp_path)
    space.check()
    model, preprocess = open_clip.create_model_from_pretrained(space.model)
    model.eval()
    images = [picture(1), picture(2)]
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(image) for image in images]))
        text = model.encode_text(open_clip.get_tokenizer(space.model)(["a red car"]))[0]
    torch.testing.assert_close(space.embed(images, (64, 64), CPU), expected)
    vector, cut = space.embed_text("a red car", CPU)
    torch.testing.assert_close(vector, text)
    assert not cut
    network = loaded(space, CPU)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("words", "cut"), [(0, False), (5, False), (6, False), (7, True), (40, True)])
def test_embedding_a_text_says_whether_it_was_cut(tmp_path: Path, words: int, cut: bool) -> None:
    # Eight tokens, of which the first and the last are marks of beginning and end.
    assert clip(tmp_path).embed_text("car " * words, CPU)[1] is cut


def test_a_damaged_folder_of_open_clip_fails_the_check(tmp_path: Path) -> None:
    space, weights = clip(tmp_path), tmp_path / "open_clip_model.safetensors"
    space.check()
    content = weights.read_bytes()
    for bad in (content[: len(content) // 2], b"", b"<html>"):
        weights.write_bytes(bad)
        with pytest.raises(ModelError, match=r"open_clip_model\.safetensors can't be read"):
            space.check()
    weights.write_bytes(content)
    for text, why in (
        ('{"model_cfg": ', "is no JSON"),
        ("[]", "no JSON object"),
        ("3", "no JSON object"),
        ("{}", "has no"),
    ):
        (tmp_path / "open_clip_config.json").write_text(text)
        with pytest.raises(ModelError, match=rf"open_clip_config\.json .*{why}"):
            space.check()
