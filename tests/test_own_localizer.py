"""The localizer of docs/howto/localizers.md, from outside the package with --conf."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from on_disk import read_json, read_records
from shown import write_shown


def test_own_localizer_runs_and_is_compared(tmp_path: Path, prompt_file: Path) -> None:
    folder = write_shown("howto/localizers.md", tmp_path / "own")
    found_in = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    words = ["localize", "--conf", str(folder / "my_conf"), "localizer=contrast,random_order", "localizer.number=3"]
    words += ["model.steps=2", "seeds=1", "localize_seeds=2", "trainer=cpu", f"root={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_bench.cli", *words, f"prompts.files=[{prompt_file}]", "--quiet"],
        capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "PYTHONPATH": found_in, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["localizer"]: row for row in read_json(tmp_path / "default" / "localizers.json")["rows"]}
    assert rows["contrast"]["label"] == "Contrast"
    assert rows["contrast"]["values"]["neurons"]["mean"] == 3
    (source,) = (tmp_path / "default").glob("*__contrast_neurons__*")
    files = [record.get("file") for record in read_records(source, "localize").values()]
    assert sum(file is not None for file in files) == 2  # the general prompt is not localized
