"""What the package's own classes say of themselves, read from their source: importing them takes seconds of torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path

from hydra.utils import get_object

PACKAGE = "nemo_bench"


def said(path: str, name: str) -> str:
    """A class attribute that is a text.

    Args:
        path: The class, such as ``nemo_bench.methods.NeMo``; a class from elsewhere is imported.
        name: The attribute, such as ``summary``.
    """
    module, _, class_name = path.rpartition(".")
    text = None
    if path.startswith(f"{PACKAGE}."):
        text = next(_texts(module, class_name, name), None)
    return getattr(get_object(path), name) if text is None else text


def _texts(module: str, class_name: str, name: str) -> Iterator[str]:
    """What the class, then its bases, set an attribute to, as far as their source shows it."""
    for place, found in _find(module, class_name):
        if not isinstance(found, ast.ClassDef):
            continue
        for statement in found.body:
            if name in _targets(statement) and (text := _text(place, statement.value)) is not None:  # type: ignore[attr-defined]
                yield text
        for base in found.bases:
            if isinstance(base, ast.Name):
                yield from _texts(place, base.id, name)


def _text(module: str, node: ast.expr | None) -> str | None:
    """The text that an expression stands for: written there, a constant, or an attribute of a class."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name):
        texts = (_text(place, getattr(found, "value", None)) for place, found in _find(module, node.id))
        return next((text for text in texts if text is not None), None)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return next(_texts(module, node.value.id, node.attr), None)
    return None


def _find(module: str, name: str) -> Iterator[tuple[str, ast.stmt]]:
    """Where a module has a name from, followed through imports: the module and the statement."""
    for statement in _source(module).body:
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith(PACKAGE):
            for alias in statement.names:
                if name == (alias.asname or alias.name):
                    yield from _find(statement.module, alias.name)
        elif name in _targets(statement) or (isinstance(statement, ast.ClassDef) and statement.name == name):
            yield module, statement


def _targets(statement: ast.stmt) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@cache
def _source(module: str) -> ast.Module:
    path = Path(str(resources.files(PACKAGE))).joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))
