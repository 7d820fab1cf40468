"""Tracking: finished cells told to Weights & Biases, CSV files and TensorBoard, from records alone.

A run is complete on disk before this is called, and can be told again at any time, so a failure loses nothing.

Example:
    >>> track(Path("results/default"), LoggerSettings(csv=True))  # doctest: +SKIP
    CSV: results/default/*/csv/metrics.csv
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import ConfigError, StoreError, TrackingError
from nemo_bench.tracking.content import Entry, load_entries

__all__ = ["Entry", "sweep_trial", "track"]


def track(
    folder: Path,
    settings: LoggerSettings,
    *,
    cells: Collection[str] | None = None,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Tells the finished cells of a run to every logger that is asked for.

    Args:
        folder: ``results/<name>``, or one cell in it.
        settings: Which loggers, and their settings.
        cells: Names of the cells of a run that are told; None takes all.
        again: Tell W&B also what it was told already and has not changed since.
        say: Where single lines go.

    Raises:
        StoreError: The folder holds no run, or no finished cell that was asked for.
        TrackingError: A logger failed, in whatever way; the others were told, and the results are untouched.
    """
    chosen = {
        "wandb": (settings.wandb, _tell_wandb),
        "csv": (settings.csv, _tell_csv),
        "tensorboard": (settings.tensorboard, _tell_tensorboard),
    }
    if not any(asked for asked, _ in chosen.values()):
        return
    if (folder / "spec.json").is_file() and not (folder / "run.json").is_file():
        folder, cells = folder.parent, [folder.name]
    entries, unfinished = load_entries(folder)
    left_out = {name: why for name, why in unfinished.items() if cells is None or name in cells}
    entries = [entry for entry in entries if cells is None or entry.cell.name in cells]
    if not entries:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "no such cell in run.json"
        raise StoreError(f"{folder} has no finished cell to track ({why}); give the command of the run again to go on")
    for name, why in left_out.items():
        say(f"not tracked, {why}: {name}")
    failures = []
    for name, (asked, tell) in chosen.items():
        try:
            if asked:
                tell(entries, settings, again, say)
        except Exception as error:  # whatever a logger raises: results that are complete must not suffer from it
            failures.append(f"{name} failed: {' '.join(str(error).split()) or type(error).__name__}")
    if failures:
        hint = f"the results are untouched, nemo-bench track {folder} tries again"
        raise TrackingError(f"{'; '.join(failures)}; {hint}")


def sweep_trial(methods: Mapping[str, str]) -> str | None:
    """The cell that is the trial of a W&B sweep agent.

    An agent gives its command the id of one W&B run, and waits for that run's metric. So one cell takes this run; one
    without mitigation may stand beside it for the differences that are paired with it.

    Args:
        methods: Name of the method by cell.

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


def _tell_wandb(entries: list[Entry], settings: LoggerSettings, again: bool, say: Callable[[str], None]) -> None:
    from nemo_bench.tracking import wandb_runs  # slow to import, and may be absent

    trial = sweep_trial({entry.cell.name: entry.cell.method for entry in entries})
    if trial:
        entries = [entry for entry in entries if entry.cell.name == trial]
    wandb_runs.tell(entries, settings, again=again, in_sweep=trial is not None, say=say)


def _tell_csv(entries: list[Entry], settings: LoggerSettings, again: bool, say: Callable[[str], None]) -> None:
    from nemo_bench.tracking import lightning_logs

    for entry in entries:
        lightning_logs.write_csv(entry)
    say(f"CSV: {entries[0].folder.parent}/*/csv/metrics.csv")


def _tell_tensorboard(entries: list[Entry], settings: LoggerSettings, again: bool, say: Callable[[str], None]) -> None:
    from nemo_bench.tracking import lightning_logs

    for entry in entries:
        lightning_logs.write_tensorboard(entry, settings.thumbnails)
    say(f"TensorBoard: tensorboard --logdir {entries[0].folder.parent}")
