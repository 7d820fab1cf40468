"""Fitted weights in a run: made once, kept, and used by all that follows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nemo_bench.benchmark.dry_run import forecast
from nemo_bench.benchmark.export import export
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run
from nemo_bench.benchmark.stages.fit import FITTED
from nemo_bench.benchmark.verify import verify
from nemo_bench.cli import main
from nemo_bench.config import grid
from nemo_bench.errors import ConfigError
from on_disk import read_json

WORDS = [
    "method=unlearning", "method.loss=neg_grad", "method.keep=null", "method.updates=2", "method.batch=1",
    "method.rate=0.01", "model.steps=2", "seeds=1", "localize_seeds=2", "trainer=cpu",
]  # fmt: skip


def test_weights_are_fitted_once_and_used_by_images_audit_and_verification(
    prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*WORDS, f"prompts.files=[{prompt_file}]", f"root={tmp_path}"]
    (cell,) = plan(grid(words))
    (planned,) = forecast(grid([*words, "name=other"]))["cells"]
    # A picture to keep is generated, and two updates of a row go forward and back.
    assert planned["passes"]["fit"] == 1 * 2 * 2 + 2 * 2
    monkeypatch.setattr("nemo_bench.benchmark.progress.FIRST", 0.0)
    with caplog.at_level("INFO", logger="nemo_bench"):
        run([cell], "test")
    assert re.search(r"fit unlearning: 1 of 2, .* left\n", caplog.text)
    (kept,) = (tmp_path / "fitted").iterdir()
    assert cell.fitted
    assert cell.fitted.folder == kept
    cost = read_json(kept / "fit.json")
    assert cost["row_passes"] == planned["passes"]["fit"]
    assert cost["seconds"] > 0
    summary = read_json(cell.store.folder / "metrics.json")["cost"]
    assert (summary["fit_row_passes"], summary["fit_seconds"]) == (cost["row_passes"], cost["seconds"])
    changes = load_file(kept / FITTED).values()
    assert all(values.isfinite().all() for values in changes)
    assert max(float(values.abs().max()) for values in changes) > 5e-3
    images = {path.name: path.read_bytes() for path in (cell.store.folder / "images").iterdir()}
    assert len(images) == 3
    monkeypatch.setattr("nemo_bench.benchmark.runner.fit_weights", None)  # nothing is fitted again
    (row,) = forecast(grid([*words, "name=more", "seeds=2"]))["cells"]
    assert row["passes"]["fit"] == 0
    (more,) = plan(grid([*words, "name=more", "seeds=2"]))
    run([more], "test", progress=False)
    again = {path.name: path.read_bytes() for path in (more.store.folder / "images").iterdir()}
    assert len(again) == 6
    assert read_json(cell.store.folder / "spec.json")["fitted"] == f"../../fitted/{kept.name}"
    with pytest.raises(ConfigError, match=re.escape(f"the changes are in {kept}, to be added to the weights")):
        export(cell.store.folder, tmp_path / "exported")
    audit = ["steps=1", "samples=1", "images=1", "limit=1", "controls=null", "trainer=cpu"]
    assert main(["audit", str(cell.store.folder.parent), *audit]) == 0
    assert read_json(cell.store.folder / "audit.json")
    assert not any(found.differing for found in verify(cell.store.folder, records=2, progress=False))
