"""Calibrations of models: what ``nemo-bench calibrate`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_bench.benchmark.plan import STATISTICS, THRESHOLD, Cell, with_sources
from nemo_bench.benchmark.runner import Runner
from nemo_bench.config import resolve
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.records.io import read_file
from nemo_bench.records.schema import Threshold


def calibrate(cells: Sequence[Cell], *, progress: bool = True) -> list[dict[str, Any]]:
    """Measures on general prompts what the methods of some cells, or their sources, need; once, then it is cached.

    Gives one entry a calibration: the fields of :class:`nemo_bench.records.schema.Threshold`, alone where the threshold
    was given; ``model``, ``general_prompts``, and the paths ``statistics`` and ``folder``, where anything was measured.

    Raises:
        NemoBenchError: No method takes a calibration, or numbers are not finite.
    """
    needed = [cell for cell in with_sources(cells) if cell.method is not None and cell.method.needs_calibration]
    if not needed:
        raise ConfigError("none of the methods asked for takes a calibration; name one that does, such as method=nemo")
    if not all(cell.is_calibrated for cell in needed):
        runner = Runner(needed[0].config.settings.trainer, progress=progress)
        runner.start()
        for cell in needed:
            runner.calibrate(cell)
    for cell in needed:
        if STATISTICS in cell.measured and not cell.calibration_file(STATISTICS).exists():
            msg = f"{cell.calibration_file('')}: activations of the calibration prompts are not finite"
            raise ModelError(f"{msg}; try model.dtype=float32 or bfloat16")
    results = [_result(cell) for cell in needed]
    for result in results:
        if result["threshold"] is None:
            failed, total = result["failed"], result["failed"] + result["prompts"]
            msg = f"{result['folder']}: noise differences of {failed} of {total} calibration prompts are not finite"
            raise ModelError(f"{msg}, so there is no threshold; try model.dtype=float32 or bfloat16")
    return [result for number, result in enumerate(results) if result not in results[:number]]


def _result(cell: Cell) -> dict[str, Any]:
    assert cell.method is not None
    given = cell.config.settings.model.statistics
    values: dict[str, Any] = {"prompts": len(cell.calibration_prompts)}
    if THRESHOLD in cell.measured:
        values |= dict(read_file(cell.calibration_file(THRESHOLD), Threshold))
    if cell.method.memorization_threshold is not None:
        values["threshold"] = cell.method.memorization_threshold
    return {
        **Threshold(**{**values, **cell.method.noise_protocol.of_threshold}).model_dump(),
        "model": cell.spec.model,
        "general_prompts": cell.config.settings.prompts.calibration if cell.calibration_prompts else None,
        "statistics": resolve(given) if given else str(cell.calibration_file(STATISTICS)),
        "folder": str(cell.calibration_file("")) if cell.measured else None,
    }
