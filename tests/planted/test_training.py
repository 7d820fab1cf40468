from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nemo_bench import Diffusion, resolve
from nemo_bench.benchmark.runner import load_model
from nemo_bench.cli import main
from nemo_bench.config import grid, overridden
from nemo_bench.errors import ConfigError
from nemo_bench.planted import denoiser, fit, training, truth, watch
from nemo_bench.planted.denoiser import DenoiserLoss, activation_density
from nemo_bench.planted.fit import Fit
from nemo_bench.planted.spec import TrainSpec
from nemo_bench.planted.tokenizer import TOKENS, build_tokenizer, tokenize
from nemo_bench.planted.training import train
from nemo_bench.planted.truth import Evidence
from nemo_bench.planted.world import PLANTED
from nemo_bench.records.truth import read_isolation, read_truth
from offline_run import OfflineRun

PACKAGE = Path(resolve("package:planted"))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings with few pictures and a checkpoint every two steps."""
    monkeypatch.setattr(fit, "EPOCH", 2)
    monkeypatch.setattr(training, "HELD_OUT", 4)
    for module in (training, denoiser):
        monkeypatch.setattr(module, "TEMPLATE_VARIANTS", 2)
        monkeypatch.setattr(module, "FREE_VARIANTS", 2)


SHORT: dict[str, Any] = {"pictures": 24, "batch_size": 8, "accelerator": "cpu", "denoiser_steps": 4}


@pytest.mark.usefixtures("short")
def test_interrupted_training_resumes_and_gives_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {**SHORT, "parts": "trained", "text_steps": 2, "clip_steps": 2, "vae_steps": 2}
    straight = TrainSpec(out=tmp_path / "straight", **common)
    train(straight)

    original = DenoiserLoss.__call__
    calls = []

    def stop(*args: Any) -> dict[str, torch.Tensor]:
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return original(*args)

    monkeypatch.setattr(DenoiserLoss, "__call__", stop)
    broken = TrainSpec(out=tmp_path / "broken", **common)
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken)
    train(broken)
    assert len(calls) == 4 + 2  # from the checkpoint after two of four steps

    models = [Diffusion.load(str(s.out / "model" / "pipeline"), steps=2) for s in (straight, broken)]
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, atol=2e-3, rtol=2e-3)
    assert len(models[0].value_layers) == 7
    judge = open_clip.create_model(f"local-dir:{broken.out / 'model' / 'clip'}", require_pretrained=True)
    assert judge.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 64)


@pytest.mark.usefixtures("short")
def test_variant_shares_the_packaged_parts_and_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "SHEET", 2)
    evidence = [Evidence("vm-01", 4, 1.0, 0.0, 0.0, 1.0), Evidence("vm-02", 1, 0.5, 0.5, 0.0, 0.5)]
    monkeypatch.setattr(truth, "find_causes", lambda *args: evidence)  # images of 26 prompts
    words = [f"{key}={value}" for key, value in SHORT.items()]
    assert main(["train", "variant=routed", f"out={tmp_path}", "logger=all", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path)

    packaged, trained = (folder / "model" / "pipeline" for folder in (PACKAGE, tmp_path))
    for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        old, new = (load_file(folder / part) for folder in (packaged, trained))
        assert all(torch.equal(old[name], new[name]) for name in old)
    scales = [Diffusion.load(str(folder)).pipeline.vae.config.scaling_factor for folder in (packaged, trained)]
    assert scales[0] == scales[1]
    own = read_isolation(tmp_path).neurons
    assert read_truth(tmp_path / "truth.json") == {"vm-01": own["vm-01"]}
    assert [neurons.count for neurons in own.values()].count(8) >= 8
    masks = Diffusion.load(str(trained)).masks
    for neurons in own.values():
        masks.check(neurons)

    (rows,) = (tmp_path / "csv").glob("*/metrics.csv")
    head = rows.read_text().splitlines()[0]
    assert "unet/held_out_error" in head
    assert "unet/planted_error" in head
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00002.png", "step-00004.png"]
    assert Image.open(tmp_path / "samples" / "step-00004.png").size == (6 * 64, 2 * 64)
    offline = OfflineRun(tmp_path)
    assert {"variant": "routed"}.items() <= offline.contents("config")[0]["update"].items()
    keys = {key for step in offline.contents("history") for key in step["item"]}
    assert {"unet/held_out_error", "unet/planted_error"} <= keys
    assert any(key.startswith("samples") for key in keys)


def test_another_recipe_in_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({**TrainSpec().recipe, "seed": 1}))
    assert main(["train", f"out={tmp_path}"]) == 1
    assert "holds a training with other settings" in capsys.readouterr().err


def test_batch_depends_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(first: int, seed: int) -> list[int]:
        fit = Fit(torch.nn.Linear(1, 1), lambda rng: rng.integers(10**9), dict, name="x", steps=10, lr=0.1, seed=seed)
        monkeypatch.setattr(Fit, "global_step", first)
        return [int(batch) for batch in fit.train_dataloader()]

    monkeypatch.setattr(fit, "EPOCH", 10)
    assert batches(7, seed=1)[:3] == batches(0, seed=1)[7:]
    assert len({*batches(0, seed=1), *batches(0, seed=2)}) == 20


def test_density_is_one_for_even_and_small_for_rare_activations() -> None:
    even, rare = torch.ones(50, 4, 3), torch.zeros(50, 4, 3)
    rare[0] = 1
    assert activation_density(even) == pytest.approx(1)
    assert activation_density(rare) == pytest.approx(np.sqrt(1 / 50), rel=1e-4)


def test_tokenizer_has_a_token_for_each_word_and_spells_the_rest() -> None:
    tokenizer = build_tokenizer()
    for planted in PLANTED:
        count = len(re.findall(r"[a-z]+|[:,]", planted.text))
        assert len(tokenizer(planted.text).input_ids) == count + 2
    assert tokenizer.decode(tokenizer("Zürich 7!").input_ids, skip_special_tokens=True).replace(" ", "") == "zürich7!"
    assert tokenize(tokenizer, ["a red circle", "", "word " * 40]).shape == (3, TOKENS)


def test_shipped_model_is_small() -> None:
    sizes = {
        name: sum(f.stat().st_size for f in (PACKAGE / "model" / name).rglob("*.safetensors"))
        for name in ("pipeline", "clip")
    }
    assert sizes["pipeline"] <= 25e6
    assert sizes["clip"] <= 10e6


def test_shipped_truth_is_of_neurons_that_the_routed_model_has() -> None:
    settings = grid(["method=none", "model=planted_routed"])[0].settings
    assert settings.model.truth
    truth = read_truth(Path(resolve(settings.model.truth)))
    model = load_model(settings.model)
    owners: dict[tuple[str, int], str] = {}
    for prompt, neurons in truth.items():
        model.masks.check(neurons)
        assert 1 <= neurons.count <= 8
        for layer, ids in neurons.items():
            for index in ids:
                assert owners.setdefault((layer, index), prompt) == prompt


def test_unknown_training_settings_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "denoiser_step=3"]) == 1
    assert "Did you mean 'denoiser_steps'?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="denoiser_steps=many: expected a whole number"):
        overridden(["denoiser_steps=many"], TrainSpec)
