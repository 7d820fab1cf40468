"""Objects and paths that settings describe."""

from __future__ import annotations

from pathlib import Path

from cell_configs import one_cell
from nemo_bench.benchmark.plan import source_of
from nemo_bench.config import (
    build,
    resolve,
)


def test_paths_in_the_package_resolve() -> None:
    found = one_cell().settings.prompts
    assert all(Path(resolve(file)).is_file() for file in [*found.files, str(found.calibration)])
    assert resolve("local-dir:package:planted").startswith("local-dir:")
    assert Path(resolve("local-dir:package:planted").removeprefix("local-dir:")).is_dir()
    assert resolve("some/where.csv") == "some/where.csv"


HOME = str(Path.home())


def test_home_folder_is_resolved_in_files_and_in_arguments_of_classes(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nroot: ~/here\n")
    assert one_cell("experiment=mine", conf=tmp_path).settings.root == f"{HOME}/here"
    assert resolve("~/a.csv") == f"{HOME}/a.csv"
    node = one_cell("metrics=full", "weights=~/w").settings.metrics["sscd"]
    assert build(node, "metrics.sscd").space.file.startswith(f"{HOME}/w/")
    lora = source_of(one_cell("model.lora=~/style.safetensors").settings.model).lora
    assert lora
    assert lora.path == f"{HOME}/style.safetensors"
