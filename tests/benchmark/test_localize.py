"""nemo-bench localize: from localizers to table and page."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_bench import read_prompts, resolve
from nemo_bench.benchmark import localize as localizers
from nemo_bench.benchmark.pending import is_current
from nemo_bench.benchmark.runner import Runner, load_model
from nemo_bench.benchmark.verify import verify
from nemo_bench.cli import main
from nemo_bench.config import localizer_grid
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.records.data import Neurons
from nemo_bench.records.io import read_file, write_json
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Aggregate, LocalizationRecord, LocalizerRow, LocalizerTable
from nemo_bench.records.statistics import paired
from nemo_bench.records.store import read_records, read_scores, read_spec
from nemo_bench.records.truth import Truth, read_truth
from nemo_bench.report.localizers import FILES, note, sections
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


def plain_command(folder: Path, *more: str) -> list[str]:
    own = [f"root={folder}", f"prompts.files=[{folder / 'four.jsonl'}]", f"model.truth={folder / 'truth.json'}"]
    return ["localize", *small(seeds=1), *own, *more]


def command(folder: Path, *more: str) -> list[str]:
    return plain_command(folder, "localizer.steps=2", "localizer.samples=1", "--quiet", *more)


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
    with pytest.raises(ConfigError, match=r"launcher: .* start the same command several times"):
        localizer_grid(["launcher=slurm"])
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


def test_truth_is_checked_for_each_file_and_where_images_are_only_scored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "other.json", Truth(schema=1, neurons={"vm-01": Neurons({"mid": [3]})}))
    good, bad = folder / "truth.json", tmp_path / "other.json"
    files = [f"root={tmp_path}", f"prompts.files=[{folder / 'four.jsonl'}]", "prompts.limit=1"]
    own = [*small(seeds=1, steps=1), *files, "localizer=random_order", "localizer.number=2"]
    first, second = (localizers.plan(localizer_grid([*own, f"model.truth={file}"]))[-1] for file in (good, bad))
    runner = Runner(first.config.settings.trainer, progress=False)
    runner.model(first)
    with pytest.raises(ModelError, match="there are other neurons than the model has"):
        runner.model(second)
    assert main(["localize", *own, f"model.truth={good}", "--quiet"]) == 0
    images = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    capsys.readouterr()
    assert main(["localize", *own, f"model.truth={bad}", "--quiet"]) == 1
    assert "there are other neurons than the model has" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == images


@pytest.mark.parametrize(
    ("localizer", "message"),
    [
        (
            "slimming",
            r"Slimming can localize none of 2 prompts: it has no training image.*take localizer\.objective=",
        ),
        ("truth", r"True neurons can localize none of 2 prompts: its true neurons are not known, in model\.truth="),
    ],
)
def test_prompts_that_lack_what_localizing_needs_are_refused_before_weights_load(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    localizer: str,
    message: str,
) -> None:
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", None)
    lines = [{"id": f"other-{text}", "text": text, "kind": "VM"} for text in ("one", "two")]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = [f"root={tmp_path}", f"prompts.files=[{tmp_path / 'bare.jsonl'}]", f"localizer={localizer}"]
    assert main(plain_command(folder, *own)) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("default/*/records/*"))


def test_a_dry_run_says_how_many_prompts_lack_something_and_what_localizing_takes(
    done: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["localizer=truth,zero_out", "localizer.samples=1", "--dry-run", "--json"]
    assert main(plain_command(folder, *words)) == 0
    expected = json.loads(capsys.readouterr().out)
    (need,) = (need for need in expected["needs"] if need["kind"] == "prompts to localize")
    assert need["state"] == "partly"
    assert need["note"].startswith("2 of 3 can't be localized, and have no images: its true neurons are not known")
    (widths,) = {(path.read_text()) for path in done.glob("*/layers.json")}
    (row,) = (row for row in expected["cells"] if "zero_out_neurons" in row["cell"])
    assert row["passes"]["localize"] == 3 * (1 + sum(json.loads(widths).values()))


def test_what_prompts_lacked_is_named_at_the_end(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["localizer=truth", "prompts.limit=3", "model.steps=1", f"root={tmp_path}"]
    assert main(plain_command(folder, *own)) == 1
    printed = capsys.readouterr().err
    assert re.search(r"__truth__\S+: 2 of 3 images failed: its true neurons are not known, in model\.truth=", printed)
    assert "dtype" not in printed


def test_cells_keep_what_was_chosen_for_the_family_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "localizer").mkdir()
    text = (
        "_target_: nemo_bench.localization.localizers.RandomOrder\nseed: 0\nshare: 0.02\nnumber: null\n"
        "families:\n  planted: {share: 0.5}\n"
    )
    (tmp_path / "localizer" / "own.yaml").write_text(text)
    without, own = localizers.as_methods(localizer_grid(["localizer=own"], tmp_path))
    assert own.settings.method["source"]["localizer"]["share"] == 0.5
    assert ["share" in str(family) for family in own.families] == [True]
    assert not without.families


def test_a_page_that_a_kill_left_out_is_made_by_the_same_command(done: Path, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(done, tmp_path / "default", copy_function=shutil.copy2))
    assert is_current(copy)
    for name in FILES:
        before = (copy / name).read_bytes()
        (copy / name).unlink()
        assert not is_current(copy)
        (copy / name).write_bytes(before)
        os.utime(copy / name, ns=(0, 0))
        assert not is_current(copy)
        assert main(command(folder, SOME, f"root={tmp_path}")) == 0
        assert is_current(copy)
        assert (copy / name).read_bytes() == before


def test_localizers_are_compared_over_the_same_prompts_and_settings(folder: Path, tmp_path: Path) -> None:
    own = [f"root={tmp_path}", f"prompts.files=[{folder / 'four.jsonl'}]", "localizer=random_order"]
    command = ["localize", *small(seeds=1, steps=1), *own, "--quiet"]
    assert main([*command, "prompts.limit=1", "model.guidance=1,7"]) == 0
    assert main([*command, "prompts.limit=2", "model.guidance=7"]) == 0
    table = read_file(tmp_path / "default" / "localizers.json", LocalizerTable)
    assert len(table.against) == 3
    specs = {cell.name: cell.spec.settings for cell in load_results(tmp_path / "default").cells}
    for comparison in table.against:
        rows = [row for row in table.rows if row.comparison == comparison and row.group == "VM"]
        assert [row.localizer for row in rows] == ["none", "random_order"]
        assert len({row.n_prompts for row in rows}) == 1
        alike = [(specs[row.cell]["prompts"], specs[row.cell]["model"]) for row in rows]
        assert alike == [alike[0]] * 2
    assert sorted(row.n_prompts for row in table.rows if row.group == "VM" and row.localizer == "none") == [1, 1, 2]
    assert [heading for heading, _ in sections(table) if "guidance 1" in heading]


PROGRAM = """
import sys, time
from pathlib import Path
from nemo_bench.api import localize
from nemo_bench.benchmark.processes import was_started

if __name__ == "__main__":
    table = localize(*sys.argv[2:])
    Path(sys.argv[1], f"rank{int(was_started())}").write_text(table.model_dump_json())
    while not Path(sys.argv[1], "rank1").exists():  # it ends with this process
        time.sleep(0.1)
"""


def test_every_process_has_the_table_from_python(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [word for word in command(folder) if word not in ("localize", "--quiet") and "localizer." not in word]
    own = ["localizer=random_order", "prompts.limit=1", "model.steps=1", f"root={tmp_path}", "trainer.devices=2"]
    program = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), *words, *own]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(program, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert first == second == read_file(tmp_path / "default" / "localizers.json", LocalizerTable).model_dump_json()
