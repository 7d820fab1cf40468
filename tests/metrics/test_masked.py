"""Parts inside and outside of masks: copies of a part, masks from a folder and from a segmenter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from all_metrics import LeftHalf, pictures
from nemo_bench import read_prompts
from nemo_bench.benchmark.plan import plan
from nemo_bench.config import grid
from nemo_bench.errors import ConfigError, NemoBenchError, PromptError
from nemo_bench.metrics import SSIM, MaskedSSIM, Segmenter
from nemo_bench.metrics.ssim import Local, similarity_map
from nemo_bench.records.data import Prompt

PROMPT = Prompt("one", "text")


def both(images: Tensor, references: Tensor, segmenter: Segmenter) -> list[Tensor]:
    parts = (MaskedSSIM(part, segmenter=segmenter) for part in ("inside", "outside"))
    return [metric.score(images, references, PROMPT) for metric in parts]


def test_a_copy_of_one_part_is_told_from_a_copy_of_the_other_and_of_all() -> None:
    references, other = pictures(3, seed=1, size=32), pictures(1, seed=2, size=32)[0]
    mask = LeftHalf()(references)[0]
    images = torch.stack([references[1], references[2].where(mask, other), other.where(mask, references[0]), other])
    foreground, background = both(images, references, LeftHalf())
    assert foreground[[0, 1]].tolist() == pytest.approx([1, 1])
    assert background[[0, 2]].tolist() == pytest.approx([1, 1])
    # What differs is random: only at the border of the part, where both are gray, is anything alike.
    assert (foreground[[2, 3]] < 0.5).all()
    assert (background[[1, 3]] < 0.5).all()


def test_value_is_the_mean_similarity_over_the_part_by_hand() -> None:
    image, reference = pictures(2, seed=3, size=24).split(1)
    mask = LeftHalf()(image)[0]
    gray = [picture * mask + 0.5 * ~mask for picture in (image, reference)]
    expected = similarity_map(*map(Local.from_pictures, gray))[0, :, mask].mean()
    assert both(image, reference, LeftHalf())[0].tolist() == pytest.approx([float(expected)])


class Everything(Segmenter):
    """Takes whole pictures for the foreground."""

    def __call__(self, pictures: Tensor) -> Tensor:
        return torch.ones(len(pictures), *pictures.shape[2:], dtype=torch.bool)


def test_a_part_without_pixels_is_stood_for_by_the_other() -> None:
    images, references = pictures(2, seed=4), pictures(3, seed=5)
    foreground, background = both(images, references, Everything())
    torch.testing.assert_close(foreground, background)
    torch.testing.assert_close(foreground, SSIM().nearest(images, references))


def test_masks_of_a_folder_are_those_of_the_prompt(tmp_path: Path) -> None:
    images, references = pictures(2, seed=6), pictures(2, seed=7)
    mask = LeftHalf()(images)[0].numpy()
    Image.fromarray(np.uint8(255) * mask).save(tmp_path / "one.png")
    metric = MaskedSSIM("inside", masks=str(tmp_path))
    metric.check()
    torch.testing.assert_close(metric.score(images, references, PROMPT), both(images, references, LeftHalf())[0])
    assert metric.score(images, references, Prompt("other", "text")).shape == (0,)
    before = metric.fingerprint()
    assert str(tmp_path) not in str(before)
    Image.new("L", (8, 8), 255).save(tmp_path / "one.png")
    assert metric.fingerprint() != before
    with pytest.raises(PromptError, match=r"one.png is 8x8, images are 20x16; resize the mask"):
        metric.score(images, references, PROMPT)


def test_masks_are_looked_at_before_weights_load(tmp_path: Path, prompt_file: Path) -> None:
    words = ["method=none", "metrics=masked", f"prompts.files=[{prompt_file}]", f"prompts.masks={tmp_path}/masks"]
    words += [f"root={tmp_path}", "~metrics.alignment"]
    (tmp_path / "masks").mkdir()
    (prompt, *_) = read_prompts(prompt_file)
    with pytest.raises(NemoBenchError, match=rf"metric inside_ssim .*masks has no mask for any of .*{prompt.id}.png"):
        plan(grid(words))
    Image.new("L", (8, 8), 255).save(tmp_path / "masks" / f"{prompt.id}.png")
    with pytest.raises(NemoBenchError, match=rf"outside_ssim .*{prompt.id}.png is 8x8, images are 64x64"):
        plan(grid(words))
    Image.new("L", (64, 64), 255).save(tmp_path / "masks" / f"{prompt.id}.png")
    assert len(plan(grid(words))) == 1


def test_missing_masks_and_segmenter_are_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"masks from a folder or a segmenter, given neither; give prompts.masks=DIR"):
        MaskedSSIM("outside").check()
    with pytest.raises(ConfigError, match="given both"):
        MaskedSSIM("outside", masks=str(tmp_path), segmenter=Everything()).check()
    with pytest.raises(ConfigError, match=r"SSIM outside mask: masks=.*missing is no folder"):
        MaskedSSIM("outside", masks=str(tmp_path / "missing")).check()
