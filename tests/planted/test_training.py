from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from nemo_bench import Diffusion, resolve
from nemo_bench.cli import main
from nemo_bench.config import overridden
from nemo_bench.errors import ConfigError
from nemo_bench.planted import training
from nemo_bench.planted.training import TOKENS, Fit, TrainSpec, activation_density, build_tokenizer, tokenize, train
from nemo_bench.planted.world import PLANTED

PACKAGE = Path(resolve("package:planted"))


def test_interrupted_training_resumes_and_gives_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "EPOCH", 2)
    monkeypatch.setattr(training, "TEMPLATE_VARIANTS", 2)
    steps = {"text_steps": 2, "clip_steps": 2, "vae_steps": 2}
    common = {"pictures": 24, "batch_size": 8, "accelerator": "cpu", **steps}
    straight = TrainSpec(out=tmp_path / "straight", unet_steps=4, **common)  # type: ignore[arg-type]
    train(straight)

    original = training.denoiser_loss
    calls = []

    def stop(*args: Any) -> dict[str, torch.Tensor]:
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return original(*args)

    monkeypatch.setattr(training, "denoiser_loss", stop)
    broken = TrainSpec(out=tmp_path / "broken", unet_steps=4, **common)  # type: ignore[arg-type]
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


def test_batch_depends_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(first: int, seed: int) -> list[int]:
        fit = Fit(torch.nn.Linear(1, 1), lambda rng: rng.integers(10**9), dict, steps=10, lr=0.1, seed=seed)
        monkeypatch.setattr(Fit, "global_step", first)
        return [int(batch) for batch in fit.train_dataloader()]

    monkeypatch.setattr(training, "EPOCH", 10)
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


def test_unknown_training_settings_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "unet_step=3"]) == 1
    assert "Did you mean 'unet_steps'?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unet_steps=many: expected a whole number"):
        overridden(["unet_steps=many"], TrainSpec)
