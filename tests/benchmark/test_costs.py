"""What records say of a method's own passes, and what it has to tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run
from nemo_bench.config import grid
from nemo_bench.records.schema import ScoreRecord
from on_disk import read_json, read_records


@pytest.mark.parametrize(
    "method",
    [
        "static_transition",
        "adjusted_noise",
        "prss",
        "amg",
        "wanda",
        "attention_rescaling",
        "guard",
        "padding_fix",
        "update_norms",
    ],
)
def test_methods_go_through_all_stages(method: str, prompt_file: Path, tmp_path: Path) -> None:
    words = [
        f"method={method}", "model.steps=2", f"prompts.files=[{prompt_file}]", "seeds=1", "localize_seeds=2",
        "batch_size=3", f"root={tmp_path}",
    ]  # fmt: skip
    (cell,) = plan(grid(words))
    run([cell], "test", progress=False)
    assert cell.store.is_done(ScoreRecord)
    assert len(read_records(cell.store.folder, "generate")) == 3


def test_records_count_a_methods_own_passes(prompt_file: Path, tmp_path: Path) -> None:
    words = [
        "method=none,embedding_optimization", "method.target=0", "method.steps=2", "method.images=3", "model.steps=4",
        f"prompts.files=[{prompt_file}]", "seeds=2", "localize_seeds=2", f"root={tmp_path}",
    ]  # fmt: skip
    none, optimized = plan(grid(words))
    run([none, optimized], "test", progress=False)
    plain = {record["id"]: record for record in read_records(none.store.folder, "generate").values()}
    assert {record["cost"]["row_passes"] for record in plain.values()} == {8}
    assert all("notes" not in record for record in plain.values())
    # Three images a prompt: unconditional noise, two passes and their gradients. Then two seeds are measured.
    for cell, once in ((none, 0), (optimized, 3 * (1 + 2 * 2))):
        measured = [record["cost"] for record in read_records(cell.store.folder, "memorization").values()]
        assert [(cost["once_row_passes"], cost["row_passes"]) for cost in measured] == [(once, once + 2)] * 3
        assert read_json(cell.store.folder / "metrics.json")["cost"]["once_row_passes_per_prompt"] == once
    records = read_records(optimized.store.folder, "generate").values()
    assert {record["cost"]["row_passes"] for record in records} == {8}
    assert all(record["notes"] == {"steps": 2, "reached": False} for record in records)
    assert read_json(optimized.store.folder / "metrics.json")["cost"]["row_passes_per_image"] == 8


def test_what_images_share_is_no_cost_of_an_image_wherever_it_is_found(prompt_file: Path, tmp_path: Path) -> None:
    """A second process finds it again: the images cost what they cost in the first."""
    words = [
        "method=embedding_optimization", "method.target=0", "method.steps=2", "method.images=3", "model.steps=4",
        f"prompts.files=[{prompt_file}]", "seeds=2", "localize_seeds=2", f"root={tmp_path}",
    ]  # fmt: skip
    (cell,) = plan(grid(words))
    run([cell], "test", progress=False)
    for path in (cell.store.folder / "records").glob("generate.*"):
        path.unlink()
    (cell.store.folder / "generate.done").unlink()
    (again,) = plan(grid(words))
    run([again], "test", progress=False)
    assert {record["cost"]["row_passes"] for record in read_records(again.store.folder, "generate").values()} == {8}


def test_moving_the_noise_costs_each_image(prompt_file: Path, tmp_path: Path) -> None:
    words = [
        "method=adjusted_noise", "model.steps=4", f"prompts.files=[{prompt_file}]", "seeds=2", "localize_seeds=2",
        f"root={tmp_path}",
    ]  # fmt: skip
    (cell,) = plan(grid(words))
    run([cell], "test", progress=False)
    assert {record["cost"]["row_passes"] for record in read_records(cell.store.folder, "generate").values()} == {8 + 8}
    assert read_json(cell.store.folder / "metrics.json")["cost"]["once_row_passes_per_prompt"] == 0


def test_the_share_of_images_that_reached_their_target_is_in_the_table(prompt_file: Path, tmp_path: Path) -> None:
    words = [
        "method=none,optimized_noise", "method.target=0,1e9", "method.steps=1", "model.steps=2", "seeds=1",
        f"prompts.files=[{prompt_file}]", "localize_seeds=2", f"root={tmp_path}",
    ]  # fmt: skip
    cells = plan(grid(words))
    folder = run(cells, "test", progress=False)
    shares = [
        read_json(cell.store.folder / "metrics.json")["aggregates"]["all"].get("target_reached") for cell in cells
    ]
    assert shares[0] is None
    assert sorted(share["mean"] for share in shares[1:]) == [0, 1]
    rows = read_json(folder / "leaderboard.json")["rows"]
    found = {(row["label"], row["metrics"].get("target_reached", {}).get("mean")) for row in rows}
    assert {value for _, value in found} == {None, 0, 1}
    assert "Target reached" in (folder / "leaderboard.md").read_text(encoding="utf-8")
    assert "Target reached" in (folder / "report.html").read_text(encoding="utf-8")
