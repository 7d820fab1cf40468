"""nemo-bench localize: from localizers to table and page."""

from __future__ import annotations

import csv
import html
import json
from pathlib import Path

import numpy as np
import pytest

from nemo_bench import read_prompts, resolve
from nemo_bench.benchmark import localize as localizers
from nemo_bench.benchmark.runner import load_model
from nemo_bench.benchmark.verify import verify
from nemo_bench.cli import main
from nemo_bench.config import localizer_grid
from nemo_bench.errors import ConfigError
from nemo_bench.records.data import Neurons
from nemo_bench.records.io import read_file, write_json
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Aggregate, LocalizationRecord, LocalizerRow, LocalizerTable
from nemo_bench.records.statistics import paired
from nemo_bench.records.store import read_records, read_scores, read_spec
from nemo_bench.records.truth import Truth, read_truth
from nemo_bench.report.localizers import FILES, note
from small_runs import small

SOME = "localizer=activation,random_order,slimming,truth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four prompts, of which two are verbatim and one is general, and the truth of one of them."""
    folder = tmp_path_factory.mktemp("localize")
    planted = read_prompts(resolve("package:planted/prompts/planted.jsonl"))
    general = read_prompts(resolve("package:planted/prompts/general.jsonl"))
    lines = [
        {"id": p.id, "text": p.text, "kind": p.kind, "references": [str(r) for r in p.references]}
        for p in (*planted[:2], planted[-1], general[0])
    ]
    (folder / "four.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    layers = list(load_model(localizer_grid(["localizer=activation"])[0].settings.model).masks.widths)
    known = Neurons({layers[0]: [3, 17], layers[-1]: [40]})
    write_json(folder / "truth.json", Truth(schema=1, neurons={"vm-01": known, "vm-99": known}))
    return folder


def command(folder: Path, *more: str) -> list[str]:
    own = [f"root={folder}", f"prompts.files=[{folder / 'four.jsonl'}]", f"model.truth={folder / 'truth.json'}"]
    return ["localize", *small(seeds=1), *own, "localizer.steps=2", "localizer.samples=1", "--quiet", *more]


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    assert main(command(folder, SOME)) == 0
    return folder / "default"


def row(table: LocalizerTable, localizer: str, group: str) -> LocalizerRow:
    return next(row for row in table.rows if (row.localizer, row.group) == (localizer, group))


def test_every_localizer_has_a_row_for_each_group(done: Path) -> None:
    table = read_file(done / "localizers.json", LocalizerTable)
    names = ["none", "activation", "random_order", "slimming", "truth"]
    assert [(r.localizer, r.group) for r in table.rows] == [(name, group) for group in ("VM", "TM") for name in names]
    assert row(table, "truth", "VM").failed == 1
    perfect = row(table, "truth", "VM").values
    for key in ("precision", "recall", "f1", "recall_at_true_number", "average_precision"):
        assert (perfect[key].mean, perfect[key].prompts) == (1.0, 1)
        assert key not in row(table, "activation", "TM").values
        assert key not in row(table, "none", "VM").values
    assert set(row(table, "none", "VM").values) == {"training_similarity", "memorization_rate", "memorization_score"}
    assert row(table, "slimming", "VM").values["row_passes"].mean == 2 * 2
    assert row(table, "activation", "VM").values["row_passes"].mean == 0
    assert row(table, "activation", "VM").values["general_loss"].prompts == 1


def test_sets_and_files_of_scores_belong_together(done: Path, folder: Path) -> None:
    true = read_truth(folder / "truth.json")["vm-01"]
    for cell in load_results(done).cells:
        if cell.method == "none":
            continue
        source = done / str(read_spec(cell.folder).source)
        records = {r.prompt: r for r in read_records(source, LocalizationRecord).values()}
        assert {prompt for prompt, record in records.items() if record.file} == (
            {"vm-01"} if cell.method == "truth" else {"vm-01", "vm-02", "tm-26"}
        )
        record = records["vm-01"]
        assert record.localization
        neurons = record.localization.neurons
        assert neurons.count == true.count
        assert cell.outcomes["vm-01"].neurons == neurons
        # Highest scores of all layers together.
        scores = read_scores(source / str(record.file))
        inside = [scores[layer][index] for layer, ids in neurons.items() for index in ids]
        assert min(inside) >= np.sort(np.concatenate(list(scores.values())))[-true.count]
        lent = [cell.outcomes[name].neurons for name in records if records[name].file]
        assert cell.outcomes["general-01"].neurons in lent


def test_rows_are_compared_with_one_localizer_prompt_by_prompt(done: Path) -> None:
    table = read_file(done / "localizers.json", LocalizerTable)
    assert table.against == {"planted · four": "Activation"}
    cells = {cell.method: cell for cell in load_results(done).cells}
    own, base = (cells[name].prompt_means("ssim", ["VM"]) for name in ("slimming", "activation"))
    expected = paired(np.array([own[prompt] - base[prompt] for prompt in own]))
    test = row(table, "slimming", "VM").values["training_similarity"].paired
    assert test
    assert test.difference == pytest.approx(expected.difference)
    assert test.p == expected.p
    assert test.p_holm is not None
    assert test.p_holm >= test.p
    assert row(table, "activation", "VM").values["training_similarity"].paired is None
    loss = row(table, "slimming", "VM").values["general_loss"]
    before, after = (cells[name].prompt_means("alignment", ["general"])["general-01"] for name in ("none", "slimming"))
    assert loss.mean == pytest.approx(before - after)


def test_files_hold_the_same_numbers(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = read_file(done / "localizers.json", LocalizerTable)
    lines = list(csv.DictReader((done / "localizers.csv").read_text().splitlines()))
    assert len(lines) == sum(len(row.values) for row in table.rows)
    for line in lines:
        value: Aggregate = row(table, line["localizer"], line["group"]).values[line["measure"]]
        assert (float(line["mean"]), int(line["n"])) == (value.mean, value.prompts)
    page = (done / "localizers.html").read_text()
    assert "True neurons found" in page
    assert page.count("<svg") == 5  # of template prompts no true neurons are known
    assert note(table) in html.unescape(page)
    assert '<a href="localizers.html">' in (done / "report.html").read_text()
    before = {name: (done / name).read_bytes() for name in FILES}
    assert main(["report", str(done)]) == 0
    assert "True neurons" in capsys.readouterr().out
    assert {name: (done / name).read_bytes() for name in FILES} == before


def test_records_are_verified_with_rankings(done: Path) -> None:
    found = {(row.cell, row.stage): row for row in verify(done, ["trainer=cpu"], progress=False)}
    cells = [cell.name for cell in load_results(done).cells]
    assert {cell for cell, _ in found} == set(cells)
    assert all(found[cell, "score"].equal == found[cell, "score"].recomputed > 0 for cell in cells)
    assert not any(row.differing for row in found.values())


def test_it_goes_on_and_computes_nothing_twice(done: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {path: path.read_bytes() for path in done.rglob("*.jsonl")}
    assert main(command(folder, SOME, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["rows"]
    assert {path: path.read_bytes() for path in done.rglob("*.jsonl")} == lines


def test_what_is_not_there_is_left_out_or_said(folder: Path, tmp_path: Path) -> None:
    names = [config.names["localizer"] for config in localizer_grid([])]
    assert "truth" not in names
    assert "truth" in [config.names["localizer"] for config in localizer_grid([f"model.truth={folder}/truth.json"])]
    with pytest.raises(ConfigError, match=r"set model\.truth"):
        localizers.plan(localizer_grid(["localizer=truth", f"root={tmp_path}"]))
    with pytest.raises(ConfigError, match="does not matter to localizers"):
        localizer_grid(["method=nemo"])
    general = "package:planted/prompts/general.jsonl"
    with pytest.raises(ConfigError, match="no prompt is marked as memorized"):
        localizers.plan(localizer_grid(["localizer=activation", f"prompts.files=[{general}]", f"root={tmp_path}"]))


def test_truth_of_another_model_is_an_error_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "other.json", Truth(schema=1, neurons={"vm-01": Neurons({"mid": [3]})}))
    words = command(folder, SOME, f"model.truth={tmp_path / 'other.json'}", f"root={tmp_path}")
    assert main(words) == 1
    assert "there are other neurons than the model has" in capsys.readouterr().err
    assert not list(tmp_path.rglob("records/*.jsonl"))
