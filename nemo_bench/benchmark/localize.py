"""The benchmark of localizers: what ``nemo-bench localize`` does.

Each localizer is a cell of an ordinary run, beside one with nothing off. It starts from a cell in which the neurons of
memorized prompts are localized, switches them off for these prompts and, drawn by ids, for general ones, and is scored
by metrics that compare with the true neurons and with training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_bench.benchmark.pending import is_complete
from nemo_bench.benchmark.plan import UNMITIGATED, Cell
from nemo_bench.benchmark.plan import plan as plan_cells
from nemo_bench.benchmark.processes import was_started
from nemo_bench.benchmark.run import run
from nemo_bench.config import CellConfig
from nemo_bench.errors import ConfigError


def plan(configs: Sequence[CellConfig]) -> list[Cell]:
    """Makes the cells of :func:`nemo_bench.config.localizer_grid`; no weights are loaded, nothing written.

    Raises:
        NemoBenchError: Settings are wrong or something is missing; also where no prompt is marked as memorized.
    """
    cells = plan_cells(as_methods(configs))
    for cell in cells:
        if not any(prompt.kind for prompt in cell.prompts):
            files = ", ".join(cell.config.settings.prompts.files)
            raise ConfigError(f"{files}: no prompt is marked as memorized, so there is nothing to localize; mark some")
    return cells


def as_methods(configs: Sequence[CellConfig]) -> list[CellConfig]:
    """Settings of the cells by which localizers are compared, and before them of those with nothing off."""
    compared: dict[str, CellConfig] = {}
    for config in configs:
        names = {group: name for group, name in config.names.items() if group != "localizer"}
        settings = replace(config.settings, localizer=None, method=dict(UNMITIGATED))
        without = CellConfig({**names, "method": "none"}, settings)
        compared.setdefault(repr(without), without)
    for config in configs:
        names = {group: name for group, name in config.names.items() if group != "localizer"}
        names["method"] = config.names["localizer"]
        settings = config.settings
        method: dict[str, Any] = {
            "_target_": "nemo_bench.methods.Deletion",
            "source": {
                "_target_": "nemo_bench.methods.LocalizedNeurons",
                "localizer": settings.localizer,
                "truth": settings.model.truth,
            },
        }
        compared[repr(config)] = CellConfig(names, replace(settings, localizer=None, method=method), config.families)
    return list(compared.values())


def localize(cells: Sequence[Cell], command: str, *, progress: bool = True) -> Path:
    """Runs what is pending of some cells, to ``localizers.{html,md,csv,json}`` in the folder of the run.

    ``command`` is what the user typed, for the records.

    Raises:
        NemoBenchError: See :func:`nemo_bench.benchmark.run.run`.
    """
    folder = cells[0].store.folder.parent
    if was_started() or not is_complete(cells):
        run(cells, command, progress=progress)
    return folder
