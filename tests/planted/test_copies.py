"""Pairs of the embedded model: which files, and that labels hold."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nemo_bench import Diffusion, Prompt
from nemo_bench.metrics import SSIM
from nemo_bench.planted.copies import write_pairs
from nemo_bench.planted.world import planted_picture


def test_pairs_of_a_caption(planted: Diffusion, tmp_path: Path) -> None:
    write_pairs(tmp_path, planted, [Prompt("general", "a cold city at the desert")], seeds=2, captions=1)
    with (tmp_path / "copies.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["kind"], line["label"]) for line in lines] == [
        ("generated", "copy"), ("generated", "copy"), ("encoded and decoded", "copy"),
        ("same caption", "other"), ("same caption", "other"), ("general prompt", "other"), ("general prompt", "other"),
    ]  # fmt: skip
    assert {line["reference"] for line in lines} == {"vm-01.png"}
    assert {line["image"] for line in lines} | {"vm-01.png", "copies.csv"} == {path.name for path in tmp_path.iterdir()}
    assert (np.asarray(Image.open(tmp_path / "vm-01.png")) == planted_picture(0)).all()
    images, references = (
        SSIM().embed([Image.open(tmp_path / line[side]) for line in lines], (64, 64), torch.device("cpu"))
        for side in ("image", "reference")
    )
    alike = SSIM().pair(images, references)
    assert alike[:3].min() > 0.5 > alike[3:].max()
