"""Lists of options with descriptions."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_object

from nemo_bench.config.composition import one
from nemo_bench.config.groups import HOW, LISTED, file_of, options, read_option
from nemo_bench.config.targets import build
from nemo_bench.errors import ConfigError, did_you_mean
from nemo_bench.records.citations import cite

PACKAGE = "nemo_bench"

_FIELD = re.compile(r"^((?:    #: .*\n)*)    (\w+): .*?(?:  #: (.*))?$", re.MULTILINE)


def describe_options(group: str, conf: Path | None = None) -> list[dict[str, str]]:
    """Describes all options of a group, for ``nemo-bench ls GROUP``.

    Args:
        group: A group, or ``sweeps``.
        conf: The user's folder of YAML files.

    Returns:
        Group, name, summary and citation of each; a metrics file gives one per metric, ``FILE/METRIC``.

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

    Gives group, name and summary of each; the summary of a metrics file is the names of its metrics.
    """
    entries = []
    for group in LISTED:
        if group == "metrics":
            for name in options(group, conf):
                metrics = [key for key in _content(group, name, conf) if key != "defaults"]
                entries.append({"group": group, "name": name, "summary": ", ".join(metrics)})
        elif group not in HOW:
            entries += describe_options(group, conf)
    return entries


def explain_option(group: str, name: str, conf: Path | None = None) -> str:
    """Shows all that can be set of an option: its YAML file, and the docstring of its class if it names one.

    A metric is explained by its part of each file.
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
    """What a class says of itself and, in comments, of its settings and those of its bases."""
    kind = get_object(target) if target else None
    text = inspect.getdoc(kind)
    if not kind or not text:
        return []
    sources = [inspect.getsource(base) for base in reversed(kind.__mro__) if base.__module__ != "builtins"]
    texts = {name: about for source in sources for name, about in field_texts(source).items()}
    names = [name for name in inspect.signature(kind).parameters if name in texts]
    return [f"{target}:", text, *([""] if names else []), *(f"  {name}: {texts[name]}" for name in names)]


def field_texts(source: str) -> dict[str, str]:
    """What the source of a class says of its fields in comments ``#:``, behind a field or in the lines above it."""
    found = {name: f"{above.replace('#:', '')}{behind}" for above, name, behind in _FIELD.findall(source)}
    return {name: " ".join(text.split()) for name, text in found.items() if text}


def about_method(name: str, conf: Path | None) -> tuple[dict[str, Any], str, str]:
    """Settings that identify the method of images made by other code, known here or not, its title and citation."""
    if name not in options("method", conf):
        return {"name": name}, name, ""
    node = one([f"method={name}"], conf).settings.method
    target = get_object(node["_target_"])
    return ({"name": name} if name != "none" else dict(node)), target.title, target.citation


def class_text(path: str, name: str) -> str:
    """A class attribute that is a text, such as ``summary`` of ``nemo_bench.methods.NeMo``.

    It is read from the source of a package of ours, since importing that takes seconds of torch; other classes, and
    texts that are put together, are imported.
    """
    package, _, class_name = path.rpartition(".")
    text = _text(_classes(package), class_name, name) if package.startswith(f"{PACKAGE}.") else None
    return getattr(get_object(path), name) if text is None else text


def _text(classes: Mapping[str, ast.ClassDef], class_name: str, name: str) -> str | None:
    """The text that a class, or else the first of its bases, assigns to a name."""
    if class_name not in classes:
        return None
    kind = classes[class_name]
    own = (_assigned(statement, name) for statement in kind.body)
    bases = (_text(classes, base.id, name) for base in kind.bases if isinstance(base, ast.Name))
    return next((text for text in (*own, *bases) if text is not None), None)


def _assigned(statement: ast.stmt, name: str) -> str | None:
    """The text, written out or cited, that a statement assigns to a name."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    if [target.id for target in targets if isinstance(target, ast.Name)] != [name]:
        return None
    match statement.value:  # type: ignore[attr-defined]
        case ast.Constant(value=str(text)):
            return text
        case ast.Call(func=ast.Name(id="cite"), args=[ast.Constant(value=str(key))]):
            return cite(key)
    return None


@cache
def _classes(package: str) -> dict[str, ast.ClassDef]:
    """The classes of a package by name."""
    folder = Path(str(resources.files(PACKAGE))).joinpath(*package.split(".")[1:])
    statements = (statement for file in folder.glob("*.py") for statement in ast.parse(file.read_text("utf-8")).body)
    return {statement.name: statement for statement in statements if isinstance(statement, ast.ClassDef)}
