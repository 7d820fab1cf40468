"""Small pictures of the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from fake_results import write_fake_results
from nemo_bench.records.results import load_results
from nemo_bench.records.store import thumbnail
from nemo_bench.report import write_report
from nemo_bench.report.thumbnails import Thumbnails


def test_a_large_image_is_made_smaller_and_a_tiny_one_kept_as_it_is(tmp_path: Path) -> None:
    Image.effect_noise((512, 256), 40).save(tmp_path / "large.png")
    tiny = Image.effect_noise((32, 32), 40).convert("RGB")
    tiny.save(tmp_path / "tiny.png")
    make = Thumbnails(tmp_path)
    large, kept = (make(tmp_path / f"{name}.png", (96, 96)) for name in ("large", "tiny"))
    assert large
    assert (large.width, large.height, large.tiny) == (96, 48, False)
    assert kept
    assert kept.tiny
    back = Image.open(io.BytesIO(base64.b64decode(kept.uri.partition(",")[2])))
    assert back.convert("RGB").tobytes() == tiny.tobytes()


def test_thumbnails_are_made_once_for_the_same_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_fake_results(tmp_path / "default")
    before = write_report(load_results(run)).read_bytes()
    made: list[Path] = []
    monkeypatch.setattr(
        "nemo_bench.report.thumbnails.thumbnail", lambda path, box: made.append(path) or thumbnail(path, box)
    )
    assert write_report(load_results(run)).read_bytes() == before
    assert made == []
    image = next(run.glob("*__nemo__*/images/vm-01_01.png"))
    Image.effect_noise((80, 80), 40).convert("RGB").save(image)
    assert write_report(load_results(run)).read_bytes() != before
    assert made == [image]
    moved = run.rename(tmp_path / "moved")
    made.clear()
    write_report(load_results(moved))
    assert {path.parent.name for path in made} <= {"references"}


def test_thumbnails_that_cannot_be_read_are_made_again(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    before = write_report(load_results(run)).read_bytes()
    for path, text in zip(run.glob("*/thumbnails.json"), ("{", "[]", '{"a": [1]}'), strict=True):
        path.write_text(text)
    assert write_report(load_results(run)).read_bytes() == before
