"""Settings of one cell, and the YAML files of the package."""

from __future__ import annotations

from pathlib import Path

from nemo_bench.config import CellConfig, grid

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml") if file.parent.name != "sweeps")


def one_cell(*overrides: str, conf: Path | None = None) -> CellConfig:
    (choice,) = grid(["method=none", *overrides], conf)
    return choice
