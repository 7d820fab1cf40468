"""Similarity to training images inside and outside of masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.errors import ConfigError, counted
from nemo_bench.metrics.base import BenchMetric
from nemo_bench.metrics.spaces import SSIM
from nemo_bench.metrics.ssim import Local, similarity_map
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest, file_digest
from nemo_bench.records.masks import read_mask, read_masks

_AT_ONCE = 16  # Training images compared with an image at a time, so that memory does not grow with their number.
_HIDDEN = 0.5  # The value of the pixels of the other part.


class Segmenter(ABC):
    """Tells the foreground of pictures from their background, for :class:`MaskedSSIM`."""

    def check(self) -> None:  # noqa: B027 - one of a few lines needs nothing
        """Raises NemoBenchError if weights or a library are missing; the message says how to get them."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Everything that changes the masks, as plain data; by default the name of the class."""
        return {"kind": type(self).__name__}

    @abstractmethod
    def __call__(self, pictures: Tensor) -> Tensor:
        """Which pixels are foreground, (N, H, W) of bool, of pictures (N, 3, H, W) in [0, 1]."""


class MaskedSSIM(BenchMetric):
    """SSIM to a training image of one part of the image alone, after FB-Mem (Di et al. 2026).

    The mean of SSIM over the pixels of the part, with all others gray in both pictures; of several training images the
    one that is most similar in this part counts. With one training image, high in both parts is a verbatim copy, high
    in one a copy of that part. Where a part has no pixel, the other one counts for it. FB-Mem's parts are foreground
    and background, by a segmenter; its public code has MS-SSIM, which needs pictures of more than 160 pixels, a
    segmentation by BiRefNet, and the mean of both parts.

    Args:
        part: ``"inside"`` the mask, where it is white, or ``"outside"``.
        masks: Folder of masks ``<prompt id>.png``, of the size of the images; other prompts have no score.
        segmenter: Makes a mask of each generated image, white where its foreground is, in place of a folder.
    """

    family = "memorization"
    needs = frozenset({"images", "references", "prompt"})
    higher_is_better = False
    lower, upper = -1.0, 1.0
    citation = "Di et al. 2026"

    def __init__(
        self,
        part: Literal["inside", "outside"],
        masks: str | None = None,
        segmenter: Segmenter | None = None,
    ) -> None:
        super().__init__(SSIM())
        self.part, self.masks, self.segmenter = part, masks, segmenter
        where = {"inside": "foreground", "outside": "background"}[part] if segmenter else f"part {part} the mask"
        self.title = f"{where.capitalize()} SSIM" if segmenter else f"SSIM {part} mask"
        self.description = f"SSIM of the {where} alone to the prompt's own training image, best reference"

    @override
    def check(self) -> None:
        super().check()
        if (self.masks is None) == (self.segmenter is None):
            given = "both" if self.masks is not None else "neither"
            raise ConfigError(
                f"{self.title} takes masks from a folder or a segmenter, given {given}; give prompts.masks=DIR with "
                "metrics=masked, or name one of the two in the metric's settings"
            )
        if self.segmenter is not None:
            self.segmenter.check()
        elif not Path(str(self.masks)).is_dir():
            raise ConfigError(f"{self.title}: masks={self.masks} is no folder; expected one with <prompt id>.png")

    @override
    def check_prompts(self, prompts: Sequence[Prompt], size: tuple[int, int] | None) -> None:
        if self.masks is not None and not read_masks(Path(self.masks), prompts, size):
            raise ConfigError(
                f"{self.title}: {self.masks} has no mask for any of the {counted(len(prompts), 'prompt')}; expected "
                f"<prompt id>.png, such as {prompts[0].id}.png"
            )

    @override
    def fingerprint(self) -> Mapping[str, Any]:
        own: dict[str, Any] = {**super().fingerprint()}
        if self.masks is not None:
            own["masks"] = digest({path.name: file_digest(path) for path in sorted(Path(self.masks).glob("*.png"))})
        if self.segmenter is not None:
            own["segmenter"] = self.segmenter.fingerprint()
        return own

    @override
    def score(self, images: Tensor, references: Tensor, prompt: Prompt) -> Tensor:
        masks = self._masks(images, prompt)
        if masks is None:
            return images.new_empty(0)
        own = masks if self.part == "inside" else ~masks
        own = own.where(own.any(2).any(1)[:, None, None], ~own)
        return torch.stack([_nearest(image, references, mask) for image, mask in zip(images, own, strict=True)])

    def _masks(self, images: Tensor, prompt: Prompt) -> Tensor | None:
        if self.segmenter is not None:
            return self.segmenter(images).to(images.device)
        path = Path(str(self.masks)) / f"{prompt.id}.png"
        if Path(prompt.id).name != prompt.id or not path.is_file():
            return None
        mask = torch.from_numpy(read_mask(path, (images.shape[3], images.shape[2]))).to(images.device)
        return mask.expand(len(images), -1, -1)


def _nearest(image: Tensor, references: Tensor, mask: Tensor) -> Tensor:
    """The largest similarity of an image, (3, H, W), to pictures (N, 3, H, W), over the pixels of a mask, (H, W)."""
    own = Local.from_pictures(image[None].where(mask, _HIDDEN))
    parts = (Local.from_pictures(part.where(mask, _HIDDEN)) for part in references.split(_AT_ONCE))
    return torch.cat([similarity_map(own, part)[:, :, mask].mean((1, 2)) for part in parts]).max()
