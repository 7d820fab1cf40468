"""Made-up runs, and the page of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_results import write_fake_results
from nemo_bench.records.results import load_results
from nemo_bench.report import write_report


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three methods on two models, which no test may change."""
    return write_fake_results(tmp_path_factory.mktemp("results") / "two", ["planted", "sd14"])


@pytest.fixture(scope="session")
def page(run: Path) -> str:
    """Its page."""
    return write_report(load_results(run)).read_text(encoding="utf-8")


@pytest.fixture
def default(tmp_path: Path) -> Path:
    """A run of three methods on one model, which a test may change."""
    return write_fake_results(tmp_path / "default")
