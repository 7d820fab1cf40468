"""Schedulers that can't serve are refused before weights load, those that can are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from nemo_bench import Diffusion
from nemo_bench.benchmark.plan import plan
from nemo_bench.cli import main
from nemo_bench.config import grid
from nemo_bench.diffusion import check_schedule
from nemo_bench.diffusion.schedule import ddim
from nemo_bench.errors import ModelError
from tiny import NOISE, tiny_pipeline, tiny_texts

ZERO: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

WITHOUT_BETAS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
WITH_BETAS = (
    "PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip


def shipped(**changes: Any) -> dict[str, Any]:
    return {**NOISE, "_class_name": "DDIMScheduler", "prediction_type": "epsilon", **changes}


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        (ZERO, 50, r"timestep 999 latents are noise alone \(zero terminal SNR\).*set rescale_betas_zero_snr=false"),
        ({**ZERO, "timestep_spacing": "linspace"}, 20, "timestep 999 latents are noise alone"),
        ({"prediction_type": "sample"}, 50, "prediction_type=sample is not supported"),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True}, 50, "no noise schedule of betas"),
        ({"beta_schedule": "unheard of"}, 50, "schedule can't be used"),
        ({}, 1000, r"index 1000 is out of bounds.*model\.steps=1000"),
        ({}, 1001, "cannot be larger"),
        ({"trained_betas": [0.1] * 999 + [float("nan")]}, 50, "no finite schedule"),
    ],
)
def test_a_schedule_that_can_not_serve_is_refused(changes: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_schedule(shipped(**changes), steps, predicts=False, where="it")


@pytest.mark.parametrize("name", WITHOUT_BETAS)
def test_schedulers_without_betas_are_refused(name: str) -> None:
    config = {**getattr(diffusers, name)().config, "_class_name": name}
    with pytest.raises(ModelError, match=f"{name} has no noise schedule of betas"):
        check_schedule(config, 50, predicts=False, where="it")


@pytest.mark.parametrize("name", WITH_BETAS)
def test_samplers_of_a_schedule_of_betas_serve(name: str) -> None:
    check_schedule({**getattr(diffusers, name)().config, "_class_name": name}, 50, predicts=True, where="it")


def test_a_velocity_gives_images_but_no_noise_where_latents_are_pure_noise() -> None:
    velocity = shipped(**ZERO, prediction_type="v_prediction")
    check_schedule(velocity, 50, predicts=False, where="it")
    with pytest.raises(ModelError, match="from which no noise follows"):
        check_schedule(velocity, 50, predicts=True, where="it")
    check_schedule({**velocity, "timestep_spacing": "leading"}, 50, predicts=True, where="it")


def test_a_refused_schedule_would_make_no_image() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **ZERO)
    _, failed = Diffusion(pipeline, steps=4, guidance=3.0).generate_checked(tiny_texts(1)[0], [0])
    assert failed == ("latents are not finite after step 1 of 4, in float32",)


def test_a_folder_with_such_a_scheduler_is_refused_before_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **ZERO}))
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", None)
    words = [f"model.source={tmp_path / 'model'}", "method=none", f"root={tmp_path / 'results'}", "trainer=cpu"]
    assert main(["run", *words]) == 1
    assert "latents are noise alone" in capsys.readouterr().err
    assert main(["detect", *words[:1], *words[2:], "detector=magnitude"]) == 1
    assert not (tmp_path / "results").exists()
    path.write_text(json.dumps({**json.loads(path.read_text()), "timestep_spacing": "leading"}))
    assert len(plan(grid(words))) == 1


SHIPPED = {
    "the PNDM of 1.4": PNDMScheduler(**NOISE, set_alpha_to_one=False, skip_prk_steps=True),
    "the DDIM of 2.1": DDIMScheduler(
        **NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
    ),
    "the Euler of SDXL": EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
    "one that says little": DDIMScheduler(**{key: value for key, value in NOISE.items() if key != "steps_offset"}),
}


@pytest.mark.parametrize("name", [*SHIPPED])
def test_any_shipped_scheduler_becomes_stable_diffusions_ddim(name: str) -> None:
    shipped = SHIPPED[name]
    scheduler = ddim(shipped.config)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[[0, 1, -1]].tolist() == [981, 961, 1]
    assert scheduler.config.prediction_type == shipped.config.prediction_type
    assert not scheduler.config.clip_sample
    assert not scheduler.config.set_alpha_to_one
    torch.testing.assert_close(scheduler.alphas_cumprod, shipped.alphas_cumprod)


def test_settings_of_a_shipped_scheduler_survive() -> None:
    shipped = DDIMScheduler(**{**NOISE, "beta_end": 0.02}, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    scheduler = ddim(shipped.config)
    scheduler.set_timesteps(50)
    assert int(scheduler.timesteps[0]) == 999
    torch.testing.assert_close(scheduler.alphas_cumprod, shipped.alphas_cumprod)
