"""Imports go one way: read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemo_bench"

MAY_IMPORT = {
    "errors": set(),
    "environment": set(),
    "hub": {"errors"},
    "records": {"errors"},
    "config": {"errors", "records"},
    "diffusion": {"errors", "hub", "records"},
    "prompts": {"errors", "hub", "records"},
    "report": {"errors", "records"},
    "tracking": {"config", "errors", "records"},
    "metrics": {"diffusion", "errors", "hub", "records"},
    "planted": {"diffusion", "errors", "metrics", "prompts", "records"},
    "localization": {"diffusion", "errors", "prompts", "records"},
    "detectors": {"diffusion", "errors", "localization", "prompts", "records"},
    "monitor": {"detectors", "diffusion", "errors", "records"},
    "methods": {"diffusion", "errors", "localization", "metrics", "prompts", "records"},
    "benchmark": {
        "config", "detectors", "diffusion", "errors", "localization", "methods", "metrics", "prompts", "records",
        "report", "tracking",
    },
    "api": {"benchmark", "config", "diffusion", "errors", "prompts", "records", "report"},
    "cli": {"benchmark", "config", "environment", "errors", "planted", "prompts", "records", "report", "tracking"},
    "__main__": {"cli"},
}  # fmt: skip
"""What each part of the package may import, lowest first."""
PUBLIC = "nemo_bench"
"""The package's own file: it names everything public, and nothing below imports it."""


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


def parts_imported(name: str) -> set[str]:
    """Other parts of the package that a module imports."""
    return {part(found) for found in imports(name) if found.split(".")[0] == PUBLIC} - {part(name)}


def test_every_part_is_known() -> None:
    assert {part(name) for name in FILES} - {""} == set(MAY_IMPORT)


def test_allowed_imports_have_no_circle() -> None:
    below: set[str] = set()
    for name, allowed in MAY_IMPORT.items():
        assert allowed <= below, f"{name} would import what stands above it"
        below.add(name)


@pytest.mark.parametrize("name", sorted(set(FILES) - {PUBLIC}))
def test_module_imports_only_what_its_part_may(name: str) -> None:
    assert parts_imported(name) <= MAY_IMPORT[part(name)]


def test_parts_floors_and_imports_stay_few() -> None:
    arrows = {(part(name), other) for name in FILES for other in parts_imported(name)} - {("", "")}
    floor: dict[str, int] = {}
    for name in MAY_IMPORT:
        floor[name] = 1 + max((floor[other] for one, other in arrows if one == name), default=0)
    assert len(MAY_IMPORT) <= 20
    assert max(floor.values()) <= 9
    assert len(arrows) <= 90


@pytest.mark.parametrize("library", ["torch", "lightning", "diffusers", "torchmetrics", "open_clip"])
def test_results_are_read_without_a_model(library: str) -> None:
    found = {name for name in importers(library) if part(name) in ("report", "tracking", "errors", "records", "config")}
    assert found <= {"nemo_bench.tracking.lightning_logs"}


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("hydra", "config"),
        ("omegaconf", "config"),
        ("wandb", "tracking.wandb_runs"),
        ("aiohttp", "prompts.download"),
        ("ray", "benchmark.launch.ray"),
    ],
)
def test_a_library_has_one_importer(library: str, only: str) -> None:
    found = importers(library)
    assert found
    assert all(f"{name}.".startswith(f"nemo_bench.{only}.") for name in found)
