"""How well heat maps tell memorized pixels from others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

THRESHOLDS = np.linspace(-1e-6, 1 + 1e-6, 101)
"""Thresholds that are tried, as in the public code of Kim and Lee (2026); a pixel is marked where it is above one."""


@dataclass(frozen=True)
class Counts:
    """Pixels of some images, memorized and other, that are marked at each of :data:`THRESHOLDS`."""

    memorized: NDArray[np.int64]  #: Memorized pixels that are marked, (101,).
    other: NDArray[np.int64]  #: Other pixels that are marked, (101,).
    size: int  #: Memorized pixels.
    pixels: int  #: All pixels.

    @classmethod
    def of(cls, heat: NDArray[np.float64], truth: NDArray[np.bool_]) -> Counts:
        """Counts an image; the map is scaled to [0, 1], both (height, width)."""
        above = np.searchsorted(THRESHOLDS, heat)  # number of thresholds below a value
        tried = len(THRESHOLDS)
        own, rest = (np.bincount(above[where], minlength=tried + 1) for where in (truth, ~truth))
        memorized, other = (int(count.sum()) - np.cumsum(count)[:tried] for count in (own, rest))
        return cls(memorized, other, int(truth.sum()), truth.size)

    @classmethod
    def total(cls, counts: Sequence[Counts]) -> Counts:
        """The counts of several together, at least one."""
        return cls(
            np.sum([each.memorized for each in counts], 0),
            np.sum([each.other for each in counts], 0),
            sum(each.size for each in counts),
            sum(each.pixels for each in counts),
        )

    @property
    def share(self) -> float:
        """Share of the pixels that are memorized: the intersection over union of marking everything."""
        return self.size / self.pixels

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of marked and memorized pixels at each threshold; 1 where there are neither."""
        return _ratio(self.memorized, self.size + self.other)

    @property
    def rest_iou(self) -> NDArray[np.float64]:
        """The same of pixels that are not marked, and not memorized."""
        others = self.pixels - self.size
        return _ratio(others - self.other, others + self.size - self.memorized)

    @property
    def best(self) -> int:
        """Index of the threshold of the largest :attr:`iou`, the lowest of equal ones."""
        return int(self.iou.argmax())


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)


def fitted_to_others(counts: Sequence[Sequence[Counts]]) -> list[int] | None:
    """Index of the threshold to mark each prompt at, fitted to prompts that it is none of.

    Args:
        counts: Those of the images of each prompt; prompts of odd and even places make two halves.

    Returns:
        For each prompt, the best threshold of the other half; None where a half has no image.
    """
    halves = [[image for prompt in counts[start::2] for image in prompt] for start in (0, 1)]
    if not all(halves):
        return None
    one, other = (Counts.total(half).best for half in halves)
    return [other if place % 2 == 0 else one for place in range(len(counts))]


def split_iou(counts: Sequence[Sequence[Counts]]) -> float | None:
    """Intersection over union over all pixels, each prompt marked as :func:`fitted_to_others` says; None as there."""
    places = fitted_to_others(counts)
    if places is None:
        return None
    marked = [(image, at) for own, at in zip(counts, places, strict=True) for image in own]
    union = sum(image.size + int(image.other[at]) for image, at in marked)
    return sum(int(image.memorized[at]) for image, at in marked) / union if union else 1.0


def average_precision(heat: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Average precision of the pixels of an image, ordered by its heat map; both (height, width)."""
    from torchmetrics.functional.classification import binary_average_precision

    # Their order alone counts, and torchmetrics takes values outside of [0, 1] for logits, which it rounds together.
    ranks = np.unique(heat, return_inverse=True)[1].reshape(-1) / heat.size
    return float(binary_average_precision(torch.from_numpy(ranks), torch.from_numpy(truth.reshape(-1)).int()))


def enlarged(heat: Tensor, size: tuple[int, int]) -> NDArray[np.float64]:
    """Heat maps, (N, h, w), brought to the height and width of images bilinearly, and their logarithm log(1 + x).

    The logarithm is that of the public code of Kim and Lee (2026).
    """
    maps = interpolate(heat[:, None].double(), size, mode="bilinear", align_corners=False)[:, 0]
    return np.log1p(maps.clamp(min=0).numpy())


def span(maps: Iterable[NDArray[np.float64]]) -> tuple[float, float]:
    """The smallest and largest value of some maps, between which all are scaled to [0, 1]."""
    ends = [(float(each.min()), float(each.max())) for each in maps]
    return min(low for low, _ in ends), max(high for _, high in ends)


def masked_distance(image: Tensor, references: Tensor, mask: NDArray[np.bool_]) -> float:
    """Root mean squared difference of an image, within a mask, to the nearest of some pictures, in [0, 1].

    The image is (3, height, width), pictures are (N, 3, height, width), the mask is (height, width) and not empty.
    """
    where = torch.from_numpy(mask)
    return float((references[:, :, where] - image[:, where]).square().mean((1, 2)).sqrt().min())
