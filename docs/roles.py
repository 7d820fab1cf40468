"""Turns the cross-references of docstrings (:class:`Neurons`) into links, and comments of fields into docstrings."""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, AliasResolutionError, Class, Extension, Module, NameResolutionError, Object

from nemo_bench.config.listing import field_texts

ROLE = re.compile(r":(?:class|meth|func|attr|data|mod):`([^`]+)`")


class Roles(Extension):
    """Resolves each role in the scope of its docstring."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Rewrites all docstrings of a package that has been read."""
        _rewrite(pkg, pkg)


def _rewrite(scope: Object, package: Module) -> None:
    if isinstance(scope, Class) and scope.docstring and (texts := field_texts(scope.source)):
        listed = "".join(f"\n    {name}: {text}" for name, text in texts.items())
        scope.docstring.value = f"{scope.docstring.value}\n\nAttributes:{listed}"
    if scope.docstring:
        scope.docstring.value = ROLE.sub(lambda match: _link(match[1], scope, package), scope.docstring.value)
    for member in scope.members.values():
        if isinstance(member, Object):
            _rewrite(member, package)


def _link(name: str, scope: Object, package: Module) -> str:
    """A link to an object or, if the docstring of its class describes it, to that; else a word in code."""
    text = f"`{name.removeprefix('nemo_bench.')}`"
    first, _, rest = name.partition(".")
    try:
        path = ".".join(filter(None, [scope.resolve(first), rest]))
        found = package[path.removeprefix(f"{package.path}.")]
    except (AliasResolutionError, KeyError, NameResolutionError):
        return text
    target = found if found.has_docstring else found.parent
    return f"[{text}][{target.canonical_path}]" if target and target.has_docstring and _is_shown(target) else text


def _is_shown(target: Object | Alias) -> bool:
    """Whether a page shows an object: its module has a page, or the package that has one exports its name."""
    outermost = target
    while outermost.parent and not outermost.parent.is_module:
        outermost = outermost.parent
    module = outermost.parent
    if target.is_module or module is None:
        return False
    has_page = module.path.count(".") == 1
    exports = (module if has_page else module.parent).exports
    return outermost.name in exports if exports is not None else has_page
