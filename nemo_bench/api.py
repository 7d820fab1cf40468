"""From Python what the command line does: models and prompts by name, runs, and their scores as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_bench.benchmark import localize as localizers
from nemo_bench.benchmark import regions as region_localizers
from nemo_bench.benchmark.launch import check_launcher
from nemo_bench.benchmark.launch.follow import launch
from nemo_bench.benchmark.plan import plan, read_listed
from nemo_bench.benchmark.run import run as run_cells
from nemo_bench.benchmark.runner import load_model
from nemo_bench.config import PromptSettings, grid, localizer_grid, region_grid
from nemo_bench.config.overrides import quoted
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError
from nemo_bench.prompts import is_prompt_source
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import read_file
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import LocalizerTable, RegionTable
from nemo_bench.report.localizers import FILES
from nemo_bench.report.regions import FILES as REGION_FILES


def load(model: str = "planted", *overrides: str) -> Diffusion:
    """Loads a model with all its settings: steps, guidance, how noise differences are compared.

    It is on the CPU; ``.to("cuda")`` moves it.

    Args:
        model: Its name, as ``nemo-bench ls model`` lists it.
        overrides: Settings as on the command line, such as ``"model.steps=50"`` or ``"model.source=folder"``.

    Raises:
        NemoBenchError: There is no such model or setting, or its weights can't be loaded.

    Example:
        >>> model = load("planted")
        >>> images = model.generate("the golden harbor podcast for nine silent stars", range(4))
    """
    (choice,) = grid([f"model={model}", "method=none", *overrides])
    return load_model(choice.settings.model)


def load_prompts(prompts: str = "planted", *overrides: str) -> tuple[list[Prompt], list[Prompt]]:
    """Reads the prompts that are benchmarked, and the general ones for the calibration, where there is a file of them.

    Args:
        prompts: Their name, as ``nemo-bench ls prompts`` lists it, or a file or data set of prompts.
        overrides: Settings as on the command line, such as ``"prompts.limit=10"``.

    Raises:
        NemoBenchError: There are no such prompts or settings, or a file can't be read.

    Example:
        >>> prompts, general = load_prompts("planted")
        >>> nemo = NeMo().calibrate(load("planted"), general)
    """
    own = f"prompts.files={quoted(prompts)}" if is_prompt_source(prompts) else f"prompts={prompts}"
    (choice,) = grid([own, "method=none", *overrides])
    settings = choice.settings.prompts
    general = PromptSettings([settings.calibration] if settings.calibration else [], limit=settings.calibration_limit)
    return read_listed(settings), read_listed(general)


def run(*overrides: str, conf: Path | str | None = None, progress: bool = False) -> Path:
    """Runs what ``nemo-bench run`` runs, as far as it is not done yet.

    Args:
        overrides: Settings as on the command line, such as ``"method=none,nemo"`` and ``"seeds=8"``.
        conf: Folder with more YAML files, in group subfolders.
        progress: Whether progress is shown.

    Returns:
        The folder of the run, with ``report.html`` and the leaderboard.

    Raises:
        NemoBenchError: Something is wrong with the settings or with what they name; nothing was loaded.

    Example:
        >>> folder = run("method=none,nemo", "prompts.limit=4", "name=small")
        >>> table = pandas.DataFrame(read_scores(folder))
    """
    _check_words("run", overrides)
    folder = Path(conf) if conf else None
    cells = plan(grid(overrides, folder))
    check_launcher(cells[0].config.settings)
    if cells[0].config.settings.launcher.kind != "local":
        return launch(cells, overrides, folder)
    return run_cells(cells, f"nemo_bench.run({', '.join(map(repr, overrides))})", progress=progress)


def localize(*overrides: str, conf: Path | str | None = None, progress: bool = False) -> LocalizerTable:
    """Runs what ``nemo-bench localize`` runs, as far as it is not done yet.

    Args:
        overrides: Settings as on the command line, such as ``"localizer=nemo,slimming"`` and ``"seeds=8"``.
        conf: Folder with more YAML files, in group subfolders.
        progress: Whether progress is shown.

    Returns:
        What ``localizers.json`` holds; the page is ``localizers.html`` in the folder of the run.

    Raises:
        NemoBenchError: Something is wrong with the settings or with what they name; nothing was loaded.

    Example:
        >>> table = localize("localizer=activation,slimming", "prompts.limit=4", "name=small")
        >>> {row.label: row.values["training_similarity"].mean for row in table.rows}
    """
    _check_words("localize", overrides)
    cells = localizers.plan(localizer_grid(overrides, Path(conf) if conf else None))
    command = f"nemo_bench.api.localize({', '.join(map(repr, overrides))})"
    folder = localizers.localize(cells, command, progress=progress)
    return read_file(folder / FILES[0], LocalizerTable)


def regions(*overrides: str, conf: Path | str | None = None, progress: bool = False) -> RegionTable:
    """Runs what ``nemo-bench regions`` runs, as far as it is not done yet.

    Args:
        overrides: Settings as on the command line, such as ``"region=score_difference"`` and ``"region.seeds=8"``.
        conf: Folder with more YAML files, in group subfolders.
        progress: Whether progress is shown.

    Returns:
        What ``regions.json`` holds; the page is ``regions.html`` in the folder of the run.

    Raises:
        NemoBenchError: Something is wrong with the settings or with what they name; nothing was loaded.

    Example:
        >>> table = regions("region=curvature_difference", "name=small")
        >>> {row.label: row.sets["partial"].average_precision for row in table.rows}
    """
    _check_words("regions", overrides)
    cells = region_localizers.plan(region_grid(overrides, Path(conf) if conf else None))
    command = f"nemo_bench.api.regions({', '.join(map(repr, overrides))})"
    folder = region_localizers.localize_regions(cells, command, progress=progress)
    return read_file(folder / REGION_FILES[0], RegionTable)


def _check_words(function: str, overrides: tuple[str, ...]) -> None:
    if not all(isinstance(word, str) for word in overrides):
        raise ConfigError(f"{function}{overrides}: expected words, each by itself, such as 'seeds=8'")


def read_scores(folder: Path | str) -> list[dict[str, Any]]:
    """All scores of a run, such as ``results/default``, as rows for a data frame.

    Returns:
        One row a score: ``cell``, ``label`` (shortest name that tells it from the other cells), ``model``, ``method``,
        ``prompts``, ``prompt``, ``text``, ``group``, ``seed`` (None for the score of a prompt), ``metric``, ``value``.

    Raises:
        StoreError: The folder holds no finished run.
    """
    rows: list[dict[str, Any]] = []
    for cell in load_results(folder).cells:
        own = {"cell": cell.name, "label": cell.label, "model": cell.model, "method": cell.method}
        for prompt in cell.prompts:
            outcome = cell.outcomes[prompt.id]
            about = {"prompts": cell.spec.prompts, "prompt": prompt.id, "text": prompt.text, "group": prompt.group}
            rows += [
                {**own, **about, "seed": seed, "metric": metric, "value": value}
                for seed in (None, *outcome.images)
                for metric, value in outcome.scores.get(seed, {}).items()
            ]
    return rows
