"""A run with variants of prompts: whose neurons are off for them, and what the report says of them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_bench import Diffusion, Neurons, read_prompts, resolve
from nemo_bench.api import load_results
from nemo_bench.benchmark import detect as detection
from nemo_bench.benchmark import runner
from nemo_bench.benchmark.plan import read_listed
from nemo_bench.benchmark.status import read_status
from nemo_bench.cli import main
from nemo_bench.config import detector_grid, grid
from nemo_bench.localization.published import PublishedRow, published_text
from nemo_bench.planted.prompts import planted_names
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Prompt
from on_disk import read_json, read_records

VARIANTS = [
    {"id": "vm-01-p1", "text": "nine stars at the golden harbor", "variant_of": "vm-01", "axis": "paraphrase"},
    {"id": "vm-01-p2", "text": "the silent harbor", "variant_of": "vm-01", "axis": "paraphrase"},
    {"id": "vm-02-p1", "text": "stories, four rings", "variant_of": "vm-02", "axis": "paraphrase"},
    {"id": "vm-01-de", "text": "der goldene hafen", "variant_of": "vm-01", "axis": "translation"},
    {"id": "vm-02-n1", "text": "a vintage garden", "variant_of": "vm-02", "axis": "neighbour"},
]
OFF = {"vm-01": range(24), "vm-02": range(60, 120)}
"""Neurons of the last value layer that are off, by prompt."""
SEEDS = 2


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return read_prompts(resolve("package:planted/prompts/planted.jsonl"))[:2]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, planted: Diffusion, prompts: list[Prompt]) -> Path:
    """A run with nothing and with given neurons off; these name the prompts and none of their variants."""
    root = tmp_path_factory.mktemp("axes")
    lines = [
        {"id": p.id, "text": p.text, "kind": p.kind, "references": [str(path) for path in p.references]}
        for p in prompts
    ]
    for name, content in (("planted", lines), ("variants", VARIANTS)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    empty = ((),) * (len(planted.masks.widths) - 1)
    rows = [PublishedRow(p.text, "", (*empty, ()), 0.0, (*empty, tuple(OFF[p.id])), 0.0) for p in prompts]
    (root / "neurons.csv").write_text(published_text(rows))
    words = [
        "method=none,saved", f"method.file={root}/neurons.csv",
        f"prompts.files=[{root}/planted.jsonl,{root}/variants.jsonl]",
        "model.steps=3", f"seeds={SEEDS}", "localize_seeds=2", f"root={root}", "name=axes", "trainer=cpu",
    ]  # fmt: skip
    assert main(["run", *words]) == 0
    return root / "axes"


def cell(folder: Path, method: str) -> Path:
    (path,) = folder.glob(f"planted__{method}__*")
    return path


def test_variants_have_the_neurons_of_their_prompt(done: Path, planted: Diffusion) -> None:
    folder = cell(done, "saved")
    assert {record["prompt"] for record in read_records(folder, "localize").values()} == {"vm-01", "vm-02"}
    layer = [*planted.masks.widths][-1]
    outcomes = next(c for c in load_results(done).cells if c.method == "saved").outcomes
    for line in VARIANTS:
        assert outcomes[line["id"]].neurons == Neurons({layer: [*OFF[line["variant_of"]]]})
    variant = VARIANTS[-1]
    steps, planted.steps = planted.steps, 3
    try:
        seeds = seeds_of(Prompt(variant["id"], ""), "generate", [0])
        with planted.block(Neurons({layer: [*OFF["vm-02"]]})), torch.no_grad():
            expected = planted.generate(variant["text"], seeds)[0].permute(1, 2, 0).numpy()
    finally:
        planted.steps = steps
    record = next(
        r for r in read_records(folder, "generate").values() if (r["prompt"], r["seed"]) == (variant["id"], 0)
    )
    assert np.abs(np.asarray(Image.open(folder / record["image"])) / 255 - expected).max() < 0.02


def test_status_counts_a_localization_for_each_prompt_and_none_for_variants(done: Path) -> None:
    # Of saved 2 localizations, 7 memorization scores, 14 images and 7 scores; of none no localization.
    assert sorted((found.done, found.total) for found in read_status(done)) == [(28, 28), (30, 30)]


def test_rows_are_means_over_the_variants_of_each_prompt(done: Path) -> None:
    rows = {(row["axis"], row["cell"]): row for row in read_json(done / "leaderboard.json")["axes"]}
    assert {axis for axis, _ in rows} == {"paraphrase", "translation", "neighbour"}
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    for method in ("none", "saved"):
        for record in read_records(cell(done, method), "score").values():
            for key, value in record.get("scores", {}).items():
                scores.setdefault(method, {}).setdefault(key, {}).setdefault(record["prompt"], []).append(value)
    own, before = (
        {key: {p: fmean(v) for p, v in of.items()} for key, of in scores[m].items()} for m in ("saved", "none")
    )
    row = rows["paraphrase", cell(done, "saved").name]
    assert (row["originals"], row["variants"]) == (2, 3)
    ssim, first = row["values"]["ssim"], own["ssim"]
    by_prompt = [(first["vm-01-p1"] + first["vm-01-p2"]) / 2, first["vm-02-p1"]]
    assert ssim["variant"]["mean"] == pytest.approx(fmean(by_prompt))
    assert ssim["variant"]["prompts"] == 2
    originals = [first["vm-01"], first["vm-02"]]
    assert ssim["original"]["mean"] == pytest.approx(fmean(originals))
    assert ssim["gap"]["difference"] == pytest.approx(fmean(by_prompt) - fmean(originals))
    neighbour = rows["neighbour", cell(done, "saved").name]["values"]
    assert [*neighbour] == ["alignment"]
    assert "original" not in neighbour["alignment"]
    change = own["alignment"]["vm-02-n1"] - before["alignment"]["vm-02-n1"]
    assert neighbour["alignment"]["change"]["difference"] == pytest.approx(change)
    assert "change" not in rows["neighbour", cell(done, "none").name]["values"]["alignment"]
    assert "memorized" not in rows["neighbour", cell(done, "saved").name]["values"]


def test_variants_are_groups_of_their_own_and_no_prompts_to_detect(done: Path) -> None:
    board = read_json(done / "leaderboard.json")
    counts = {row["group"]: row["n_prompts"] for row in board["rows"]}
    assert counts == {"VM": 2, "paraphrase": 3, "translation": 1, "neighbour": 1, "all": 7}
    summary = read_json(cell(done, "none") / "metrics.json")
    assert not summary["detection"]  # the two planted prompts alone, and nothing to tell them from


def test_page_and_markdown_have_a_section(done: Path) -> None:
    page, text = (done / "report.html").read_text(), (done / "leaderboard.md").read_text()
    for heading in ("Memorized prompts in other words: 3 paraphrases of 2 prompts", "1 translation of 1 prompt"):
        assert heading in page
        assert heading in text
    assert 'id="axes"' in page
    assert page.count('id="axis-') >= 3
    assert "General prompts that resemble a memorized one" in (done / "leaderboard.tex").read_text()


def test_a_variant_without_its_prompt_stops_the_run_before_weights(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "load_model", None)
    assert main(["run", "method=none", f"prompts.files=[{done.parent}/variants.jsonl]", f"root={done.parent}"]) == 1
    assert "'vm-01-p1' is a paraphrase of 'vm-01', which is no prompt of the run" in capsys.readouterr().err


def test_detectors_leave_variants_out() -> None:
    (cell,) = detection.plan(detector_grid(["detector=magnitude", "prompts=planted_variants"]))
    assert [prompt.id for prompt in cell.prompts] == planted_names()


def test_shipped_variants_are_of_all_planted_captions() -> None:
    prompts = read_listed(grid(["method=none", "prompts=planted_variants"])[0].settings.prompts)
    for axis in ("rewording", "paraphrase", "neighbour"):
        assert [p.variant_of for p in prompts if p.axis == axis] == planted_names()
    texts = [prompt.text for prompt in prompts]
    assert len(set(texts)) >= len(texts) - 2  # two captions may have a neighbour in common
