"""Lists of options with descriptions."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_object

from nemo_bench.config.about import class_text
from nemo_bench.config.composition import one
from nemo_bench.config.groups import LISTED, file_of, options, read_option
from nemo_bench.config.targets import build
from nemo_bench.errors import ConfigError, did_you_mean


def describe_options(group: str, conf: Path | None = None) -> list[dict[str, str]]:
    """Describes all options of a group, for ``nemo-bench ls GROUP``.

    Args:
        group: A group, or ``sweeps``.
        conf: The user's folder of YAML files.

    Returns:
        Objects with group, name, summary and citation; a metrics file gives one per metric, ``FILE/METRIC``.

    Raises:
        ConfigError: There is no such group.
    """
    entries = []
    for name in options(group, conf):
        if group == "metrics":
            nodes = one([f"metrics={name}", "method=none"], conf).settings.metrics
            metrics = {key: build(node, f"metrics.{key}") for key, node in nodes.items()}
            entries += [(f"{name}/{key}", metric.description, metric.citation) for key, metric in metrics.items()]
            continue
        content = _content(group, name, conf)
        if target := content.get("_target_"):
            entries.append((name, class_text(target, "summary"), class_text(target, "citation")))
        else:
            summary = content.get("summary") or _first_comment(file_of(group, name, conf))
            entries.append((name, summary, content.get("citation") or ""))
    return [{"group": group, "name": name, "summary": text, "citation": source} for name, text, source in entries]


def overview(conf: Path | None = None) -> list[dict[str, str]]:
    """Describes the options of all groups, for ``nemo-bench ls``, without importing any class of the package.

    Args:
        conf: The user's folder of YAML files.

    Returns:
        Objects with group, name and summary; the summary of a metrics file is the names of its metrics.
    """
    entries = []
    for group in LISTED:
        if group == "metrics":
            for name in options(group, conf):
                metrics = [key for key in _content(group, name, conf) if key != "defaults"]
                entries.append({"group": group, "name": name, "summary": ", ".join(metrics)})
        elif group not in ("trainer", "logger"):
            entries += describe_options(group, conf)
    return entries


def explain_option(group: str, name: str, conf: Path | None = None) -> str:
    """Shows everything that can be set of one option.

    Args:
        group: A group, or ``sweeps``.
        name: One of its options, or a metric.
        conf: The user's folder of YAML files.

    Returns:
        Its YAML file and the docstring of its class, if it names one; of a metric the part of each file.

    Raises:
        ConfigError: There is no such option.
    """
    choices = options(group, conf)
    if name in choices:
        path = file_of(group, name, conf)
        target = _content(group, name, conf).get("_target_")
        return "\n".join([f"# {path}", path.read_text(encoding="utf-8"), *_docstring(target)])
    files = {file: _content(group, file, conf) for file in choices} if group == "metrics" else {}
    nodes = [content[name] for content in files.values() if name in content and name != "defaults"]
    if not nodes:
        known = {*choices, *(key for content in files.values() for key in content)} - {"defaults"}
        raise ConfigError(f"unknown {group} '{name}'. {did_you_mean(name, known)}")
    parts = []
    for node in (node for place, node in enumerate(nodes) if node not in nodes[:place]):
        same = [file for file, content in files.items() if content.get(name) == node]
        settings = one([f"metrics={same[0]}", "method=none"], conf).settings
        metric = build(settings.metrics[name], f"metrics.{name}")
        parts += [f"# metrics={','.join(same)}", f"# {metric.title}: {metric.description}"]
        parts += [yaml.safe_dump({name: node}, sort_keys=False, allow_unicode=True), *_docstring(node["_target_"])]
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
    """The content of a file, on top of the files of its group that it begins with."""
    content = read_option(group, name, conf)
    for other in content.get("defaults") or []:
        if isinstance(other, str) and other in options(group, conf) and other != name:
            content = {**_content(group, other, conf), **content}
    return content


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line[1:].strip() for line in lines if line.startswith("#") and not line.startswith("# @"))
    return next(comments, "")


def _docstring(target: str | None) -> list[str]:
    text = inspect.getdoc(get_object(target)) if target else None
    return [f"{target}:", text] if text else []


def about_method(name: str, conf: Path | None) -> tuple[dict[str, Any], str, str]:
    """Describes the method of images made by other code.

    Args:
        name: A method of the group, or any other name.
        conf: The user's folder of YAML files.

    Returns:
        Settings that identify it, its title and its citation.
    """
    if name not in options("method", conf):
        return {"name": name}, name, ""
    node = one([f"method={name}"], conf).settings.method
    target = get_object(node["_target_"])
    return ({"name": name} if name != "none" else dict(node)), target.title, target.citation
