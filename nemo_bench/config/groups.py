"""Groups of YAML files: those of the package, of installed plugins, and the user's own."""

from __future__ import annotations

import importlib
import importlib.metadata
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nemo_bench.errors import ConfigError, did_you_mean

GROUPS = ("model", "method", "detector", "prompts", "metrics", "trainer", "logger", "experiment")
LISTED = (*GROUPS, "sweeps")
"""What there is a list of: the groups, and files for W&B's sweep agent."""
PLUGINS = "nemo_bench.conf"
"""Entry points of installed packages that bring YAML files of their own: ``name = "package.with.folders"``."""


def options(group: str, conf: Path | None = None) -> list[str]:
    """Names that can be chosen in a group.

    Args:
        group: One of :data:`LISTED`.
        conf: The user's own folder.

    Raises:
        ConfigError: There is no such group.
    """
    if group not in LISTED:
        raise ConfigError(f"unknown group '{group}'. {did_you_mean(group, LISTED)}")
    return sorted({path.stem for folder in folders(group, conf) for path in folder.glob("[!.]*.yaml")})


def folders(group: str, conf: Path | None) -> list[Path]:
    """Where the files of a group are, the package's own first: of two files of one name Hydra takes that one."""
    packages = ["nemo_bench.conf", *plugins()]
    return [*(Path(str(resources.files(name))) / group for name in packages), *([conf / group] if conf else [])]


def file_of(group: str, name: str, conf: Path | None) -> Path:
    """The YAML file of an option, which is one of :func:`options`."""
    return next(path for folder in folders(group, conf) if (path := folder / f"{name}.yaml").is_file())


def named_classes(conf: Path | None) -> set[str]:
    """Classes that YAML files of the user's own folder and of installed plugins name as ``_target_``, at any depth."""
    places = [*(Path(str(resources.files(name))) for name in plugins()), *([conf] if conf else [])]
    found: set[str] = set()
    for path in (path for place in places for path in sorted(place.rglob("*.yaml"))):
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # told of where it is chosen
            found |= _targets_in(yaml.safe_load(path.read_text(encoding="utf-8")))
    return found


def _targets_in(node: Any) -> set[str]:
    found: set[str] = set()
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            found.add(node["_target_"])
        node = list(node.values())
    return found.union(*map(_targets_in, node)) if isinstance(node, list) else found


@cache
def plugins() -> list[str]:
    """Packages of YAML files that installed plugins name, in order of their names.

    Raises:
        ConfigError: One can't be imported.
    """
    found = sorted(importlib.metadata.entry_points(group=PLUGINS))
    for entry in found:
        try:
            importlib.import_module(entry.value)
        except ImportError as error:
            msg = f"plugin {entry.name}: its package of settings {entry.value} can't be imported ({error})"
            raise ConfigError(f"{msg}; mend or uninstall it") from error
    return [entry.value for entry in found]
