"""Batches that fit: found by halving where memory runs out, and no part of a cell's identity."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_bench import Diffusion
from nemo_bench.benchmark.plan import Cell, plan
from nemo_bench.benchmark.runner import Runner, largest_batch, load_model, try_batch
from nemo_bench.cli import main
from nemo_bench.config import ModelSettings, grid
from nemo_bench.errors import ConfigError
from on_disk import read_records
from small_runs import small


@pytest.mark.parametrize(("room", "expected"), [(1000, 256), (256, 256), (255, 128), (48, 32), (1, 1), (0, 1)])
def test_the_largest_batch_is_the_largest_power_of_two_that_fits(room: int, expected: int) -> None:
    def attempt(rows: int) -> None:
        if rows > room:
            raise torch.OutOfMemoryError

    assert largest_batch(attempt) == expected


def test_other_errors_of_a_batch_are_not_taken_for_little_memory() -> None:
    def attempt(rows: int) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        largest_batch(attempt)


def test_trying_a_batch_counts_no_passes_and_changes_no_weights(tiny: Diffusion) -> None:
    before = (tiny.row_passes, tiny.state_digest())
    try_batch(tiny, 3)
    assert (tiny.row_passes, tiny.state_digest()) == before


def test_auto_is_32_on_a_cpu_and_no_part_of_the_identity(tmp_path: Path) -> None:
    def cell(*more: str) -> Cell:
        (found,) = plan(grid(["method=none", f"root={tmp_path}", "trainer=cpu", *more]))
        return found

    automatic, usual = cell("batch_size=auto"), cell("batch_size=7")
    assert automatic.id == usual.id
    for asked, rows in ((automatic, 32), (usual, 7)):
        runner = Runner(asked.config.settings.trainer, progress=False)
        assert runner.rows(asked) == runner.method(asked).batch_size == rows


@pytest.mark.parametrize("given", ["0", "-1", "many", "1.5"])
def test_a_batch_size_is_a_number_or_auto(given: str) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        grid(["method=none", f"batch_size={given}"])


def give_room(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the network of every model run out of memory in a pass of more rows."""

    def refuse(network: torch.nn.Module, inputs: tuple[Any, ...], options: object) -> None:
        if len(inputs[0]) > rows:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB")

    def load(settings: ModelSettings) -> Diffusion:
        model = load_model(settings)
        model.unet.register_forward_pre_hook(refuse, with_kwargs=True)
        return model

    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", load)


def results(cell: Cell) -> list[dict[str, dict[str, Any]]]:
    """Takes a cell to its images: records of all stages, without what only tells of the computation."""
    cell.store.open(cell.spec)
    Runner(cell.config.settings.trainer, progress=False).generate(cell)
    found = [read_records(cell.store.folder, stage) for stage in ("localize", "memorization", "generate")]
    for record in found[0].values():
        del record["localization"]["row_passes"]
    told = ("cost", "sha256", "bytes")
    return [{n: {k: v for k, v in r.items() if k not in told} for n, r in records.items()} for records in found]


def assert_close(a: Any, b: Any) -> None:
    """Equal, numbers up to what batches of other sizes round otherwise."""
    if isinstance(a, dict | list):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_close(a[key], b[key])
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=2e-3)
    else:
        assert a == b


def test_a_batch_that_does_not_fit_is_halved_and_nothing_changes(
    tmp_path: Path, prompt_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*small(), "batch_size=8", f"prompts.files=[{prompt_file}]", "prompts.limit=2", "method=nemo"]
    roomy, narrow = (plan(grid([*words, f"root={tmp_path / name}"]))[0] for name in ("roomy", "narrow"))
    expected = results(roomy)
    assert not caplog.messages
    give_room(3, monkeypatch)
    assert_close(results(narrow), expected)
    said = "with batch_size=8 a batch does not fit the memory of the GPU; it goes on with"
    assert caplog.messages == [
        f"calibrate: {said} 1 of 2 at once",
        f"localize: {said} 1 of 1 at once and batch_size=2",
        f"generate: {said} 1 of 4 at once",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_detectors_halve_their_batch_and_write_once(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_room(3, monkeypatch)
    words = ["trainer=cpu", "model.steps=1", "batch_size=8", f"prompts.files=[{prompt_file}]", "detector=magnitude"]
    assert main(["detect", *words, f"root={tmp_path}"]) == 0
    assert (tmp_path / "default" / "run.log").read_text().count("does not fit the memory of the GPU") == 1
    (file,) = tmp_path.glob("default/*/records/detect.*")
    assert len(file.read_text().splitlines()) == 3


def test_a_row_that_does_not_fit_is_explained(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_room(0, monkeypatch)
    words = [*small(), f"root={tmp_path}", f"prompts.files=[{prompt_file}]", "method=none"]
    assert main(["run", *words]) == 1
    said = capsys.readouterr().err
    assert "not even one row at a time fits the memory of the GPU (Tried to allocate 20.00 MiB)" in said
    assert "batch_size can't help. Take model.dtype=float16" in said
