"""Texts of the package's own classes, read from their source: importing them takes seconds of torch."""

from __future__ import annotations

import ast
from functools import cache
from importlib import resources
from pathlib import Path

from hydra.utils import get_object

from nemo_bench.records.citations import cite

PACKAGE = "nemo_bench"


def class_text(path: str, name: str) -> str:
    """A class attribute that is a text; classes outside this package are imported for it.

    Args:
        path: The class, such as ``nemo_bench.methods.NeMo``.
        name: The attribute, such as ``summary``.
    """
    module, _, class_name = path.rpartition(".")
    text = _attribute(module, class_name, name) if path.startswith(f"{PACKAGE}.") else None
    return getattr(get_object(path), name) if text is None else text


def _attribute(module: str, class_name: str, name: str) -> str | None:
    """The text that a class, or the first of its bases, assigns to an attribute; None where the source has none."""
    place, statement = _definition(module, class_name)
    if not isinstance(statement, ast.ClassDef):
        return None
    own = [_text(place, s.value) for s in statement.body if name in _targets(s)]  # type: ignore[attr-defined]
    bases = (_attribute(place, base.id, name) for base in statement.bases if isinstance(base, ast.Name))
    return next((text for texts in (own, bases) for text in texts if text is not None), None)


def _text(module: str, node: ast.expr | None) -> str | None:
    """The text of an expression: a literal, a constant, an attribute of a class, or a citation."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Call(func=ast.Name(id="cite"), args=[ast.Constant(value=str(key))]):
            return cite(key)
        case ast.Name(id=name):
            place, statement = _definition(module, name)
            return _text(place, getattr(statement, "value", None))
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            return _attribute(module, name, attribute)
    return None


def _definition(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """The module and statement that define a name, imports followed."""
    for statement in _source(module).body:
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith(PACKAGE):
            for alias in statement.names:
                if name == (alias.asname or alias.name):
                    return _definition(statement.module, alias.name)
        elif name in _targets(statement) or (isinstance(statement, ast.ClassDef) and statement.name == name):
            return module, statement
    return module, None


def _targets(statement: ast.stmt) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@cache
def _source(module: str) -> ast.Module:
    path = Path(str(resources.files(PACKAGE))).joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))
