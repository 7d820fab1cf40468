"""CSV and TensorBoard: files read back by the csv module and by TensorBoard's own reader."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import TrackingError
from nemo_bench.records.results import load_results
from nemo_bench.tracking import track
from nemo_bench.tracking.logged import LoggedCell, logged_cells


def logged(folder: Path) -> LoggedCell:
    (cell,) = (cell for cell in logged_cells(load_results(folder.parent)) if cell.folder == folder)
    return cell


def events(cell: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(cell / "tensorboard"), size_guidance={"images": 0})
    return accumulator.Reload()


def test_csv_holds_the_row_and_the_config(run: Path, nemo: Path, said: list[str]) -> None:
    for _ in range(2):
        track(load_results(run), LoggerSettings(csv=True))
    assert said[-1] == f"CSV: {run}/*/csv/metrics.csv"
    assert len(list(run.glob("*/csv/metrics.csv"))) == 2
    with (nemo / "csv" / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row.pop("step") == "0"
    assert {key: float(value) for key, value in row.items()} == logged(nemo).row
    assert float(row["VM/ssim/mean"]) == logged(nemo).results.summary.aggregates["VM"]["ssim"].mean
    assert yaml.safe_load((nemo / "csv" / "hparams.yaml").read_text()) == logged(nemo).begun.config


def test_tensorboard_holds_the_row_the_config_and_pictures(run: Path, nemo: Path) -> None:
    for _ in range(2):
        track(load_results(run), LoggerSettings(tensorboard=True, thumbnails=2))
    assert len(list(run.glob("*/tensorboard/events*"))) == 2
    found, cell = events(nemo), logged(nemo)
    tags: dict[str, Any] = found.Tags()
    assert {tag: [e.value for e in found.Scalars(tag)] for tag in tags["scalars"]} == {
        key: [pytest.approx(value, rel=1e-6)] for key, value in cell.row.items()
    }
    assert set(tags["images"]) == {
        f"{prompt}/{picture}"
        for prompt in ("vm-01", "tm-26")
        for picture in ("training image", "unmitigated", "mitigated", "noise differences")
    }
    (picture,) = found.Images("vm-01/mitigated")
    assert (picture.width, picture.height) == (64, 64)
    (histogram,) = found.Histograms("neurons per prompt")
    assert histogram.histogram_value.num == 3
    plugin = HParamsPluginData.FromString(found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert plugin.session_start_info.hparams["settings/method/theta"].number_value == 5
    assert plugin.session_start_info.hparams["model"].string_value == "planted"


def test_without_tensorboard_it_is_said_how_to_get_it(nemo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrackingError, match=r"pip install 'nemo-bench\[tensorboard\]'"):
        track(load_results(nemo.parent), LoggerSettings(tensorboard=True, csv=True), cells=[nemo.name])
    assert (nemo / "csv" / "metrics.csv").is_file()
