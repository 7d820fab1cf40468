"""Whether the classes that settings name can be found, asked without importing anything."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_bench.errors import ConfigError


def check_found(node: Any, key: str, conf: Path | None) -> None:
    """Makes sure that Python finds the module or package of every class that a node names.

    Args:
        node: ``_target_`` and arguments, which may be such nodes themselves.
        key: Where the node is, for messages.
        conf: The user's own folder of YAML files.

    Raises:
        ConfigError: It does not; the message has the folders that Python looks in.
    """
    if not isinstance(node, Mapping):
        return
    target = node.get("_target_")
    name = target.partition(".")[0] if isinstance(target, str) else ""
    if name and name not in sys.modules and not importlib.util.find_spec(name):
        raise ConfigError(f"{key}._target_={target}: can't be imported; {_where(name, conf)}")
    for argument, value in node.items():
        check_found(value, f"{key}.{argument}", conf)


def _where(name: str, conf: Path | None) -> str:
    """Where Python looked for a module, and what to do."""
    here = Path.cwd()
    near = [here, *([conf.resolve(), conf.resolve().parent] if conf else [])]
    folder = next((str(p) for p in near if (p / f"{name}.py").is_file() or (p / name).is_dir()), None)
    looked = ", ".join(path for path in (path or str(here) for path in sys.path) if Path(path).is_dir())
    found = f"{name} is in {folder}" if folder else f"name the folder that {name}.py is in"
    return (
        f"there is no module {name} in the folders that Python looks in: {looked}. (--conf is for YAML files alone.) "
        f"{found}: export PYTHONPATH={folder or 'FOLDER'}, or install its package"
    )
