"""Calibrations of models: what ``nemo-bench calibrate`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_bench.benchmark.plan import STATISTICS, THRESHOLD, Cell, with_sources
from nemo_bench.benchmark.runner import (
    Runner,
)
from nemo_bench.config import resolve
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.records.io import read_json


def calibrate(cells: Sequence[Cell], *, progress: bool = True) -> list[dict[str, Any]]:
    """Measures on general prompts what the methods of some cells, or their sources, need; once, then it is cached.

    Args:
        cells: From :func:`nemo_bench.benchmark.plan.plan`, of one root.
        progress: Whether bars are shown.

    Returns:
        One entry a calibration: model; what :func:`nemo_bench.localization.thresholds` returns (None where the
        threshold was given); file of the general prompts and of the statistics; folder of what was measured.

    Raises:
        NemoBenchError: See :func:`nemo_bench.benchmark.plan.plan`; also where no method takes a calibration.
    """
    needed = [cell for cell in with_sources(cells) if cell.method.needs_calibration]
    if not needed:
        raise ConfigError("none of the methods asked for takes a calibration; name one that does, such as method=nemo")
    if not all(cell.is_calibrated for cell in needed):
        runner = Runner(needed[0].config.settings.trainer, progress=progress)
        runner.start()
        for cell in needed:
            runner.calibrate(cell)
    for cell in needed:
        if STATISTICS in cell.measured and not (cell.calibration.folder / STATISTICS).exists():
            msg = f"{cell.calibration.folder}: activations of the calibration prompts are not finite"
            raise ModelError(f"{msg}; try model.dtype=float32 or bfloat16")
    rows = [_calibration_of(cell) for cell in needed]
    for row in rows:
        if row["threshold"] is None:
            failed, total = row["failed"], row["failed"] + row["prompts"]
            msg = f"{row['folder']}: noise differences of {failed} of {total} calibration prompts are not finite"
            raise ModelError(f"{msg}, so there is no threshold; try model.dtype=float32 or bfloat16")
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def _calibration_of(cell: Cell) -> dict[str, Any]:
    folder, given = cell.calibration.folder, cell.config.settings.model.statistics
    own = cell.method.memorization_threshold
    measured = read_json(folder / THRESHOLD) if THRESHOLD in cell.measured else {}
    return {
        "model": cell.spec["model"],
        **dict.fromkeys(("mean", "std", "passed_gate", "maxima")),
        "failed": 0,
        "prompts": len(cell.calibration_prompts),
        **measured,
        **({} if own is None else {"threshold": own}),
        **cell.method.protocol.of_threshold,
        "general_prompts": cell.config.settings.prompts.calibration if cell.calibration_prompts else None,
        "statistics": resolve(given) if given else str(folder / STATISTICS),
        "folder": str(folder) if cell.measured else None,
    }
