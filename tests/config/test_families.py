"""Settings by family of models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cell_configs import CONF, FILES, one_cell
from nemo_bench.config import (
    detector_grid,
    grid,
)
from nemo_bench.errors import ConfigError
from nemo_bench.records.schema import Strength

PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    # Jeon et al. 2025, Han et al. 2025, Asthana and Belagiannis 2026: settings of their public code.
    ("sail", "sd14"): {"target": None, "alpha": 0.05, "form": "noise"},
    ("sail", "sd20"): {"target": 5.0, "alpha": 0.01, "form": "score"},
    ("adjusted_noise", "sd14"): {"rounds": 2, "radius": 50.0, "rate": 0.7, "timestep": 900.0},
    ("adjusted_noise", "sd20"): {"rounds": 4, "radius": 30.0, "rate": 0.7, "timestep": 917.449},
    ("optimized_noise", "sd14"): {"target": 0.9, "rate": 0.01},
    ("optimized_noise", "sd21"): {"target": 10.0, "rate": 0.1},
    ("anisotropy_optimization", "sd15"): {"norm_weight": 1.0, "angle_weight": 2.0},
    ("anisotropy_optimization", "sd20"): {"norm_weight": 1.0, "angle_weight": 0.1, "angle_of": "prediction"},
    ("anisotropy_optimization", "realistic_vision"): {"norm_weight": 2.0, "angle_weight": 1.0},
}


@pytest.mark.parametrize(("method", "model"), PUBLISHED)
def test_published_settings_are_those_of_the_family(method: str, model: str) -> None:
    (choice,) = grid([f"method={method}", f"model={model}"])
    assert {key: choice.settings.method[key] for key in PUBLISHED[method, model]} == PUBLISHED[method, model]
    assert [found.known for found in choice.families] == [True]
    assert "families" not in choice.settings.method


@pytest.mark.parametrize(("model", "weights"), [("sd14", (1, 2)), ("sd20", (1, 0.1)), ("realistic_vision", (2, 1))])
def test_detectors_take_the_settings_of_a_family(model: str, weights: tuple[float, float]) -> None:
    (choice,) = detector_grid([f"model={model}", "detector=anisotropy"])
    assert (choice.settings.detector["norm_weight"], choice.settings.detector["angle_weight"]) == weights


def test_override_wins_over_the_setting_of_the_family(study: Path) -> None:
    (typed,) = grid(["method=sail", "model=sd20", "method.alpha=0.05"])
    assert (typed.settings.method["alpha"], typed.settings.method["target"]) == (0.05, 5.0)
    assert str(*typed.families) == "for sd2: target=5.0, form=score; as given: alpha=0.05"
    # In the file of an experiment as well, and though it is the default.
    (study / "experiment" / "study.yaml").write_text(
        "# @package _global_\nmethod: {rounds: 2}\ngrid: [method=adjusted_noise]\n"
    )
    (written,) = grid(["experiment=study", "model=sd20"], study)
    assert (written.settings.method["rounds"], written.settings.method["radius"]) == (2, 30.0)


def test_file_of_the_user_wins_over_settings_by_family_of_the_file_it_extends(own: Path) -> None:
    (own / "method" / "base.yaml").write_text("defaults: [sail, _self_]\ntarget: 7.0\n")
    (own / "method" / "mine.yaml").write_text("defaults: [base, _self_]\nsteps: 10\n")
    (choice,) = grid(["method=mine"], own)
    assert (choice.settings.method["target"], choice.settings.method["steps"]) == (7.0, 10)
    assert str(*choice.families) == "for planted: rate=0.1, restarts=0; as given: target=7.0, steps=10"


def test_family_without_published_settings_is_named() -> None:
    (sdxl,) = grid(["method=adjusted_noise", "model=sdxl"])
    values = "rounds=2, radius=50.0, timestep=900.0, of=noise, rate=0.7"
    assert str(*sdxl.families) == f"none published for sdxl, so the defaults: {values}"
    (unknown,) = grid(["method=wanda", "model=sdxl", "model.family=null"])
    assert str(*unknown.families).startswith("none published for a model without model.family, so the defaults: ratio")
    (sd3,) = grid(["method=guard", "model=sd3_medium"])
    assert str(*sd3.families) == "none published for sd3, so the defaults"
    (own,) = grid(["method=wanda", "model=sdxl", "method.ratio=0.5", "method.agreement=0.1"])
    assert str(*own.families) == "none published for sdxl, so the defaults; as given: ratio=0.5, agreement=0.1"
    assert one_cell("model=sdxl").families == ()


@pytest.mark.parametrize(("group", "name"), [file for file in FILES if file[0] in ("method", "detector")])
def test_settings_of_every_family_build(group: str, name: str) -> None:
    """A method's at each of its strengths, among which is what it has without them."""
    content = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    families = content.get("families", {})
    known = {yaml.safe_load(file.read_text(encoding="utf-8"))["family"] for file in (CONF / "model").glob("*.yaml")}
    assert set(families) <= known
    words = ["strengths=true"] if group == "method" else ["method=none"]
    for family in families or ["planted"]:
        cells = grid([f"{group}={name}", f"model.family={family}", *words])
        if group == "detector":
            continue
        own = {**content, **families.get(family, {})}
        if own["strengths"] is None:  # which says why behind it
            assert [cell.strength for cell in cells] == [None]
            continue
        ((setting, values),) = own["strengths"].items()
        assert [cell.settings.method[setting] for cell in cells] == values
        assert len(values) == 3
        assert own.get(setting, 0.0) in values
        assert all(cell.strength == Strength(setting=setting, values=values) for cell in cells)


def test_a_setting_that_is_given_is_the_only_strength() -> None:
    methods = "method=embedding_noise,nemo,random"
    cells = grid([methods, "strengths=true", "method.scale=0.7"])
    assert [(c.names["method"], c.settings.method.get("scale", c.settings.method.get("factor"))) for c in cells] == [
        ("embedding_noise", 0.7), ("nemo", 0.5), ("nemo", 0.0), ("nemo", -0.5), ("random", 0.0),
    ]  # fmt: skip
    assert [bool(cell.strength) for cell in cells] == [False, True, True, True, False]
    assert [cell.strength for cell in grid([methods])] == [None] * 3
    assert "strengths" not in cells[-1].settings.method["source"]


def test_strengths_that_no_method_has_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    grid(["method=none,nemo", "strengths=true"])
    assert not caplog.records
    grid(["method=none,random", "strengths=true"])
    (record,) = caplog.records
    assert "strengths=true changes nothing: of method=none, random none has strengths" in record.getMessage()


def test_a_setting_of_a_file_that_begins_with_another_is_the_only_strength(own: Path) -> None:
    (own / "method" / "mild.yaml").write_text("defaults: [nemo, _self_]\nfactor: 0.7\n")
    (own / "method" / "same.yaml").write_text("defaults: [nemo, _self_]\ntheta: 4\n")
    found = [(c.settings.method["factor"], bool(c.strength)) for c in grid(["method=mild,same", "strengths=true"], own)]
    assert found == [(0.7, False), (0.5, True), (0.0, True), (-0.5, True)]


def test_what_is_said_of_the_family_is_true_at_every_strength() -> None:
    mild, own, _ = grid(["method=embedding_noise", "strengths=true"])
    assert str(*mild.families) == "for planted: the defaults; strength: scale=1.6"
    assert own == replace(grid(["method=embedding_noise"])[0], settings=own.settings, strength=own.strength)


@pytest.mark.parametrize(
    ("strengths", "message"),
    [("3", "expected a setting and several values"), ("{strength: [1]}", "several values from mild to strong"),
     ("{strength: [1, 1]}", "several values"), ("{strength: [1, 2], words: [3, 4]}", "expected a setting"),
     ("{strenght: [1, 2]}", "no setting 'strenght'. Did you mean 'strength'"),
     ("{strength: [1, much]}", "method.strength=much: expected a number")],
)  # fmt: skip
def test_errors_name_mistakes_in_strengths(own: Path, strengths: str, message: str) -> None:
    (own / "method" / "mine.yaml").write_text(
        f"_target_: mine_of_test_config.Mine\nstrength: 1.5\nstrengths: {strengths}\n"
    )
    with pytest.raises(ConfigError, match=message):
        grid(["method=mine", "strengths=true"], own)


@pytest.mark.parametrize(
    ("families", "message"),
    [("{sd1: 3}", "expected settings by family"), ("[sd1]", "expected settings by family"),
     ("{sd9: {strenght: 2}}", "no setting 'strenght' beside it. Did you mean 'strength'"),
     ("{planted: {strength: much}}", "method.strength=much: expected a number")],
)  # fmt: skip
def test_errors_name_mistakes_in_settings_by_family(own: Path, families: str, message: str) -> None:
    (own / "method" / "mine.yaml").write_text(
        f"_target_: mine_of_test_config.Mine\nstrength: 1.5\nfamilies: {families}\n"
    )
    with pytest.raises(ConfigError, match=message):
        grid(["method=mine"], own)
