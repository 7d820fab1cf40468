"""What a wheel holds: every package, every YAML file and every file that the code reads."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nemo_bench

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same under its first name
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages(folder: Path, ending: str) -> set[str]:
    """Folders that hold such files, as package names, beginning with the folder's own."""
    files = (file for file in folder.rglob(f"*{ending}") if "__pycache__" not in file.parts)
    return {".".join(file.parent.relative_to(folder.parent).parts) for file in files}


def test_every_package_is_listed_once(project: dict[str, Any]) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    conf = {f"nemo_bench.{name}" for name in packages(ROOT / "conf", ".yaml")}
    assert sorted(listed) == sorted(packages(ROOT / "nemo_bench", ".py") | conf)
    assert project["tool"]["setuptools"]["package-dir"] == {"nemo_bench.conf": "conf"}


def test_every_folder_of_code_is_a_package() -> None:
    folders = {file.parent for file in (ROOT / "nemo_bench").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_every_data_file_is_packaged(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    packaged = {
        file
        for package in packages(ROOT / "nemo_bench", ".py")
        for pattern in (*patterns.get(package, ()), *patterns["*"])
        for file in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    files = {f for f in (ROOT / "nemo_bench").rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    data = {file for file in files if file.suffix != ".py" and not file.name.startswith(".")}
    assert sorted(data - packaged) == []
    assert any(file.suffix == ".png" for file in data)
    assert "*.yaml" in patterns["*"]


def test_types_are_declared() -> None:
    assert (ROOT / "nemo_bench" / "py.typed").is_file()


def test_versions_agree(project: dict[str, Any]) -> None:
    assert importlib.metadata.version("nemo-bench") == nemo_bench.__version__ == project["project"]["version"]


def test_public_names_are_there_and_sorted() -> None:
    assert all(hasattr(nemo_bench, name) for name in nemo_bench.__all__)
    assert nemo_bench.__all__ == sorted(nemo_bench.__all__)


def test_help_and_settings_wait_for_no_network_library() -> None:
    slow = ("torch", "diffusers", "transformers", "lightning", "wandb", "matplotlib")
    code = f"""import sys
from nemo_bench.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
import nemo_bench.config
assert not set({slow}) & set(sys.modules), sorted(set({slow}) & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "COMMAND" in done.stdout


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        nemo_bench.nothing  # noqa: B018
