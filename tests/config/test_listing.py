"""Descriptions of options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object

from cell_configs import CONF, one_cell
from nemo_bench.config import GROUPS, describe_options, grid, options
from nemo_bench.config.listing import class_text, explain_option, short
from nemo_bench.errors import ConfigError


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_is_described(group: str) -> None:
    entries = describe_options(group)
    assert [list(entry) for entry in entries] == [["group", "name", "summary", "citation"]] * len(entries)
    assert {entry["group"] for entry in entries} == {group}
    assert all(isinstance(value, str) for entry in entries for value in entry.values())
    json.dumps(entries)
    if group == "metrics":
        files = {name: one_cell(f"metrics={name}").settings.metrics for name in options(group)}
        assert [entry["name"] for entry in entries] == [f"{name}/{key}" for name, node in files.items() for key in node]
    else:
        assert [entry["name"] for entry in entries] == options(group)
    if group in ("model", "method", "detector", "prompts", "metrics"):
        assert all(entry["summary"] for entry in entries)


def test_options_of_the_user_are_described(own: Path) -> None:
    assert {"group": "method", "name": "mine", "summary": "a method of one's own", "citation": "me"} in (
        describe_options("method", own)
    )


def test_option_is_explained_by_its_file_and_its_class() -> None:
    text = explain_option("method", "nemo")
    assert "theta_min: 1.0" in text
    assert "theta_min: End of the search; never tested itself." in text
    assert "guidance: 7" in explain_option("model", "sd14")
    with pytest.raises(ConfigError, match=r"unknown model 'sd1'.*Choices"):
        explain_option("model", "sd1")


def test_metric_is_explained_by_every_file_that_has_it() -> None:
    text = explain_option("metrics", "sscd")
    head = text.split("\n")
    assert [line for line in head if line.startswith("# metrics=")] == [
        "# metrics=full",
        "# metrics=membench",
        "# metrics=similarity",
        "# metrics=wen",
    ]
    assert head[1].startswith("# SSCD disc mixup to training image: ")
    assert "_target_: nemo_bench.metrics.TrainingImage" in text
    assert "threshold: 0.15" in explain_option("metrics", "default")
    with pytest.raises(ConfigError, match=r"unknown metrics 'scsd'. Did you mean 'sscd'"):
        explain_option("metrics", "scsd")


def test_sweeps_are_listed_and_explained() -> None:
    entries = describe_options("sweeps")
    assert [entry["name"] for entry in entries] == sorted(path.stem for path in (CONF / "sweeps").glob("*.yaml"))
    assert entries[0]["summary"] == "Every method at several scales of guidance: a grid, one cell a trial."
    assert "method: bayes" in explain_option("sweeps", "theta")


def test_citations_are_shortened() -> None:
    found = {short(entry["citation"]) for entry in describe_options("method")}
    assert found >= {"Wen et al. 2024", "Ren et al. 2024", ""}
    assert short("Heusel et al. 2017") == "Heusel et al. 2017"
    assert all("@" not in short(entry["citation"]) for entry in describe_options("detector"))


def test_listing_needs_no_composition_and_no_torch() -> None:
    code = (
        "import sys, nemo_bench.config.composition as c; from nemo_bench.cli import main; done = []\n"
        "compose = c.compose; c.compose = lambda *a, **k: (done.append(1), compose(*a, **k))[1]\n"
        "for words in (['ls'], ['ls', 'method'], ['ls', 'model'], ['ls', 'sweeps']): assert main(words) == 0\n"
        "print(len(done), [m for m in ('torch', 'diffusers', 'matplotlib', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("group", ["method", "detector"])
@pytest.mark.parametrize("name", ["title", "summary", "citation"])
def test_text_read_from_source_is_the_attribute_of_the_class(group: str, name: str) -> None:
    for option in options(group):
        choice = one_cell(f"{group}={option}") if group != "method" else grid([f"method={option}"])[0]
        node = getattr(choice.settings, group)
        assert class_text(node["_target_"], name) == getattr(get_object(node["_target_"]), name)
