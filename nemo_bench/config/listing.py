"""What can be chosen, and what it is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_object

from nemo_bench.config.about import said
from nemo_bench.config.composition import choose, one
from nemo_bench.config.groups import LISTED, file_of, options
from nemo_bench.config.targets import build
from nemo_bench.errors import ConfigError, did_you_mean


def describe_options(group: str, conf: Path | None = None) -> list[dict[str, str]]:
    """What ``nemo-bench ls GROUP`` shows.

    Args:
        group: One of :data:`LISTED`.
        conf: The user's own folder.

    Returns:
        Objects with group, name, summary and citation; a metrics file gives one per metric, ``FILE/METRIC``.

    Raises:
        ConfigError: There is no such group.
    """
    entries = []
    for name in options(group, conf):
        if group == "metrics":
            settings = choose([f"{group}={name}", "method=none"], conf).settings
            for metric, node in settings.metrics.items():
                built = build(node, f"metrics.{metric}")
                entries.append((f"{name}/{metric}", built.description, built.citation))
            continue
        content = _content(group, name, conf)
        target = content.get("_target_")
        if target:
            entries.append((name, said(target, "summary"), said(target, "citation")))
        else:
            # What has no summary begins with a comment.
            summary = content.get("summary") or _first_comment(file_of(group, name, conf))
            entries.append((name, summary, content.get("citation") or ""))
    keys = ("name", "summary", "citation")
    return [{"group": group, **dict(zip(keys, entry, strict=True))} for entry in entries]


def overview(conf: Path | None = None) -> list[dict[str, str]]:
    """What ``nemo-bench ls`` shows, without importing any class of the package's own.

    Args:
        conf: The user's own folder.

    Returns:
        Objects with group, name and summary; that of a metrics file is the names of its metrics.
    """
    entries = []
    for group in (group for group in LISTED if group not in ("trainer", "logger")):
        if group == "metrics":
            for name in options(group, conf):
                metrics = [key for key in _content(group, name, conf) if key != "defaults"]
                entries.append({"group": group, "name": name, "summary": ", ".join(metrics)})
        else:
            entries += describe_options(group, conf)
    return entries


def explain_option(group: str, name: str, conf: Path | None = None) -> str:
    """What can be set of one option of a group.

    Args:
        group: One of :data:`LISTED`.
        name: One of its options, or a metric.
        conf: The user's own folder.

    Returns:
        Its YAML file, with the words of the class that it names, if it names one; of a metric what each file says.

    Raises:
        ConfigError: There is no such option.
    """
    choices = options(group, conf)
    if name in choices:
        path = file_of(group, name, conf)
        target = _content(group, name, conf).get("_target_")
        return "\n".join([f"# {path}", path.read_text(encoding="utf-8"), *_words(target)])
    metrics = {file: _content(group, file, conf) for file in choices} if group == "metrics" else {}
    having = {file: content[name] for file, content in metrics.items() if name in content and name != "defaults"}
    if not having:
        known = {*choices, *(key for content in metrics.values() for key in content)} - {"defaults"}
        raise ConfigError(f"unknown {group} '{name}'. {did_you_mean(name, known)}")
    parts = []
    for node in (node for place, node in enumerate(having.values()) if node not in list(having.values())[:place]):
        files = [file for file, other in having.items() if other == node]
        settings = choose([f"metrics={files[0]}", "method=none"], conf).settings
        built = build(settings.metrics[name], f"metrics.{name}")
        text = yaml.safe_dump({name: node}, sort_keys=False, allow_unicode=True)
        parts += [
            f"# metrics={','.join(files)}",
            f"# {built.title}: {built.description}",
            text,
            *_words(node["_target_"]),
        ]
    return "\n".join(parts)


def short(citation: str) -> str:
    r"""A source in a few words: ``Wen et al. 2024`` for BibTeX, other text as it is.

    Example:
        >>> short("@misc{x,\n  author = {Ho, Jonathan and Salimans, Tim},\n  year = {2022}\n}")
        'Ho and Salimans 2022'
    """
    author, year = (re.search(rf"\b{field} *= *{{(.*?)}},? *\n", citation, re.DOTALL) for field in ("author", "year"))
    if not author or not year:
        return citation
    names = [name.split(",")[0] if "," in name else name.split()[-1] for name in re.split(r"\s+and\s+", author[1])]
    return f"{' and '.join(names) if len(names) < 3 else f'{names[0]} et al.'} {year[1]}"


def _content(group: str, name: str, conf: Path | None) -> dict[str, Any]:
    """What a file says, on top of the files of its group that it begins with."""
    path = file_of(group, name, conf)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected key: value lines, given {type(content).__name__}")
    for other in content.get("defaults") or []:
        if isinstance(other, str) and other in options(group, conf) and other != name:
            content = {**_content(group, other, conf), **content}
    return content


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line[1:].strip() for line in lines if line.startswith("#") and not line.startswith("# @"))
    return next(comments, "")


def _words(target: str | None) -> list[str]:
    words = inspect.getdoc(get_object(target)) if target else None
    return [f"{target}:", words] if words else []


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
