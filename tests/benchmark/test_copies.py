"""nemo-bench similarity: from pairs to table and page."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemo_bench.benchmark.copies import measures_of, read_pairs
from nemo_bench.cli import main
from nemo_bench.config import similarity_settings
from nemo_bench.errors import ConfigError, PromptError
from nemo_bench.metrics.transformations import TRANSFORMATIONS
from on_disk import read_json

LEVELS = {"near": 10, "close": 40, "far": 100, "farther": 120}
"""By name of an image, how much brighter it is than the reference, in 255ths."""
LINES = (
    "image,reference,label,kind\n"
    "near.png,black.png,copy,light\nfar.png,black.png,copy,heavy\n"
    "close.png,black.png,other,drawn\nfarther.png,black.png,0,drawn\n"
)
OFFLINE = ["~metrics.clip", "~metrics.ssim", "~metrics.ms_ssim", "~metrics.tiled_l2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two copies and two others, plain pictures whose pixel distance is their level."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, level in {"black": 0, **LEVELS}.items():
        Image.fromarray(np.full((48, 48, 3), level, np.uint8)).save(folder / f"{name}.png")
    (folder / "copies.csv").write_text(LINES)
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    words = [*OFFLINE, f"root={folder}/results", "weights=none", "name=pairs"]
    assert main(["similarity", *words, "--pairs", str(folder), "--quiet"]) == 0
    return folder / "results" / "pairs"


def test_numbers_by_hand(done: Path) -> None:
    table = read_json(done / "similarity.json")
    assert set(table["left_out"]) == {"lpips", "sscd", "sscd_large"}
    assert table["kinds"] == {
        "light": {"is_copy": True, "pairs": 1}, "heavy": {"is_copy": True, "pairs": 1},
        "drawn": {"is_copy": False, "pairs": 2},
    }  # fmt: skip
    rows = {row["transformation"]: row for row in table["rows"]}
    assert [*rows] == [*TRANSFORMATIONS]
    row = rows["unchanged"]
    # Distances 10 and 100 of copies, 40 and 120 of others: of four pairs of one each, three are in the right order.
    assert row["roc"]["auc"] == pytest.approx(0.75)
    assert row["roc"]["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3, abs=1e-6)
    assert row["best"] == {"threshold": pytest.approx((10 + 40) / 2 / 255), "tpr": 0.5, "fpr": 0.0}
    assert row["published"] == {"threshold": 0.15, "tpr": 0.5, "fpr": 0.0}  # 0.15 * 255 = 38.25
    assert row["flagged"] == {"light": 1.0, "heavy": 0.0, "drawn": 0.0}
    # Everything 0.6 times as bright: distances 6 and 60, 24 and 72, of which three are below 25, as before, and 38.25.
    dark = rows["dark × 0.6"]
    assert dark["roc"]["auc"] == pytest.approx(0.75)
    assert (dark["unchanged"]["tpr"], dark["unchanged"]["fpr"]) == (0.5, 0.5)
    assert (dark["published"]["tpr"], dark["published"]["fpr"]) == (0.5, 0.5)
    assert dark["best"]["threshold"] == pytest.approx((6 + 24) / 2 / 255)


def test_all_values_are_in_the_csv(done: Path) -> None:
    with (done / "similarity.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * len(TRANSFORMATIONS)
    values = {line["image"]: float(line["l2"]) for line in lines if line["transformation"] == "unchanged"}
    assert values == {f"{name}.png": pytest.approx(level / 255, abs=1e-6) for name, level in LEVELS.items()}


def test_page_and_report(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, text = (done / "similarity.html").read_text(), (done / "similarity.md").read_text()
    for words in ("0.750", "Pixel distance", "JPEG 10", "sscd is left out: no weights"):
        assert words in page
        assert words in text
    assert page.count("<svg") == 2
    assert "data:image/webp" in page
    for file in ("similarity.html", "similarity.md"):
        (done / file).unlink()
    assert main(["report", str(done)]) == 0
    assert "0.750" in capsys.readouterr().out
    assert ((done / "similarity.html").read_text(), (done / "similarity.md").read_text()) == (page, text)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("image,reference,label\nnear.png,black.png,maybe\n", "line 2: the label is 'maybe', expected copy or other"),
        ("image,reference,label\nnear.png,gone.png,copy\n", "line 2: .*gone.png is no file"),
        ("image,reference,label\nnear.png,black.png,copy\n", "1 pairs are labelled copy and 0 other"),
        ("image,reference\nnear.png,black.png\n", "line 2: the label is None"),
        (LINES.replace("close.png,black.png,other,drawn", "close.png,black.png,1,drawn"), "kind 'drawn' have both"),
        ("reference,label\nblack.png,copy\n", "no column of images"),
    ],
)
def test_lists_that_are_no_pairs(folder: Path, tmp_path: Path, lines: str, told: str) -> None:
    for file in folder.glob("*.png"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "copies.csv").write_text(lines)
    with pytest.raises(PromptError, match=told):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method=nemo"], "method does not matter to similarity"),
        (["metrics=default"], "metrics.ssim_nearest compares no image"),
        ([*OFFLINE, "~metrics.l2", "weights=none"], "none can be measured .*no weights"),
    ],
)
def test_settings_that_measure_nothing(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        measures_of(similarity_settings(words))


def test_pictures_of_other_models_are_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["similarity", "model=sd14", *OFFLINE, f"root={tmp_path}"]) == 1
    assert "give model=planted_routed or --pairs" in capsys.readouterr().err


def test_json_stands_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*OFFLINE, f"root={tmp_path}", "weights=none"]
    assert main(["similarity", *words, "--pairs", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == f"Pairs of {folder}"
