"""Groups of YAML files: of the package, of installed plugins and of the user."""

from __future__ import annotations

import importlib
import importlib.metadata
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nemo_bench.config.targets import targets_in
from nemo_bench.errors import ConfigError, did_you_mean

GROUPS = (
    "model",
    "method",
    "detector",
    "localizer",
    "region",
    "prompts",
    "metrics",
    "trainer",
    "logger",
    "launcher",
    "experiment",
)
HOW = ("trainer", "logger", "launcher")
"""Groups of how a cell is run, which change no result."""
LISTED = (*GROUPS, "sweeps")
"""All that is listed: the groups, and files for W&B's sweep agent."""
PLUGINS = "nemo_bench.conf"
"""Entry points of installed packages with YAML files: ``name = "package.with.folders"``."""


def options(group: str, conf: Path | None = None) -> list[str]:
    """Options of one of the groups :data:`LISTED`, those of the user's folder included.

    Raises:
        ConfigError: There is no such group.
    """
    if group not in LISTED:
        raise ConfigError(f"unknown group '{group}'. {did_you_mean(group, LISTED)}")
    return sorted({path.stem for folder in _folders(group, conf) for path in folder.glob("[!.]*.yaml")})


def file_of(group: str, name: str, conf: Path | None) -> Path:
    """The YAML file of one of :func:`options`."""
    return next(path for folder in _folders(group, conf) if (path := folder / f"{name}.yaml").is_file())


def read_option(group: str, name: str, conf: Path | None) -> dict[str, Any]:
    """The content of the YAML file of one of :func:`options`."""
    path = file_of(group, name, conf)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected key: value lines, given {type(content).__name__}")
    return content


def own_folders(conf: Path | None) -> list[Path]:
    """Folders of YAML files of installed plugins and of the user."""
    return [*(Path(str(resources.files(name))) for name in _plugins()), *([conf] if conf else [])]


def _folders(group: str, conf: Path | None) -> list[Path]:
    """Folders of a group; of two files of one name Hydra takes the first one."""
    return [folder / group for folder in (Path(str(resources.files("nemo_bench.conf"))), *own_folders(conf))]


def named_classes(conf: Path | None) -> set[str]:
    """Classes that YAML files of the user and of installed plugins name as ``_target_``, at any depth."""
    found: set[str] = set()
    for path in (path for folder in own_folders(conf) for path in sorted(folder.rglob("*.yaml"))):
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # an error where the file is chosen
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            found.update(target for _, target in targets_in(content))
    return found


@cache
def _plugins() -> list[str]:
    """Packages of YAML files of installed plugins, sorted by the names of the plugins."""
    found = sorted(importlib.metadata.entry_points(group=PLUGINS))
    for entry in found:
        try:
            importlib.import_module(entry.value)
        except ImportError as error:
            msg = f"plugin {entry.name}: its package of settings {entry.value} can't be imported ({error})"
            raise ConfigError(f"{msg}; mend or uninstall it") from error
    return [entry.value for entry in found]
