"""Lower never imports higher: read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemo_bench"

LAYERS = (
    {"types", "errors", "stopping", "citations", "signals", "environment", "hub", "pictures", "processes", "terminal"},
    {"store"},
    {"diffusion", "prompts", "aggregate"},
    {"localization", "methods", "detectors", "metrics", "references", "elsewhere"},
    {"modules"},
    {"cells"},
    {"runner"},
    {"run"},
    {"forecast", "library", "scoring", "detection"},
    {"audit"},
    {"launchers", "cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
READERS = {
    "types",
    "errors",
    "citations",
    "aggregate",
    "store",
    "config",
    "report",
}  # what may be used by all that only looks at results
ASIDE = {
    "config": {"config", "errors"},
    "report": READERS,
    "tracking": {*READERS, "tracking"},
    "planted": {"planted", "errors", "types"},
}
"""Parts that stand beside the layers, with what they may import."""


def name_of(path: Path) -> str:
    """``nemo_bench.report.data`` for its file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(name: str) -> frozenset[str]:
    """Modules that a module imports; a name imported from a package counts as module where it is one."""
    found = set()
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.add(full if full in FILES else source)
    return frozenset(found)


def part(name: str) -> str:
    """The part of the package a module is in, empty for the package's own file."""
    return name.removeprefix("nemo_bench").removeprefix(".").split(".")[0]


def importers(library: str) -> set[str]:
    return {name for name in FILES if any(found.split(".")[0] == library for found in imports(name))}


def ours(name: str) -> set[str]:
    return {found for found in imports(name) if found.split(".")[0] == "nemo_bench"}


def test_every_part_has_its_place() -> None:
    assert {part(name) for name in FILES} - {""} <= set(RANK) | set(ASIDE)


@pytest.mark.parametrize("name", [name for name in FILES if part(name) in RANK])
def test_lower_never_imports_higher(name: str) -> None:
    for found in ours(name):
        assert part(found), f"{name} imports {found}, the package itself, which imports everything"
        if part(found) in RANK:
            assert RANK[part(found)] <= RANK[part(name)], f"{name} imports {found}"
        else:
            assert RANK[part(name)] >= RANK["cells"], f"{name} imports {found}"


@pytest.mark.parametrize("name", [name for name in FILES if part(name) in ASIDE])
def test_what_stands_aside_imports_little(name: str) -> None:
    assert {part(found) for found in ours(name)} <= ASIDE[part(name)]


def test_store_and_types_stand_on_plain_data_only() -> None:
    assert {part(found) for found in ours("nemo_bench.records.store")} == {"errors", "types", "pictures"}
    assert ours("nemo_bench.records.data") == {"nemo_bench.errors"}
    assert ours("nemo_bench.errors") == set()


def test_parts_do_not_import_each_other_in_circles() -> None:
    graph = {p: {part(f) for n in FILES if part(n) == p for f in ours(n)} - {p, ""} for p in {*map(part, FILES)} - {""}}
    while graph:
        leaves = {p for p, needed in graph.items() if not needed & set(graph)}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {p: needed for p, needed in graph.items() if p not in leaves}


@pytest.mark.parametrize("library", ["torch", "lightning", "diffusers", "torchmetrics", "open_clip"])
def test_reports_need_no_model(library: str) -> None:
    found = {name for name in importers(library) if part(name) in ("report", "tracking", "types", "errors", "store")}
    assert found <= {"nemo_bench.tracking.lightning_logs"}


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("hydra", "config"),
        ("omegaconf", "config"),
        ("wandb", "tracking.wandb_runs"),
        ("aiohttp", "references"),
    ],
)
def test_a_library_has_one_importer(library: str, only: str) -> None:
    found = importers(library)
    assert found
    assert all(f"{name}.".startswith(f"nemo_bench.{only}.") for name in found)
