"""Scoring in a run: pairs without mitigation, sets of images on several processes, and what is missing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_bench import ConfigError, resolve
from nemo_bench.benchmark.pending import pending_work
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run
from nemo_bench.config import grid
from nemo_bench.errors import ModelError
from on_disk import read_json, read_records
from small_runs import small

DISTANCES = [
    "+metrics.fid={_target_: nemo_bench.metrics.FID, space: ${metrics.sscd.space}, folder: ${real_images}}",
    "+metrics.kid={_target_: nemo_bench.metrics.KID, space: ${metrics.sscd.space}, folder: ${real_images}}",
    "+metrics.sscd={_target_: nemo_bench.metrics.TrainingImage, "
    "space: {_target_: nemo_bench.metrics.SSCD, file: '${weights}/sscd.pt'}}",
]


class Descriptor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Linear(48, 512)

    def forward(self, pixels: Tensor) -> Tensor:
        projected: Tensor = self.projection(torch.nn.functional.adaptive_avg_pool2d(pixels, [4, 4]).flatten(1))
        return projected


def words(root: Path, prompts: Path, *more: str) -> list[str]:
    return [*small(steps=2), "name=scoring", f"root={root}", f"prompts.files=[{prompts}]", *more]


def execute(root: Path, prompts: Path, *more: str) -> dict[str, Path]:
    """Runs it; cells by method."""
    folder = run(plan(grid(words(root, prompts, *more))), "test", progress=False)
    return {path.name.split("__")[1]: path for path in folder.iterdir() if path.is_dir()}


def scores(cell: Path, metric: str) -> dict[tuple[str, int | None], float]:
    records = read_records(cell, "score").values()
    return {(r["prompt"], r.get("seed")): r["scores"][metric] for r in records if metric in r["scores"]}


def test_images_are_paired_with_those_without_mitigation_whenever_they_come(tmp_path: Path, prompt_file: Path) -> None:
    alone = execute(tmp_path, prompt_file, "method=random")["random"]
    assert scores(alone, "ssim")
    assert not scores(alone, "ssim_change")
    assert "unmitigated" not in read_json(alone / "scoring.json")
    aggregates = read_json(alone / "metrics.json")["aggregates"]
    assert "paired" not in aggregates["VM"]["ssim"]
    images = {path: path.stat().st_mtime_ns for path in (alone / "images").iterdir()}

    both = execute(tmp_path, prompt_file, "method=none,random")
    assert len(scores(both["random"], "ssim_change")) == 6
    assert not scores(both["none"], "ssim_change")
    assert read_json(both["random"] / "scoring.json")["unmitigated"] == both["none"].name
    assert {path: path.stat().st_mtime_ns for path in (alone / "images").iterdir()} == images
    metrics = read_json(both["random"] / "metrics.json")
    ours, none = scores(both["random"], "ssim"), scores(both["none"], "ssim")
    (of_vm,) = {prompt for prompt, _ in ours if prompt.startswith("vm")}
    pairs = [ours[key] - none[key] for key in ours if key[0] == of_vm]
    assert metrics["aggregates"]["VM"]["ssim"]["paired"]["difference"] == pytest.approx(sum(pairs) / len(pairs))
    assert "paired" not in read_json(both["none"] / "metrics.json")["aggregates"]["VM"]["ssim"]

    # Asked for alone again, it is still paired with what lies beside it, and nothing is scored anew.
    asked = plan(grid(words(tmp_path, prompt_file, "method=random")))
    assert [set(records.values()) for _, records in pending_work(asked)] == [{0}, {0}]  # its source is the first
    before = (both["random"] / "metrics.json").read_text()
    execute(tmp_path, prompt_file, "method=random")
    assert (both["random"] / "metrics.json").read_text() == before


def test_a_source_that_nobody_asked_for_keeps_its_scores(tmp_path: Path, prompt_file: Path) -> None:
    nemo = execute(tmp_path, prompt_file, "method=none,nemo")["nemo"]
    before = scores(nemo, "ssim")
    execute(tmp_path, prompt_file, "method=none,random")
    assert before
    assert scores(nemo, "ssim") == before
    assert (nemo / "score.done").exists()


def test_scores_of_other_metrics_are_not_paired(tmp_path: Path, prompt_file: Path) -> None:
    execute(tmp_path, prompt_file, "method=none")
    random = execute(tmp_path, prompt_file, "method=random", "metrics.memorized.threshold=0.99")["random"]
    assert all("paired" not in row for row in read_json(random / "metrics.json")["aggregates"]["VM"].values())


def test_detection_counts_and_presets_are_told(tmp_path: Path, prompt_file: Path) -> None:
    cells = execute(tmp_path, prompt_file, "method=none,random")
    none, random = (read_json(cells[name] / "metrics.json") for name in ("none", "random"))
    found = none["detection"]["memorization"]
    assert (found["memorized"], found["other"]) == (2, 1)
    measured = {r["prompt"]: r["score"] for r in read_records(cells["none"], "memorization").values()}
    general = next(value for name, value in measured.items() if name.startswith("general"))
    assert found["auc"] == sum(v > general for n, v in measured.items() if not n.startswith("general")) / 2
    assert random["detection"] == {}
    nothing = ("truncated", "without_reference", "dead_references", "damaged_references")
    failed = ("failed_images", "failed_localizations", "failed_scores")
    assert none["counts"] == {"images": 6, "prompts": 3, **dict.fromkeys((*nothing, *failed), 0)}
    assert none["cost"]["peak_memory_mb"] > 100
    assert none["peak_memory_of"] == "process"
    assert set(none["presets"]) == {"nemo", "membench", "wen"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.jit.script(Descriptor().eval()).save(str(folder / "sscd.pt"))
    return folder


@pytest.fixture
def real(tmp_path: Path) -> Path:
    folder = tmp_path / "real"
    folder.mkdir()
    for path in sorted(Path(resolve("package:planted/references")).glob("vm-0*.png")):
        shutil.copy(path, folder)
    return folder


SCRIPT = """
import sys
from nemo_bench.benchmark.plan import plan
from nemo_bench.config import grid
from nemo_bench.benchmark.run import run
if __name__ == "__main__":
    run(plan(grid(sys.argv[1:])), "test", progress=False)
"""


def test_sets_are_the_same_on_several_processes_and_computed_once(
    tmp_path: Path, prompt_file: Path, weights: Path, real: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    found: dict[int, dict[str, Any]] = {}
    for number in (1, 2):
        more = ["method=none", f"weights={weights}", f"real_images={real}", f"trainer.devices={number}", "workers=1"]
        command = [sys.executable, str(tmp_path / "script.py")]
        command += words(tmp_path / f"results{number}", prompt_file, *more, *DISTANCES)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        (cell,) = (path for path in (tmp_path / f"results{number}" / "scoring").iterdir() if path.is_dir())
        found[number] = read_json(cell / "sets.json")
        aggregates = read_json(cell / "metrics.json")["aggregates"]
        assert aggregates["VM"]["fid"] == {"mean": found[number]["VM"]["fid"], "prompts": 1}
        assert len(list((cell / "features").glob("*.safetensors"))) == 3
        assert len(list((tmp_path / f"results{number}" / "real_images").iterdir())) == 1  # shared by both distances
    assert set(found[1]) == {"VM", "TM", "general", "all"}
    for group, row in found[1].items():
        assert row["fid"] > 0
        assert found[2][group] == pytest.approx(row, rel=1e-3)


def test_what_metrics_lack_is_known_before_anything_loads(
    tmp_path: Path, prompt_file: Path, weights: Path, real: Path
) -> None:
    asked = words(tmp_path, prompt_file, "method=none", f"weights={weights}", *DISTANCES)
    with pytest.raises(
        ConfigError, match=r"(?s)metric fid .*FID .*set real_images=FOLDER.*\n.*without these metrics: .~metrics.fid"
    ):
        plan(grid(asked))
    assert plan(grid([*asked, f"real_images={real}"]))
    (weights / "sscd.pt").unlink()
    with pytest.raises(ModelError, match=r"no weights for SSCD disc_mixup.*Download https://.*weights=FOLDER"):
        plan(grid([*asked, f"real_images={real}"]))
    for name in ("nemo", "membench", "wen", "full"):
        with pytest.raises(ModelError, match=r"(?s)Download https://.*without these metrics: .~metrics\."):
            plan(grid(words(tmp_path, prompt_file, "method=none", f"metrics={name}", "model.guidance=2")))


def test_weights_that_cannot_be_downloaded_stop_a_run_before_its_first_image(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("no connection\nmore")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    clip = ["metrics.alignment.space.model=ViT-B-32-quickgelu", "metrics.alignment.space.pretrained=openai"]
    with pytest.raises(
        ModelError, match=r"'openai' of open_clip model 'ViT-B-32-quickgelu': .* is unreachable, .*\(no connection\)"
    ):
        execute(tmp_path, prompt_file, "method=none", *clip)
    assert not list(tmp_path.glob("**/*.png"))


def test_other_weights_score_again_and_other_folders_do_not(tmp_path: Path, prompt_file: Path, weights: Path) -> None:
    asked = ["method=none", DISTANCES[2]]
    cell = execute(tmp_path, prompt_file, *asked, f"weights={weights}")["none"]
    before = json.loads((cell / "scoring.json").read_text())
    moved = weights.rename(tmp_path / "moved")
    ((_, records),) = pending_work(plan(grid(words(tmp_path, prompt_file, *asked, f"weights={moved}"))))
    assert set(records.values()) == {0}
    assert str(tmp_path) not in json.dumps(before)
    with (moved / "sscd.pt").open("ab") as file:
        file.write(b"another file")
    ((_, records),) = pending_work(plan(grid(words(tmp_path, prompt_file, *asked, f"weights={moved}"))))
    assert records["score"] == 3
