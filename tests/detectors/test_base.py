"""Settings of detectors that are errors."""

from __future__ import annotations

import math
from typing import Any

import pytest

from detector_views import PROMPT
from nemo_bench import ConfigError, ModelError
from nemo_bench.detectors import (
    Anisotropy,
    BrightEnding,
    Detector,
    LayerEntropy,
    Magnitude,
    NoiseDifference,
    OneStep,
    Sharpness,
    TiledL2,
    watch,
)
from nemo_bench.diffusion import Diffusion


@pytest.mark.parametrize(
    ("detector", "error", "named"),
    [
        (
            LayerEntropy(layer=16),
            ModelError,
            r"detector\.layer=16: this model has cross-attention layers 0 to 15; give",
        ),
        (TiledL2(tiles=3), ConfigError, r"detector\.tiles=3 does not divide images of 32x32 pixels"),
    ],
)
def test_settings_unsuitable_for_the_model_are_errors_before_any_pass(
    tiny: Diffusion, detector: Detector, error: type[Exception], named: str
) -> None:
    passes = tiny.row_passes
    with pytest.raises(error, match=named):
        watch(tiny, {"magnitude": Magnitude(), "it": detector}, [PROMPT])
    assert tiny.row_passes == passes


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: NoiseDifference(seeds=1), "NoiseDifference: seeds=1; expected greater than or equal to 2"),
        (lambda: TiledL2(seeds=1), "TiledL2: seeds=1; expected greater than or equal to 2"),
        (lambda: TiledL2(tiles=0), "TiledL2: tiles=0; expected greater than or equal to 1"),
        (lambda: Magnitude(seeds=0), "Magnitude: seeds=0; expected greater than or equal to 1"),
        (lambda: Magnitude(steps=0), "Magnitude: steps=0; expected greater than or equal to 1"),
        (lambda: Sharpness(eta=0), "Sharpness: eta=0; expected greater than 0"),
        (lambda: Sharpness(eta=math.inf), "Sharpness: eta=inf; expected a finite number"),
        (lambda: LayerEntropy(layer=-1), "LayerEntropy: layer=-1; expected greater than or equal to 0"),
        (lambda: Anisotropy(norm_weight=math.nan), "Anisotropy: norm_weight=nan; expected a finite number"),
        (lambda: Anisotropy(angle_weight=math.inf), "Anisotropy: angle_weight=inf; expected a finite number"),
        (lambda: OneStep(guidance=math.inf), "OneStep: guidance=inf; expected a finite number"),
        (lambda: BrightEnding(steps=0), "BrightEnding: steps=0; expected greater than or equal to 1"),
    ],
)
def test_setting_out_of_range_is_an_error(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()
