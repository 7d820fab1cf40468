from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from nemo_bench import Diffusion, read_prompts, resolve
from nemo_bench.cli import main
from nemo_bench.config import overridden
from nemo_bench.errors import ConfigError
from nemo_bench.planted import training
from nemo_bench.planted.training import Stage, Steps, TrainSpec, activation_density, train, write_prompts

PACKAGE = Path(resolve("package:planted"))


def test_training_makes_a_model_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "EPOCH", 2)
    monkeypatch.setattr(training.Data, "TEMPLATE_VARIANTS", 2)
    steps = {"text_steps": 2, "clip_steps": 2, "vae_steps": 2}
    common = {"pictures": 24, "batch_size": 8, "accelerator": "cpu", **steps}
    straight = TrainSpec(out=tmp_path / "straight", unet_steps=4, **common)  # type: ignore[arg-type]
    train(straight)

    original = training.DenoiserStage.training_step

    def stop(self: training.DenoiserStage, *args: object) -> object:
        if self.global_step == 3:
            raise RuntimeError("power cut")
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(training.DenoiserStage, "training_step", stop)
    broken = TrainSpec(out=tmp_path / "broken", unet_steps=4, **common)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken)
    monkeypatch.setattr(training.DenoiserStage, "training_step", original)
    train(broken)

    models = [Diffusion.load(str(s.out / "model" / "pipeline"), steps=2) for s in (straight, broken)]
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, atol=2e-3, rtol=2e-3)
    assert len(models[0].value_layers) == 7
    judge = open_clip.create_model(f"local-dir:{broken.out / 'model' / 'clip'}", require_pretrained=True)
    assert judge.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 64)


def test_batches_depend_on_seed_and_number_alone() -> None:
    first = Steps(lambda rng: rng.integers(10**9), 0, 10, seed=1)
    later = Steps(lambda rng: rng.integers(10**9), 7, 3, seed=1)
    assert [later[i] for i in range(3)] == [first[i] for i in range(7, 10)]
    assert len({first[i] for i in range(10)}) == 10


def test_density_is_one_for_even_and_small_for_rare_activations() -> None:
    even, rare = torch.ones(50, 4, 3), torch.zeros(50, 4, 3)
    rare[0] = 1
    assert activation_density(even) == pytest.approx(1)
    assert activation_density(rare) == pytest.approx(np.sqrt(1 / 50), rel=1e-4)


def test_shipped_prompts_and_references_are_those_of_the_world(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    for folder in ("prompts", "references", "controls"):
        names = sorted(p.name for p in (tmp_path / folder).iterdir())
        assert names == sorted(p.name for p in (PACKAGE / folder).iterdir())
        _, different, odd = filecmp.cmpfiles(tmp_path / folder, PACKAGE / folder, names, shallow=False)
        if folder == "prompts":
            assert (different, odd) == ([], [])
    assert len(read_prompts(PACKAGE / "prompts" / "planted.jsonl")) == 26


def test_the_shipped_model_is_small() -> None:
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
