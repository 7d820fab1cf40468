"""Arguments, cards and checks of all methods."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest

from nemo_bench import Calibration, ConfigError, Diffusion, Method, ModelError, NeMo, methods
from nemo_bench.benchmark.plan import plan
from nemo_bench.config import build, grid, options
from nemo_bench.localization import LAST_K

OUT_OF_RANGE: dict[str, dict[str, Sequence[float]]] = {
    "AMG": {"threshold": [2.0], "saturation": [0.0], "strength": [-1.0], "captions": [0]},
    "AdjustedNoise": {"rounds": [-1], "radius": [-1.0], "rate": [math.inf], "timestep": [1001.0]},
    "AnisotropyOptimization": {"steps": [-1]},
    "AttentionAttenuation": {"threshold": [math.nan], "factor": [-0.1]},
    "AttentionRescaling": {"factor": [0.0, math.inf]},
    "BrightEndingOptimization": {"rate": [0.0]},
    "DimensionOptimization": {"steps": [-1], "step": [50, -1], "target": [-math.inf]},
    "DynamicTransition": {"before": [math.inf]},
    "EmbeddingNoise": {"scale": [-0.1]},
    "EmbeddingOptimization": {"steps": [-1], "rate": [0.0], "images": [0], "target": [-math.inf]},
    "GUARD": {"threshold": [math.inf], "repulsion": [-1.0]},
    "NeMo": {
        "theta_step": [0.0],
        "theta_min": [-1.0],
        "threshold": [1.5],
        "refine_threshold": [-2.0],
        "gate_threshold": [1.1],
        "relative": [0.0],
        "initial_k": [LAST_K],
        "guidance": [0.0],
    },
    "OptimizedNoise": {"target": [-1.0], "steps": [-1], "rate": [0.0]},
    "PRSS": {"search_target": [-1.0], "anchor_from": [-1.0], "anchor_full": [math.inf]},
    "PaddingFix": {"share": [1.1]},
    "RandomNumbers": {"times": [-1]},
    "RandomTokens": {"times": [-1]},
    "RepeatedWords": {"times": [-1]},
    "SAIL": {"alpha": [-1.0], "candidates": [0], "steps": [0], "rate": [0.0], "restarts": [-1]},
    "StaticTransition": {"timestep": [1001, -1], "before": [math.nan]},
    "AdversarialFineTuning": {
        "epochs": [0],
        "rate": [0.0],
        "batch": [0],
        "ratio": [1.5],
        "agreement": [1.0],
        "steps": [0],
    },
    "Unlearning": {"forgetting": [1.5], "scaling_norm": [0.0], "updates": [-1], "batch": [0]},
    "UpdateNorms": {"limit": [0], "flag": [0.0], "strong": [-1.0], "early": [1.1], "band": [-0.1]},
    "Wanda": {"ratio": [1.5], "calls": [0], "agreement": [1.0], "seed": [-1]},
}
SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(kind, name, value) for kind, ranges in OUT_OF_RANGE.items() for name, wrong in ranges.items() for value in wrong],
)
def test_argument_out_of_range_is_named(kind: str, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{kind}: {name}={value}; expected ")):
        getattr(methods, kind)(**{name: value})


@pytest.mark.parametrize("name", options("method"))
def test_method_has_a_complete_card(name: str) -> None:
    method = build(grid([f"method={name}"])[0].settings.method, "method")
    assert all((method.title, method.summary, method.touches, method.sourcing))
    assert method.citation or method.sourcing in ("a control", "depends on the file")
    assert method.localizes == (type(method).localize is not Method.localize)


def test_setup_gives_calibration_and_batch_size(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    method = NeMo()
    method.setup(tiny, methods.Setup(calibration=tiny_calibration, batch_size=8))
    assert (method.calibration, method.batch_size) == (tiny_calibration, 8)


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (methods.StaticTransition(), {"guidance": 1.0}, r"changes guidance, given model\.guidance=1; give .* above 1"),
        (
            methods.EmbeddingOptimization(),
            {"dtype": "float16"},
            r"in float16; generate with model\.dtype=bfloat16",
        ),
        (methods.AttentionRescaling(), {"compiled": True}, r"once it is compiled; set model\.compiled=false"),
        (
            methods.BrightEndingOptimization(),
            {"family": XL},
            rf"made for {SD} \(.*end token of CLIP\), given a {XL}; leave this method out",
        ),
        (methods.PRSS(bright_ending=True), {"family": XL}, rf"made for {SD} \(.*\), given a {XL}"),
        (methods.PRSS(), {"dtype": "float16"}, "vanish in float16"),
    ],
)
def test_unsuitable_model_is_an_error(method: Method, model: dict[str, Any], message: str) -> None:
    suitable = {"family": SD, "guidance": 7.0, "dtype": "float32", "compiled": False}
    method.check(**suitable)
    with pytest.raises(ModelError, match=message):
        method.check(**{**suitable, **model})


def test_compiled_network_suits_rules_of_guidance() -> None:
    methods.DynamicTransition().check(SD, 7.0, "float32", compiled=True)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["method=static_transition", "model.guidance=1"], "or leave this method out"),
        (["method=sail", "model.dtype=float16"], "generate with model.dtype=bfloat16 or float32"),
    ],
)
def test_run_checks_the_model_before_weights_load(
    monkeypatch: pytest.MonkeyPatch, words: list[str], advice: str
) -> None:
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", None)
    with pytest.raises(ModelError, match=advice):
        plan(grid(words))
