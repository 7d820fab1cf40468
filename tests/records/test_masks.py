from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemo_bench.errors import PromptError, StoreError
from nemo_bench.records.data import Prompt
from nemo_bench.records.masks import check_size, read_masks

PROMPTS = [Prompt("one", "text", "TM"), Prompt("../two", "text", "TM"), Prompt("three", "text")]


def save(path: Path, values: list[list[int]]) -> None:
    Image.fromarray(np.array(values, np.uint8)).save(path)


def test_masks_are_white_parts_of_images_named_by_prompts(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    save(tmp_path / "masks" / "one.png", [[0, 127, 128], [255, 0, 0]])
    save(tmp_path / "two.png", [[255]])  # outside of the folder
    found = read_masks(tmp_path / "masks", PROMPTS, (3, 2))
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "one": [[False, False, True], [True, False, False]]
    }


def test_what_is_wrong_with_masks_is_said(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"prompts.masks=.*missing is no folder; expected one with a mask"):
        read_masks(tmp_path / "missing", PROMPTS)
    with pytest.raises(PromptError, match=r"no mask for any of the 3 prompts; expected <prompt id>.png, such as one"):
        read_masks(tmp_path, PROMPTS)
    assert read_masks(tmp_path, [*PROMPTS, Prompt("four", "text", "VM")]) == {}
    save(tmp_path / "one.png", [[255, 0, 0]])
    with pytest.raises(PromptError, match=re.escape("one.png is 3x1, images are 64x64; resize the mask to 64x64")):
        read_masks(tmp_path, PROMPTS, (64, 64))
    save(tmp_path / "one.png", [[0]])
    with pytest.raises(PromptError, match=r"one.png is black"):
        read_masks(tmp_path, PROMPTS)
    (tmp_path / "one.png").write_text("no picture")
    with pytest.raises(StoreError, match=r"one.png can't be read as an image"):
        read_masks(tmp_path, PROMPTS)
    check_size("here", np.ones((1, 2), np.bool_), None)
