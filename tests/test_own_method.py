"""The mitigation of docs/howto/method.md, from outside the package: with --conf, and as an installed plugin."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batches import batch_of, images_of
from nemo_bench import Diffusion
from nemo_bench.methods import Method, NoMitigation
from on_disk import read_records
from shown import write_shown

SMALL = [
    "seeds=2", "localize_seeds=2", "model.steps=3", "trainer=cpu", "method=none,words,fainter,capped",
    "method.share=0.5",
]  # fmt: skip
OWN = ("words", "fainter", "capped")


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
    """Similarity of each mitigation's images to those without one."""
    paths = {name: next((root / "default").glob(f"*__{name}__*/metrics.json")) for name in OWN}
    return {
        name: json.loads(path.read_text())["aggregates"]["all"]["ssim_change"]["mean"] for name, path in paths.items()
    }


def test_own_methods_run_from_a_folder_and_as_a_plugin(folder: Path, tmp_path: Path, prompt_file: Path) -> None:
    words = [*SMALL, f"prompts.files=[{prompt_file}]"]
    command(folder, "run", "--conf", str(folder / "my_conf"), *words, f"root={tmp_path / 'conf'}")
    here = changed(tmp_path / "conf")
    assert all(value < 0.95 for value in here.values())
    cell = next((tmp_path / "conf" / "default").glob("*__fainter__*"))
    assert all(record["notes"]["moved"] > 0 for record in read_records(cell, "generate").values())
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


def test_broken_plugin_is_named(folder: Path, tmp_path: Path) -> None:
    about = tmp_path / "site" / "broken-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[nemo_bench.conf]\nbroken = not_there.conf\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    line = [sys.executable, "-m", "nemo_bench.cli", "ls", "method"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 1
    assert "plugin broken: its package of settings not_there.conf can't be imported" in done.stderr


def made(folder: Path, module: str, kind: str, **options: float) -> Method:
    """A mitigation of the page, its module read from there."""
    spec = importlib.util.spec_from_file_location(module, folder / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return getattr(found, kind)(**options)


def test_own_methods_without_strength_change_nothing(folder: Path, tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    plain = images_of(tiny, NoMitigation(), batch)
    assert torch.equal(images_of(tiny, made(folder, "my_embeddings", "Fainter", share=0.0), batch), plain)
    torch.testing.assert_close(images_of(tiny, made(folder, "my_guidance", "Capped", limit=math.inf), batch), plain)


def test_own_methods_at_full_strength_remove_the_prompt(folder: Path, tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    empty = images_of(tiny, NoMitigation(), replace(batch, text=tiny.unconditional(2)))
    for method in (
        made(folder, "my_embeddings", "Fainter", share=1.0),
        made(folder, "my_guidance", "Capped", limit=1e-9),
    ):
        torch.testing.assert_close(images_of(tiny, method, batch), empty, rtol=0, atol=1e-3)


def test_missing_class_lists_the_folders_of_python(folder: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    line = ["-m", "nemo_bench.cli", "run", "--conf", str(folder / "my_conf"), "method=none,words"]
    # Torch takes seconds to import, and is not there when the message comes.
    script = (
        f"import sys, runpy; sys.argv = {line[1:]!r}\ntry:\n    runpy.run_module('nemo_bench.cli', run_name='__main__')"
    )
    script += "\nfinally:\n    print('torch' in sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "method._target_=my_methods.FewerWords: can't be imported; there is no module my_methods" in done.stderr
    assert f"my_methods is in {folder}: export PYTHONPATH={folder}" in done.stderr
    assert all(path in done.stderr for path in sys.path if path.endswith("site-packages"))
    assert done.stdout.strip() == "False"
