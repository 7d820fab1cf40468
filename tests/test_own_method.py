"""The mitigation of docs/howto/method.md, from outside the package: with --conf, and as an installed plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shown import write_shown

SMALL = ["seeds=2", "localize_seeds=2", "model.steps=3", "trainer=cpu", "method=none,words", "method.share=0.5"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the page shows."""
    own = write_shown("howto/method.md", tmp_path / "own")
    (own / "my_conf" / "__init__.py").touch()
    return own


def command(path: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "nemo_bench.cli", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def changed(root: Path) -> dict[str, float]:
    """Similarity of each group's images to those without the mitigation."""
    (path,) = (root / "default").glob("*__words__*/metrics.json")
    return {group: row["ssim_change"]["mean"] for group, row in json.loads(path.read_text())["aggregates"].items()}


def test_it_runs_with_files_of_ones_own_and_as_a_plugin(folder: Path, tmp_path: Path, prompt_file: Path) -> None:
    words = [*SMALL, f"prompts.files=[{prompt_file}]"]
    command(folder, "run", "--conf", str(folder / "my_conf"), *words, f"root={tmp_path / 'conf'}")
    here = changed(tmp_path / "conf")
    assert all(value < 0.95 for value in here.values())
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(folder)], check=True, capture_output=True)
    listing = json.loads(command(tmp_path / "site", "ls", "method", "--json"))
    assert {
        "group": "method",
        "name": "words",
        "summary": "random words of the prompt left out",
        "citation": "",
    } in listing
    command(tmp_path / "site", "run", *words, f"root={tmp_path / 'plugin'}")
    assert changed(tmp_path / "plugin") == here


def test_a_plugin_that_is_broken_is_named(folder: Path, tmp_path: Path) -> None:
    about = tmp_path / "site" / "broken-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[nemo_bench.conf]\nbroken = not_there.conf\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    line = [sys.executable, "-m", "nemo_bench.cli", "ls", "method"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 1
    assert "plugin broken: its package of settings not_there.conf can't be imported" in done.stderr
