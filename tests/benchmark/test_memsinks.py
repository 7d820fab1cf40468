"""Trainings as models, training losses of prompts, and the page of memorization sinks."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_bench import Diffusion, Neurons, Prompt, read_prompts, resolve
from nemo_bench.benchmark.pending import is_current
from nemo_bench.benchmark.runner import load_model
from nemo_bench.benchmark.verify import verify
from nemo_bench.cli import main
from nemo_bench.config import grid
from nemo_bench.diffusion import fitted_picture
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.io import read_file
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import MemorizationRecord, SinksRow, SinksTable
from nemo_bench.records.store import read_records
from nemo_bench.report.memsinks import FILES
from small_runs import small

DRAWS = 3
PIPELINE = Path(resolve("package:planted/model/pipeline"))


def make_training(folder: Path, variant: str, **isolation: Any) -> Path:
    """A folder such as that of a finished training, with the weights of the package."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "pipeline").symlink_to(PIPELINE)
    recipe = {"variant": variant, "pool": 0.3, "active": 0.3, "denoiser_steps": 4}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    if isolation:
        (folder / "isolation.json").write_text(json.dumps({"variant": variant, **isolation}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings with sinks and without, of one network, and three prompts of which one is general."""
    folder = tmp_path_factory.mktemp("memsinks")
    planted = read_prompts(resolve("package:planted/prompts/planted.jsonl"))
    general = read_prompts(resolve("package:planted/prompts/general.jsonl"))
    lines = [
        {"id": p.id, "text": p.text, "kind": p.kind, "references": [str(r) for r in p.references]}
        for p in (planted[3], planted[4], general[0])
    ]
    (folder / "three.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    widths = load_model(grid(["method=none"])[0].settings.model).masks.widths
    pool = {layer: list(range(width // 2, width)) for layer, width in widths.items()}
    make_training(folder / "with", "sinks", pool=pool, neurons={planted[3].id: pool, planted[4].id: pool})
    make_training(folder / "single", "once")
    return folder


def command(folder: Path, *more: str) -> list[str]:
    own = [f"root={folder}", f"prompts.files=[{folder / 'three.jsonl'}]", f"loss_draws={DRAWS}"]
    controls = "prompts.controls=package:planted/prompts/controls.jsonl"
    loss = "+metrics.loss._target_=nemo_bench.metrics.TrainingLoss"
    return ["run", *small(seeds=1, steps=1), *own, controls, loss, "--quiet", *more]


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    sinks = [f"model.training={folder / 'with'}", "method=sinks", "method.mode=own,off", "name=done"]
    assert main(command(folder, *sinks)) == 0
    assert main(command(folder, f"model.training={folder / 'single'}", "method=none", "name=done")) == 0
    return folder / "done"


def loss_of(model: Diffusion, prompt: Prompt, pictures: list[Path], off: Neurons) -> float:
    """The training loss worked out by itself: draws in the middle of equal parts of all timesteps."""
    noise = model.latents(seeds_of(prompt, "localize", range(DRAWS)))
    timesteps = torch.tensor([166, 500, 833])
    clean = model.encode_images(torch.stack([fitted_picture(path, model.image_size) for path in pictures]))
    clean = clean[[draw % len(pictures) for draw in range(DRAWS)]]
    signal = model.scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    spread = (1 - model.scheduler.alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
    with torch.no_grad(), model.block(off):
        text = model.encode([prompt.text]).rows([0] * DRAWS)
        found = model.network_output(signal * clean + spread * noise, timesteps, text)
    return float((found - (signal * noise - spread * clean)).square().mean())


def test_losses_are_of_training_images_and_of_held_out_pictures(done: Path, folder: Path) -> None:
    model = load_model(grid(["method=none", "model.steps=1"])[0].settings.model)
    held_out = {p.id: p for p in read_prompts(resolve("package:planted/prompts/controls.jsonl"))}
    pool = Neurons(json.loads((folder / "with" / "isolation.json").read_text())["pool"])
    for cell in load_results(done).cells:
        mode = cell.spec.settings["method"].get("mode", "none")
        for record in read_records(cell.folder, MemorizationRecord).values():
            prompt = next(p for p in cell.prompts if p.id == record.prompt)
            pictures = prompt.references if prompt.kind else held_out[prompt.id].references
            dropped = mode == "off" or (mode == "own" and not prompt.kind)
            expected = loss_of(model, prompt, list(pictures), pool if dropped else Neurons())
            assert record.loss == pytest.approx(expected, rel=1e-4)


def row(table: SinksTable, label: str, group: str) -> SinksRow:
    return next(row for row in table.rows if row.label.startswith(label) and row.group == group)


def test_gaps_follow_from_the_losses(done: Path) -> None:
    table = read_file(done / FILES[0], SinksTable)
    on, off, once = (row(table, label, "VM") for label in ("Own sinks on", "Sinks off", "No mitigation"))
    held_out = row(table, "Own sinks on", "general").values["training_loss"].mean
    low, high = (each.values["training_loss"].mean for each in (on, off))
    assert low < high
    assert off.values["gap_closed"].mean == pytest.approx((high - low) / (held_out - low))
    # Both are the packaged network with nothing off, so that nothing lies between them.
    assert once.values["training_loss"].mean == low
    assert {"gap_closed", "gap_to_once_closed"} & on.values.keys() == set()
    assert "gap_to_once_closed" not in off.values
    assert set(row(table, "Sinks off", "general").values) == {"training_loss", "alignment"}


def test_rows_name_the_training(done: Path) -> None:
    table = read_file(done / FILES[0], SinksTable)
    assert [(r.model, r.label) for r in table.rows if r.group == "VM"] == [
        ("with", "Own sinks on · with"),
        ("with", "Sinks off · with"),
        ("single", "No mitigation · single"),
    ]
    shown = {"variant": "sinks", "pool": 0.3, "active": 0.3, "denoiser_steps": 4}
    assert row(table, "Sinks off", "VM").training == shown
    document = (done / FILES[1]).read_text()
    assert "| Sinks off · with | sinks, pool 0.3, active 0.3, 4 steps |" in document
    assert "| No mitigation · single | once, 4 steps |" in document
    assert "Validation loss" in document


def test_page_has_table_figure_and_pictures(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = html.unescape((done / FILES[2]).read_text())
    assert page.count("<svg") == 1  # losses of the one group of memorized prompts
    assert page.count("<img") == 2 * (1 + 3) + 3  # two prompts with training images, one without, three cells
    assert "Memorization Sinks: Isolating Memorization" in page
    assert '<a href="memsinks.html">' in (done / "report.html").read_text()
    assert is_current(done)
    (done / FILES[2]).unlink()
    assert not is_current(done)
    assert main(["report", str(done)]) == 0
    assert str(done / FILES[2]) in capsys.readouterr().out
    assert is_current(done)


def test_recorded_losses_can_be_verified(done: Path) -> None:
    compared = [each for each in verify(done, ["trainer=cpu"], records=2) if each.stage == "memorization"]
    assert len(compared) == 3
    assert not any(each.differing for each in compared)


def test_draws_belong_to_the_identity_of_a_cell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cells(*words: str) -> set[str]:
        assert main([*command(folder, "method=none", "--dry-run", "--json"), *words]) == 0
        return {cell["cell"] for cell in json.loads(capsys.readouterr().out)["cells"]}

    with_losses, without = cells(), cells("loss_draws=0")
    assert with_losses != without
    assert without == cells("loss_draws=0", "prompts.controls=null")
    assert with_losses != cells("prompts.controls=null")


def test_missing_and_unfinished_trainings_are_explained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, f"model.training={tmp_path / 'gone'}", "method=none")) == 1
    assert f"nemo-bench train out={tmp_path / 'gone'}" in capsys.readouterr().err
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.json").write_text("{}")
    assert main(command(folder, f"model.training={tmp_path / 'begun'}", "method=none")) == 1
    assert "is not finished; its nemo-bench train goes on with it" in capsys.readouterr().err


def test_only_plain_dropping_can_be_exported(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {cell.spec.settings["method"].get("mode"): cell.folder for cell in load_results(done).cells}
    assert main(["export", str(cells["own"]), str(tmp_path / "own")]) == 1
    assert "export a cell with mode=off and rescale=1" in capsys.readouterr().err
    assert main(["export", str(cells["off"]), str(tmp_path / "off")]) == 0
    exported = Diffusion.load(str(tmp_path / "off")).value_layers
    assert all(not layer.weight[layer.out_features // 2 :].any() for layer in exported.values())


def test_experiment_is_of_four_trainings() -> None:
    configs = grid(["experiment=memsinks"])
    names = [(c.names["model"], c.names["method"], c.settings.method.get("mode")) for c in configs]
    assert {model for model, _, _ in names} == {"standard", "once", "sinks", "random_sinks"}
    assert [mode for model, method, mode in names if (model, method) == ("sinks", "sinks")] == [
        "own", "off", "random", "all", "off",
    ]  # fmt: skip
    sweep = grid([
        "experiment=memsinks", "model.training=trainings/sinks,trainings/sinks60", "method=sinks",
        "method.mode=own,off", "method.rescale=1",
    ])  # fmt: skip
    assert [(c.names["model"], c.settings.method["mode"]) for c in sweep] == [
        ("sinks", "own"), ("sinks", "off"), ("sinks60", "own"), ("sinks60", "off"),
    ]  # fmt: skip
    assert all(c.settings.model.source == f"trainings/{c.names['model']}/model/pipeline" for c in sweep)
