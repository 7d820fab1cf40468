"""Settings of similarity that do not fit a model's latents are told before it loads, with those that do."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_bench import ConfigError, Diffusion, resolve
from nemo_bench.benchmark import detect as detection
from nemo_bench.benchmark.plan import plan, similarity_of
from nemo_bench.benchmark.runner import Runner
from nemo_bench.benchmark.stages.detect import detection_stage
from nemo_bench.config import detector_grid, grid
from nemo_bench.diffusion import Source

PUBLISHED = ["model.similarity.sigma=1.5", "model.similarity.betas=[0.33,0.33,0.33]"]
BORDERLINE = "model.similarity.sigma=2.3"
"""A window of 17: mirrored within the 16 pixels of the embedded model's latents, but nothing is left inside."""


@pytest.fixture(autouse=True)
def _nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Source, "load", refuse)


@pytest.mark.parametrize("method", ["none", "nemo"])
def test_scales_that_do_not_fit_are_refused_with_those_that_do(method: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        plan(grid([f"method={method}", f"root={tmp_path}", *PUBLISHED]))
    message = str(error.value)
    assert "latents of 16x16 are too small for model.similarity: 3 scales of MS-SSIM with sigma=1.5" in message
    assert "set model.similarity.betas=[0.33,0.33] or model.similarity.sigma=0.4" in message
    plan(grid([f"method={method}", f"root={tmp_path}", PUBLISHED[0], "model.similarity.betas=[0.33,0.33]"]))
    plan(grid([f"method={method}", f"root={tmp_path}", PUBLISHED[1], "model.similarity.sigma=0.4"]))


@pytest.mark.parametrize(("measure", "fits"), [("fixed", True), ("current", True), ("published", False)])
def test_each_measure_is_checked_for_what_it_needs(measure: str, fits: bool, tmp_path: Path) -> None:
    words = [f"root={tmp_path}", BORDERLINE, f"method.similarity={measure}"]
    if fits:
        plan(grid(["method=nemo", *words]))
        return
    with pytest.raises(ConfigError, match=r"compared as 'published'.* set model\.similarity\.sigma=2\.1, which fit"):
        plan(grid(["method=nemo", *words]))
    with pytest.raises(ConfigError, match="compared as 'published'"):
        plan(grid(["method=shared", f"root={tmp_path}", BORDERLINE, "method.source.protocol=reference"]))


def test_a_detector_that_compares_is_checked_and_others_are_not(tmp_path: Path) -> None:
    words = [f"root={tmp_path}", BORDERLINE]
    detection.plan(detector_grid(["detector=magnitude,noise_difference", *words]))
    with pytest.raises(ConfigError, match="compared as 'published'"):
        detection.plan(detector_grid(["detector=noise_difference", "detector.protocol=reference", *words]))


def test_what_is_not_known_before_is_refused_once_the_model_is_there(
    tmp_path: Path, planted: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "latent_size", None)
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", lambda settings: planted)
    (cell,) = plan(grid(["method=none", f"root={tmp_path}", "trainer=cpu", *PUBLISHED]))
    with pytest.raises(ConfigError, match="latents of 16x16 are too small"):
        Runner(cell.config.settings.trainer, progress=False).model(cell)
    (detecting,) = detection.plan(detector_grid(["detector=noise_difference", f"root={tmp_path}", *PUBLISHED]))
    monkeypatch.setattr(planted, "similarity", similarity_of(detecting.config.settings.model))
    with pytest.raises(ConfigError, match="latents of 16x16 are too small"):
        detection_stage(planted, [detecting], 4)


def test_latent_size_is_that_of_the_unet_s_settings() -> None:
    (cell,) = plan(grid(["method=none"]))
    assert Source(resolve(cell.config.settings.model.source)).latent_size == (16, 16)
