"""Reading a results folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_results import LAYERS, METHODS, METRICS, PROMPTS, SEEDS, change_file, write_fake_results
from nemo_bench.errors import StoreError
from nemo_bench.records.io import as_json, digest
from nemo_bench.records.results import load_results, network_order, short_layers
from nemo_bench.records.schema import Spec
from nemo_bench.records.store import read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_fake_results(tmp_path / "default")


def _cells(run: Path) -> list[Path]:
    return [run / name for name in read_run(run).cells]


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
            assert list(outcome.images) == list(range(SEEDS))
            assert all(path.is_file() for path in outcome.images.values())
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
            for metric in set(METRICS) - {"fid"}:
                means = list(cell.prompt_means(metric, [group]).values())
                assert sum(means) / len(means) == pytest.approx(cell.summary.aggregates[group][metric].mean)
        assert cell.prompt_means("ssim", ["general"]) == {}


def test_cells_that_differ_in_model_or_settings_get_labels_that_say_so(tmp_path: Path) -> None:
    results = load_results(write_fake_results(tmp_path / "two", ["planted", "sd14"]))
    assert results.cells[0].label == "No mitigation · planted"
    assert results.cells[5].label == "NeMo · sd14"


def _label(run: Path, titles: list[str], settings: list[dict[str, object]]) -> list[str]:
    for cell, title, own in zip(_cells(run), titles, settings, strict=True):
        settings_of_cell = {"seeds": SEEDS, **own}
        change_file(cell / "spec.json", Spec, title=title, method=title.lower(), settings=settings_of_cell)
    return [cell.label for cell in load_results(run).cells]


def test_labels_say_only_what_differs(tmp_path: Path) -> None:
    def settings(calibration: str, **method: object) -> dict[str, object]:
        return {"steps": 20, "calibration": calibration, "method": method}

    run = write_fake_results(tmp_path / "sweep", methods={f"m{i}": "NeMo" for i in range(4)})
    sweep = [settings(f"c{i}", theta=theta) for i, theta in enumerate((0.1, 0.2, None))]
    titles = ["NeMo", "NeMo", "NeMo", "Other"]
    labels = _label(run, titles, [*sweep, settings("c0")])
    assert labels == ["NeMo · theta 0.1", "NeMo · theta 0.2", "NeMo", "Other"]

    parts = [settings("c", outliers=True, top_k=True, of="all"), settings("c", outliers=False, top_k=True, of="all")]
    parts += [settings("c", outliers=True, top_k=False, of="all"), settings("c", outliers=True, top_k=True, of="layer")]
    labels = _label(run, ["NeMo"] * 4, parts)
    assert labels == ["NeMo", "NeMo · outliers off", "NeMo · top_k off", "NeMo · of layer"]

    nested = [settings("c", k=k, source={"k": own}) for k in (1, 2) for own in (1, 2)]
    labels = _label(run, ["NeMo"] * 4, nested)
    assert labels == [f"NeMo · k {k} · source.k {own}" for k in (1, 2) for own in (1, 2)]

    files = [settings("c", file=value) for value in (digest("a"), None)]
    scales = [settings("c", before=value) for value in (0.0, -2)]
    labels = _label(run, ["NeMo", "NeMo", "Other", "Other"], [*files, *scales])
    assert labels == ["NeMo · with file", "NeMo", "Other · before 0", "Other · before -2"]

    labels = _label(run, ["NeMo"] * 4, [settings("c")] * 4)
    assert labels == [f"NeMo · {i:08x}" for i in range(4)]


def test_numbers_of_the_contract_are_read(run: Path) -> None:
    none, _, nemo = load_results(run).cells
    for cell in (none, nemo):
        content = json.loads((run / cell.name / "metrics.json").read_text())
        assert cell.counts == content["counts"]
        assert json.loads(as_json(cell.summary)) == content
    assert none.summary.unmitigated is None
    assert nemo.summary.unmitigated == none.name
    assert none.summary.aggregates["VM"]["ssim"].paired is None
    assert nemo.summary.aggregates["VM"]["ssim"].paired
    assert nemo.summary.aggregates["VM"]["fid"].low is None
    assert load_results(run).leading == {
        "memorization": "ssim", "alignment": "alignment", "diversity": "diversity", "quality": "fid",
        "localization": "memorization",
    }  # fmt: skip


def test_records_are_the_union_of_files_without_a_torn_last_line(run: Path) -> None:
    before = load_results(run)
    folder = _cells(run)[2] / "records"
    lines = (folder / "score.0.jsonl").read_text().splitlines(keepends=True)
    (folder / "score.0.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    (folder / "score.1.jsonl").write_text("".join(lines[5:]))
    assert vars(load_results(run)) == vars(before)


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
        ("spec.json", '{"schema": 1}', "task: Field required"),
        ("metrics.json", '{"schema": 2, "counts": {}}', "schema: Extra inputs are not permitted"),
        ("metrics.json", '{"metrics": {}, "aggregates": {"VM": {"ssim": {"mean": "x"}}}}', "mean: Input should be"),
        ("env.json", "{", "Invalid JSON"),
        ("prompts.jsonl", "{", "does not hold"),
    ],
)
def test_a_file_that_does_not_hold_what_it_should_is_named(run: Path, file: str, text: str, words: str) -> None:
    cell = _cells(run)[0]
    (cell / file).write_text(text)
    results = load_results(run)
    assert list(results.unfinished) == [cell.name]
    assert words in results.unfinished[cell.name]
    assert file in results.unfinished[cell.name]


def test_layers_come_in_network_order(run: Path) -> None:
    assert network_order(reversed(LAYERS)) == list(LAYERS)
    assert list(load_results(run).cells[2].layers) == list(LAYERS)


def test_layers_have_short_names() -> None:
    assert list(short_layers(LAYERS).values()) == ["down.0.0", "down.0.1", "down.1.0", "down.1.1", "mid.0", "up.0.0"]
    block = "down_blocks.1.attentions.0.transformer_blocks.{}.attn2.to_v"
    assert list(short_layers([block.format(0), block.format(1), "odd"]).values()) == ["down.1.0.0", "down.1.0.1", "odd"]
