"""The presets on the embedded model, few prompts and steps: their cells run, to the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_bench import read_scores, run
from nemo_bench.benchmark.dry_run import forecast
from nemo_bench.config import grid, options
from small_runs import small

PRESETS = ("membench", "nemo_table", "wen_detection")
ON_PLANTED = ["model=planted", "model.guidance=3", "prompts=planted", "metrics=default"]
METHODS = {
    "membench": ["nemo", "none", "random", "random_shared", "shared"],
    "nemo_table": ["nemo", "nemo", "none", "random", "random_shared", "shared"],
    "wen_detection": ["none"],
}


@pytest.mark.parametrize("name", PRESETS)
def test_it_runs_on_the_embedded_model(name: str, tmp_path: Path, prompt_file: Path) -> None:
    words = [f"experiment={name}", *ON_PLANTED, *small(), f"prompts.files=[{prompt_file}]", f"root={tmp_path}"]
    folder = run(*words)
    assert folder == tmp_path / name
    rows = read_scores(folder)
    cells = {row["cell"]: row["method"] for row in rows}
    assert sorted(cells.values()) == METHODS[name]
    assert {row["prompt"] for row in rows} == {"vm-01", "tm-26", "general-01"}
    assert (folder / "report.html").is_file()


def cells_of(name: str, *words: str) -> list[tuple[str, str, int]]:
    choices = grid([f"experiment={name}", *words])
    return [(c.names["prompts"], c.names["method"], c.settings.seeds) for c in choices]


def test_quality_is_that_of_general_captions_for_which_no_neurons_are_searched() -> None:
    """As in the authors' scripts: COCO with the neurons of memorized prompts that many share, and with random ones."""
    assert cells_of("nemo_table") == [
        *(("nemo", method, 10) for method in ("none", "random", "nemo", "nemo")),
        *(("coco", method, 1) for method in ("none", "random_shared", "shared")),
    ]
    for name, prompts in (("nemo_table", "memorized_laion_prompts"), ("membench", "SD1_final")):
        general = [c for c in grid([f"experiment={name}"]) if c.names["prompts"] == "coco"]
        assert {c.names["method"] for c in general} == {"none", "random_shared", "shared"}
        assert all(c.settings.prompts.shared_from == [f"data/{prompts}.csv"] for c in general)
    settings = grid(["experiment=membench"])[0].settings
    assert settings.prompts.memorized == settings.prompts.files


@pytest.mark.parametrize("words", [["prompts.files=mine.csv"], ["prompts=planted"]])
def test_other_prompts_are_taken_once(words: list[str]) -> None:
    (name,) = {prompts for prompts, _, _ in cells_of("membench", *words)}
    assert name in ("mine", "planted")
    assert len(cells_of("membench", *words)) == 5


@pytest.mark.parametrize("name", [name for name in options("experiment") if name.startswith("sensitivity")])
def test_a_study_is_counted_on_the_embedded_model(name: str, tmp_path: Path) -> None:
    expected = forecast(grid([f"experiment={name}", "prompts.limit=1", f"root={tmp_path}"]))
    assert expected["uncounted"] == 0
    assert {need["state"] for need in expected["needs"]} == {"there"}
    passes = [row["passes"] for row in expected["cells"]]
    assert all(each["localize"] + each["memorization"] > 0 for each in passes)
    assert any(each["localize"] > 0 for each in passes)


@pytest.mark.parametrize("name", PRESETS)
def test_it_says_where_the_files_are_that_it_needs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = forecast(grid([f"experiment={name}", "model.local_files_only=true"]))
    missing = {need["what"]: need["note"] for need in expected["needs"] if need["state"] == "missing"}
    lists = [what for what in missing if what.startswith("data/")]
    assert lists
    assert all("https://github.com/" in missing[what] for what in lists)
    assert "CompVis/stable-diffusion-v1-4" in missing
    assert expected["cells"] == []
