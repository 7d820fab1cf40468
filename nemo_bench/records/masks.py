"""Masks of what is memorized in the images of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_bench.errors import PromptError
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import open_image
from nemo_bench.records.io import digest


def read_mask(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """Reads a mask, (height, width), true where the image is white.

    Raises:
        PromptError: It is of another size than ``size``, width and height, or all black.
        StoreError: It can't be read as an image.
    """
    mask = np.asarray(open_image(path).convert("L")) > 127
    check_size(str(path), mask, size)
    if not mask.any():
        raise PromptError(f"{path} is black, so nothing would be memorized; make white what is, or delete it")
    return mask


def read_masks(
    folder: Path, prompts: Sequence[Prompt], size: tuple[int, int] | None = None
) -> dict[str, NDArray[np.bool_]]:
    """Reads the masks of prompts that have one, by prompt id, each (height, width), true where it is white.

    Args:
        folder: Folder of images ``<prompt id>.png``.
        prompts: The prompts.
        size: Width and height that masks must have, those of generated images; None where that is not known yet.

    Raises:
        PromptError: The folder is missing, or has no mask for any prompt and none is verbatim, or a mask is of another
            size or all black.
        StoreError: A mask can't be read as an image.
    """
    if not folder.is_dir():
        raise PromptError(f"prompts.masks={folder} is no folder; expected one with a mask <prompt id>.png for prompts")
    files = {prompt.id: folder / f"{prompt.id}.png" for prompt in prompts if Path(prompt.id).name == prompt.id}
    masks = {name: read_mask(path, size) for name, path in files.items() if path.is_file()}
    if not masks and all(prompt.kind != "VM" for prompt in prompts):
        raise PromptError(
            f"prompts.masks={folder} has no mask for any of the {len(prompts)} prompts; expected <prompt id>.png, such "
            f"as {prompts[0].id}.png, white where its images are memorized"
        )
    return masks


def masks_digest(masks: Mapping[str, NDArray[np.bool_]]) -> str:
    """Digest of masks by prompt id, whatever their files."""
    return digest({name: [*mask.shape, np.packbits(mask).tobytes().hex()] for name, mask in sorted(masks.items())})


def check_size(place: str, mask: NDArray[np.bool_], size: tuple[int, int] | None) -> None:
    """Raises PromptError where a mask has another size than images, width and height."""
    height, width = mask.shape
    if size and (width, height) != size:
        expected = f"{size[0]}x{size[1]}"
        raise PromptError(f"{place} is {width}x{height}, images are {expected}; resize the mask to {expected}")
