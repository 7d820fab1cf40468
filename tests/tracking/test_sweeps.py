"""Sweep files: what W&B's agent makes of them is a command of ours, for every combination."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from nemo_bench.config import grid
from nemo_bench.records.results import load_results
from nemo_bench.tracking import sweep_trial
from nemo_bench.tracking.logged import ALIGNMENT_LOSS, logged_cells

FOLDER = Path(__file__).parents[2] / "conf" / "sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))


def load(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def values(parameter: dict[str, Any]) -> list[Any]:
    if "values" in parameter:
        return parameter["values"]
    low, high = parameter["min"], parameter["max"]
    return [low, (2 * low + high) / 3, high]


def commands(sweep: dict[str, Any]) -> Iterator[list[str]]:
    """What an agent would start, word by word, for every combination; ends of the range of a continuous parameter."""
    names = list(sweep["parameters"])
    for combination in itertools.product(*(values(sweep["parameters"][name]) for name in names)):
        given = {name: {"value": value} for name, value in zip(names, combination, strict=True)}
        macros = {**create_sweep_command_args({"args": given}), "env": ["/usr/bin/env"]}
        words = create_sweep_command(list(sweep["command"]))
        yield [w for word in words for w in (macros[word[2:-1]] if str(word).startswith("${") else [word])]


def test_there_are_sweeps() -> None:
    assert len(FILES) >= 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_combination_composes_to_one_trial(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "trial456")
    trials = []
    for env, program, command, *overrides in commands(load(file)):
        assert (env, program, command) == ("/usr/bin/env", "nemo-bench", "run")
        choices = {str(number): choice for number, choice in enumerate(grid(overrides))}
        trial = sweep_trial({number: choice.names["method"] for number, choice in choices.items()})
        assert trial is not None
        settings = choices[trial].settings
        assert settings.logger.wandb
        assert settings.name == "sweep-sweep123"
        trials.append(settings)
    assert all(a != b for a, b in itertools.combinations(trials, 2))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_metric_is_in_the_summary_and_points_the_right_way(file: Path, finished: Path) -> None:
    metric = load(file)["metric"]
    (cell,) = (cell for cell in logged_cells(load_results(finished)) if cell.results.method == "nemo")
    assert metric["name"] in cell.means
    better = cell.results.summary.metrics[metric["name"].split("/")[1]].higher_is_better
    assert metric["goal"] == ("maximize" if better else "minimize")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sweep_has_what_wandb_asks_for(file: Path) -> None:
    sweep = load(file)
    assert set(sweep) <= {"name", "project", "method", "metric", "parameters", "command", "run_cap"}
    assert sweep["method"] in ("grid", "random", "bayes")
    kinds = {"values"} if sweep["method"] == "grid" else {"values", "min"}
    assert all(kinds & set(parameter) for parameter in sweep["parameters"].values())


def test_metric_of_sweeps_exists_without_kinds_and_is_bounded_by_alignment(finished: Path) -> None:
    cells = {cell.results.method: cell for cell in logged_cells(load_results(finished))}
    nemo, none = cells["nemo"], cells["none"].results
    ssim = {name: nemo.results.outcomes[name].values("ssim") for name in ("vm-01", "tm-26")}
    mean = fmean(fmean(values) for values in ssim.values())
    own, before = (fmean(cell.prompt_means("alignment", ["all"]).values()) for cell in (nemo.results, none))
    excess = before - own - ALIGNMENT_LOSS
    assert nemo.means["bounded/ssim/mean"] == pytest.approx(mean + (1 + excess if excess > 0 else 0))
    # Within the bound nothing is added: a cell is no worse than itself.
    alone = replace(nemo, unmitigated=nemo.results)
    assert alone.means["bounded/ssim/mean"] == pytest.approx(mean)
    unkinded = [p._replace(kind="memorized" if p.kind else None) for p in nemo.results.prompts]
    without_kinds = replace(alone, results=replace(nemo.results, prompts=unkinded))
    assert without_kinds.means["bounded/ssim/mean"] == pytest.approx(mean)
    far = {
        name: replace(o, scores={**o.scores, **{seed: {**o.scores[seed], "alignment": 9.0} for seed in o.images}})
        for name, o in none.outcomes.items()
    }
    bound = replace(nemo, unmitigated=replace(none, outcomes=far))
    assert bound.means["bounded/ssim/mean"] == pytest.approx(mean + 1 + 9 - own - ALIGNMENT_LOSS)
