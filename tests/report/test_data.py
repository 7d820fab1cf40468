"""Reading a results folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_results import LAYERS, METHODS, METRICS, PROMPTS, SEEDS, write_fake_results
from nemo_bench.errors import StoreError
from nemo_bench.report import load_results
from nemo_bench.report.data import network_order, short_layers


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_fake_results(tmp_path / "default")


def _cells(run: Path) -> list[Path]:
    return [run / name for name in json.loads((run / "run.json").read_text())["cells"]]


def test_a_run_is_read_whole(run: Path) -> None:
    results = load_results(run)
    assert results.name == "default"
    assert [cell.label for cell in results.cells] == list(METHODS.values())
    assert results.groups == ["VM", "TM", "general", "all"]
    assert list(results.metrics) == list(METRICS)
    for cell in results.cells:
        assert [prompt.id for prompt in cell.prompts] == [prompt for prompt, _, _ in PROMPTS]
        for prompt in cell.prompts:
            outcome = cell.outcomes[prompt.id]
            assert [image.seed for image in outcome.images] == list(range(SEEDS))
            assert all(image.path.is_file() for image in outcome.images)
            assert outcome.noise
            assert outcome.noise.is_file()
            assert len(outcome.values("ssim")) == (SEEDS if prompt.kind else 0)
            assert outcome.values("neurons") == [outcome.neurons.count]
    none, _, nemo = results.cells
    assert not any(outcome.neurons for outcome in none.outcomes.values())
    assert nemo.outcomes["vm-01"].neurons


def test_prompt_means_agree_with_the_aggregates(run: Path) -> None:
    for cell in load_results(run).cells:
        for group in ("VM", "TM"):
            for metric in METRICS:
                means = list(cell.prompt_means(metric, [group]).values())
                assert sum(means) / len(means) == pytest.approx(cell.aggregates[group][metric].mean)
        assert cell.prompt_means("ssim", ["general"]) == {}


def test_cells_that_differ_in_model_or_settings_get_labels_that_say_so(tmp_path: Path) -> None:
    results = load_results(write_fake_results(tmp_path / "two", ["planted", "sd14"]))
    assert results.cells[0].label == "No mitigation · planted"
    assert results.cells[5].label == "NeMo · sd14"

    run = write_fake_results(tmp_path / "sweep")
    for cell, title, theta in zip(_cells(run), ("NeMo", "NeMo", "Other"), (0.1, 0.2, 0.2), strict=True):
        spec = json.loads((cell / "spec.json").read_text())
        settings = {"steps": 20, "method": {"theta_min": theta}}
        (cell / "spec.json").write_text(json.dumps({**spec, "title": title, "settings": settings}))
    assert [cell.label for cell in load_results(run).cells] == ["NeMo · theta_min 0.1", "NeMo · theta_min 0.2", "Other"]


def test_records_are_the_union_of_files_without_a_torn_last_line(run: Path) -> None:
    before = load_results(run)
    folder = _cells(run)[2] / "records"
    lines = (folder / "score.0.jsonl").read_text().splitlines(keepends=True)
    (folder / "score.0.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    (folder / "score.1.jsonl").write_text("".join(lines[5:]))
    assert load_results(run) == before


def test_a_folder_without_a_run_names_the_runs_inside(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no run\.json.*Runs found inside: default"):
        load_results(run.parent)
    with pytest.raises(StoreError, match="nemo-bench run"):
        load_results(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("removed", "why"),
    [
        ("score.done", "score not finished"),
        ("generate.done", "generate not finished"),
        ("metrics.json", "not scored"),
        ("spec.json", "not started"),
    ],
)
def test_an_unfinished_cell_is_listed_and_the_others_read(run: Path, removed: str, why: str) -> None:
    cell = _cells(run)[1]
    (cell / removed).unlink()
    results = load_results(run)
    assert results.unfinished == {cell.name: why}
    assert [c.method for c in results.cells] == ["none", "nemo"]


def test_a_run_without_a_finished_cell_is_an_error(run: Path) -> None:
    for cell in _cells(run):
        (cell / "score.done").unlink()
    with pytest.raises(StoreError, match=r"no cell of the run is finished .*score not finished"):
        load_results(run)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("spec.json", '{"schema": 1}', "KeyError: 'title'"),
        ("metrics.json", '{"schema": 2}', "expected an object of schema 1"),
        ("env.json", "{", "no JSON"),
        ("prompts.jsonl", "{", "does not hold"),
    ],
)
def test_a_file_that_does_not_hold_what_it_should_is_named(run: Path, file: str, text: str, words: str) -> None:
    cell = _cells(run)[0]
    (cell / file).write_text(text)
    with pytest.raises(StoreError, match=words) as error:
        load_results(run)
    assert cell.name in str(error.value)


def test_layers_come_in_network_order(run: Path) -> None:
    assert network_order(reversed(LAYERS)) == list(LAYERS)
    assert load_results(run).cells[2].layers == list(LAYERS)


def test_layers_have_short_names() -> None:
    assert list(short_layers(LAYERS).values()) == ["down.0.0", "down.0.1", "down.1.0", "down.1.1", "mid.0", "up.0.0"]
    block = "down_blocks.1.attentions.0.transformer_blocks.{}.attn2.to_v"
    assert list(short_layers([block.format(0), block.format(1), "odd"]).values()) == ["down.1.0.0", "down.1.0.1", "odd"]
