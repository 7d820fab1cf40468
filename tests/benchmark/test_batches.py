"""Batches that fit: found by halving where memory runs out, and no part of a cell's identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_bench import Diffusion
from nemo_bench.benchmark.plan import Cell, plan
from nemo_bench.benchmark.runner import Runner, largest_batch, try_batch
from nemo_bench.config import grid
from nemo_bench.errors import ConfigError


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
