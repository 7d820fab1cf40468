"""A small finished folder of each sort, made once, for tests that damage it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_bench.cli import main
from whole_folder import RUN, SMALL


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two methods and a detector, with the audit of a cell; not to be changed."""
    root = tmp_path_factory.mktemp("whole") / "results"
    assert main(["run", *RUN, f"root={root}"]) == 0
    assert main(["detect", *SMALL, "detector=magnitude", "name=whole", f"root={root}"]) == 0
    audit = ["--cell", "none", "steps=1", "samples=1", "images=1", "limit=1", "trainer=cpu"]
    assert main(["audit", str(root / "whole"), *audit]) == 0
    return root / "whole"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(whole.parent, tmp_path / "results")) / "whole"
