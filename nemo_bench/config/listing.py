"""What can be chosen, and what it is."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_object

from nemo_bench.config.composition import choose, one
from nemo_bench.config.groups import folders, options
from nemo_bench.config.targets import build
from nemo_bench.errors import ConfigError, nearest


def describe_options(group: str, conf: Path | None = None) -> list[dict[str, str]]:
    """What ``nemo-bench ls`` shows of a group.

    Args:
        group: One of :data:`GROUPS`.
        conf: The user's own folder.

    Returns:
        Objects with group, name, summary and citation; a metrics file gives one per metric, ``FILE/METRIC``.

    Raises:
        ConfigError: There is no such group.
    """
    entries = []
    for name in options(group, conf):
        settings = choose([f"{group}={name}", *(["method=none"] if group != "method" else [])], conf).settings
        if group in ("method", "detector"):
            target = get_object(getattr(settings, group)["_target_"])
            entries.append((name, target.summary, target.citation))
        elif group == "metrics":
            for metric, node in settings.metrics.items():
                built = build(node, f"metrics.{metric}")
                entries.append((f"{name}/{metric}", built.description, built.citation))
        else:
            node = settings if group == "experiment" else getattr(settings, group)
            entries.append((name, getattr(node, "summary", ""), getattr(node, "citation", "")))
    keys = ("name", "summary", "citation")
    return [{"group": group, **dict(zip(keys, entry, strict=True))} for entry in entries]


def explain_option(group: str, name: str, conf: Path | None = None) -> str:
    """What can be set of one option of a group.

    Args:
        group: One of :data:`GROUPS`.
        name: One of :func:`options`.
        conf: The user's own folder.

    Returns:
        Its YAML file, with the words of the class that it names, if it names one.

    Raises:
        ConfigError: There is no such option.
    """
    if name not in (choices := options(group, conf)):
        raise ConfigError(f"unknown {group} '{name}'. {nearest(name, choices)}")
    path = next(p for folder in folders(group, conf) if (p := folder / f"{name}.yaml").is_file())
    text = path.read_text(encoding="utf-8")
    target = dict(yaml.safe_load(text)).get("_target_")
    words = inspect.getdoc(get_object(target)) if target else None
    return "\n".join([f"# {path}", text, *([f"{target}:", words] if words else [])])


def about_method(name: str, conf: Path | None) -> tuple[dict[str, Any], str, str]:
    """What a name says of how images were made.

    Args:
        name: A method of the group, or any other name.
        conf: The user's own folder.

    Returns:
        Settings that stand for it, its title and its citation.
    """
    if name not in options("method", conf):
        return {"name": name}, name, ""
    node = one([f"method={name}"], conf).settings.method
    target = get_object(node["_target_"])
    return ({"name": name} if name != "none" else dict(node)), target.title, target.citation
