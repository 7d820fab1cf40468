"""The SkyPilot file of the documentation, checked by SkyPilot itself.

Its requirements do not go well with others: it may have an environment of its own, whose Python ``SKYPILOT_PYTHON`` is.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = os.environ.get("SKYPILOT_PYTHON") or (sys.executable if importlib.util.find_spec("sky") else "")
PAGE = Path(__file__).parents[1] / "docs" / "howto" / "launch.md"
CHECK = "import sky, sys, yaml; print(sky.Task.from_yaml_config(yaml.safe_load(sys.stdin)).resources)"


@pytest.mark.skipif(not PYTHON, reason="no SkyPilot here: install it anywhere and set SKYPILOT_PYTHON")
@pytest.mark.parametrize(("change", "accepted"), [("true", True), ("often", False)])
def test_skypilot_accepts_the_file_for_clouds(change: str, accepted: bool, tmp_path: Path) -> None:
    found = re.search(r'```yaml title="cloud.yaml"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    text = found[1].replace("use_spot: true", f"use_spot: {change}")
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [PYTHON, "-c", CHECK], input=text, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert (done.returncode == 0) == accepted, done.stderr
    if accepted:
        assert "[Spot], {'A100': 1}" in done.stdout
    else:
        assert "use_spot" in done.stderr
