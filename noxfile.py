"""Tests with the lowest and with the newest versions of what the package needs, on every Python that it supports."""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "uv"
PYTHONS = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))
RESOLUTIONS = [nox.param("lowest-direct", id="lowest"), nox.param("highest", id="newest")]

TESTS = (
    "tests/test_package.py",
    "tests/test_api.py",
    "tests/diffusion/test_source.py",
    "tests/metrics/test_clip.py",
    "tests/records/test_schema.py",
    "tests/tracking/test_lightning_logs.py",
    "tests/tracking/test_live.py::test_a_wandb_run_holds_what_is_known_in_the_middle_and_everything_at_the_end",
)
"""What meets other packages most: imports, loading, a run, files of results, W&B and the loggers of Lightning."""


@nox.session(python=PYTHONS)
@nox.parametrize("resolution", RESOLUTIONS)
def versions(session: nox.Session, resolution: str) -> None:
    """Runs tests with the lowest or the newest versions; other tests than :data:`TESTS` are given after ``--``."""
    session.install("--resolution", resolution, "-e", ".[test]", silent=False)
    session.run("pytest", *(session.posargs or TESTS))
