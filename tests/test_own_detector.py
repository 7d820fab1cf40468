"""The detector of docs/howto/detect.md, from outside the package with --conf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_bench import Diffusion, read_prompts
from nemo_bench.prompts.tasks import seeds_of
from on_disk import read_json, read_records
from shown import write_shown


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the page shows."""
    return write_shown("howto/detect.md", tmp_path / "own")


def command(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    found_in = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": found_in, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "nemo_bench.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=280, check=False, env=environment)


def test_own_detector_runs_and_is_compared(folder: Path, tmp_path: Path, prompt_file: Path, planted: Diffusion) -> None:
    own, model = ["detect", "--conf", str(folder / "my_conf")], ["model.steps=3", "trainer=cpu"]
    words = [*own, *model, "detector=magnitude_first,turn", f"root={tmp_path}", f"prompts.files=[{prompt_file}]"]
    done = command(folder, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (cell,) = (tmp_path / "default").glob("*__turn__*")
    assert read_json(cell / "spec.json")["citations"] == {}
    rows = {row["detector"]: row for row in read_json(tmp_path / "default" / "detection.json")["detectors"]}
    assert sorted(rows) == ["magnitude_first", "turn"]
    assert rows["turn"]["label"] == "Turn"
    scores = {record["prompt"]: record["score"] for record in read_records(cell, "detect").values()}
    timestep = planted.timesteps(3)[0]
    for prompt in read_prompts(prompt_file):
        latents, text = planted.latents(seeds_of(prompt, "generate", range(2))), planted.encode([prompt.text] * 2)
        with torch.no_grad():
            one, other = (planted.predict_noise(latents, timestep, t) for t in (text, planted.unconditional(2)))
        dot, lengths = (one * other).sum((1, 2, 3)), one.flatten(1).norm(dim=1) * other.flatten(1).norm(dim=1)
        assert scores[prompt.id] == pytest.approx(float((1 - dot / lengths).mean()), rel=1e-2)
    wrong = command(folder, *(word.replace("magnitude_first,", "") for word in words), "detector.seeds=0")
    assert wrong.returncode == 1
    assert "Turn: seeds=0; expected greater than or equal to 1" in wrong.stderr


def test_own_detector_is_listed_beside_those_of_the_package(folder: Path) -> None:
    done = command(folder, "ls", "detector", "--conf", str(folder / "my_conf"), "--json")
    assert done.returncode == 0, done.stderr
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert listed["turn"]["summary"] == "one minus the cosine of conditional and unconditional noise"
    assert listed["turn"]["citation"] == ""
    assert "magnitude" in listed
