"""Tracking: finished cells logged to Weights & Biases, CSV files and TensorBoard, from records alone.

A run is complete on disk before this is called, and can be logged again at any time, so a failure loses nothing.

Example:
    >>> track(load_results("results/default"), LoggerSettings(csv=True))  # doctest: +SKIP
    CSV: results/default/*/csv/metrics.csv
"""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import ConfigError, StoreError, TrackingError
from nemo_bench.records.results import Results
from nemo_bench.tracking.logged import LoggedCell, logged_cells

log = logging.getLogger(__name__)

__all__ = ["LoggedCell", "sweep_trial", "track", "training_loggers"]

_LOGGERS = {
    "wandb": "wandb_runs:log_wandb",
    "csv": "lightning_logs:log_csv",
    "tensorboard": "lightning_logs:log_tensorboard",
}
"""Functions by their name in the settings; imported when needed, since libraries are slow to import or absent."""


def track(
    results: Results,
    settings: LoggerSettings,
    *,
    cells: Collection[str] | None = None,
    again: bool = False,
) -> None:
    """Logs the finished cells of a run to every logger that is asked for.

    Args:
        results: The run.
        settings: Which loggers, and their settings.
        cells: Names of the cells to log; None takes all.
        again: Log unchanged cells to W&B as well.

    Raises:
        StoreError: No cell that was asked for is finished.
        TrackingError: A logger failed, in whatever way; the others succeeded, and the results are untouched.
    """
    loggers = [name for name in _LOGGERS if getattr(settings, name)]
    if not loggers:
        return
    unfinished = {name: why for name, why in results.unfinished.items() if cells is None or name in cells}
    logged = [cell for cell in logged_cells(results) if cells is None or cell.results.name in cells]
    if not logged:
        why = "; ".join(f"{name}: {reason}" for name, reason in unfinished.items()) or "no such cell in run.json"
        msg = f"{results.folder} has no finished cell to track ({why}); give the command of the run again to go on"
        raise StoreError(msg)
    for name, why in unfinished.items():
        log.info("not tracked, %s: %s", why, name)
    failures = []
    for name in loggers:
        try:
            pkgutil.resolve_name(f"nemo_bench.tracking.{_LOGGERS[name]}")(logged, settings, again)
        except Exception as error:  # whatever a logger raises: results that are complete must not suffer from it
            failures.append(f"{name} failed: {' '.join(str(error).split()) or type(error).__name__}")
    if failures:
        hint = f"the results are untouched, nemo-bench track {results.folder} tries again"
        raise TrackingError(f"{'; '.join(failures)}; {hint}")


def sweep_trial(methods: Mapping[str, str]) -> str | None:
    """The cell that is the trial of a W&B sweep agent.

    An agent gives its command the id of one W&B run, and waits for that run's metric. So one cell takes this run; one
    without mitigation may stand beside it for the differences that are paired with it.

    Args:
        methods: Name of the method by name of the cell.

    Returns:
        Name of the cell; None where no agent started this process.

    Raises:
        ConfigError: More than one cell could be the trial.
    """
    if not (os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")):
        return None
    trials = [name for name, method in methods.items() if method != "none"] or list(methods)
    if len(trials) > 1:
        msg = (
            f"a W&B sweep agent asks for one cell, beside one of method=none, given {len(trials)}: "
            f"{', '.join(trials)}; let the sweep vary what differs, or run this without an agent"
        )
        raise ConfigError(msg)
    return trials[0]


def training_loggers(settings: LoggerSettings, folder: Path, config: Mapping[str, Any]) -> list[Any]:
    """Lightning's loggers of a training, in the folders ``csv``, ``tensorboard`` and ``wandb``.

    Args:
        settings: Which loggers, and their settings.
        folder: Folder of the training.
        config: Settings that tell one training from another.

    Raises:
        TrackingError: TensorBoard is not installed, or W&B is to be online and there is no key.
    """
    names = [f"nemo_bench.tracking.lightning_logs:training_{name}" for name in _LOGGERS if getattr(settings, name)]
    return [pkgutil.resolve_name(name)(settings, folder, config) for name in names]
