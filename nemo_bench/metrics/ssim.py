"""Structural similarity (Wang et al. 2004), and a search for the most similar of many pictures that gives up early."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

C1, C2 = 0.01**2, 0.03**2
REACH = 5
"""Pixels from the middle of the window to its border; with a sigma of 1.5 it is the published one of 11 by 11."""
BLOCK = 8
"""Pixels on a side of the blocks whose statistics bound the similarity from above."""
SLACK = 1e-3
"""More than similarities and bounds, of which rounding is largest in plain surfaces, can err in float32."""


class Local(NamedTuple):
    """Pictures, or some rows of them, with their means and variances under the window at every pixel."""

    padded: Tensor  #: (N, 3, H + 10, W + 10), with mirrored borders.
    mean: Tensor  #: (N, 3, H, W)
    variance: Tensor  #: (N, 3, H, W), never negative.

    @classmethod
    def from_padded(cls, padded: Tensor) -> Local:
        """Takes the moments of pictures with their borders."""
        mean = _blur(padded)
        return cls(padded, mean, _blur(padded.square()).addcmul_(mean, mean, value=-1).clamp_(min=0))

    @classmethod
    def from_pictures(cls, pictures: Tensor) -> Local:
        """Takes the moments of pictures, (N, 3, H, W), in [0, 1]."""
        return cls.from_padded(mirrored(pictures))

    def part(self, pictures: Tensor, rows: slice) -> Local:
        """Some rows of some of the pictures, given by their numbers."""
        first = int(pictures[0])
        chosen = slice(first, first + 1) if len(pictures) == 1 else pictures  # a view spares a copy
        padded = self.padded[chosen, :, rows.start : rows.stop + 2 * REACH]
        return Local(padded, self.mean[chosen, :, rows], self.variance[chosen, :, rows])


def mirrored(pictures: Tensor) -> Tensor:
    """Pictures with borders of :data:`REACH` mirrored pixels."""
    return F.pad(pictures, (REACH,) * 4, mode="reflect")


def ssim(a: Local, b: Local) -> Tensor:
    """Mean similarities, (N,), of N pictures to N others; either side may be a single one."""
    return similarity_map(a, b).mean((1, 2, 3))


def similarity_map(a: Local, b: Local) -> Tensor:
    """Similarities at every pixel, (N, 3, H, W), of N pictures to N others; either side may be a single one."""
    means = a.mean * b.mean
    contrast = _blur(a.padded * b.padded).sub_(means).mul_(2).add_(C2)
    luminance = means.mul_(2).add_(C1)
    squares = a.mean.square() + b.mean.square()
    return luminance.mul_(contrast).div_(squares.add_(C1).mul_((a.variance + b.variance).add_(C2)))


class SSIMPool:
    """Pictures to find the most similar of; what bounds the similarity of others to them is computed once.

    It holds the pictures, in main memory, and a tenth more: 1.7 GB for 500 of 512x512. Their full moments, twice
    as much, are computed anew for rows that are compared, once for all images compared at a time.

    Args:
        pictures: (M, 3, H, W) in [0, 1].
        values: Number of values computed with at a time.
    """

    def __init__(self, pictures: Tensor, values: int) -> None:
        self.pictures = pictures.cpu()
        self.values = values
        size = max(1, values // pictures[0].numel())
        self.blocks = torch.cat([block_statistics(Local.from_pictures(part)) for part in pictures.split(size)])
        # A strip of rows is as many blocks high as fit into the values computed at a time.
        height, width = pictures.shape[2:]
        self.strip = BLOCK * max(1, min(values // (3 * width * BLOCK), math.ceil(height / BLOCK)))
        # Where there is most texture, bounds are furthest from similarities, and pictures are given up the soonest.
        variance = self.blocks[:, 3]
        texture = (variance / (variance + C2)).mean((1, 3)).split(self.strip // BLOCK, 1)
        self.order = torch.stack([part.mean(1) for part in texture], 1).argsort(1, descending=True)

    def nearest(self, images: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Finds the most similar picture of each image.

        Args:
            images: (N, 3, H, W) in [0, 1].
            known: Similarities known before, (N, M), nan where there is none.

        Returns:
            Similarities and numbers of the pictures, (N,) each.
        """
        local = Local.from_pictures(images)
        bounds = torch.stack([self._bounds(one) for one in block_statistics(local)]).double().cpu()
        total = bounds.sum(2)
        best = torch.full((len(images),), -torch.inf, dtype=torch.float64)
        found = torch.zeros(len(images), dtype=torch.long)
        if known is not None:
            best, found = known.double().cpu().nan_to_num(-torch.inf).max(1)
            total[known.isfinite().cpu()] = -torch.inf

        def compare(number: int, candidates: Tensor) -> None:
            rows = (candidates & (total[:, number] > best - SLACK)).nonzero()[:, 0]
            if not len(rows):
                return
            values = self._compare(local, number, rows, bounds[rows, number], best[rows] - SLACK)
            better = values > best[rows]
            best[rows[better]] = values[better]
            found[rows[better]] = number
            total[rows, number] = -torch.inf

        # The most promising picture of each image comes first: the better the best one, the sooner others are left.
        first = total.argmax(1)
        for number in first.unique().tolist():
            compare(number, first == number)
        while (promise := (total - best[:, None]).amax(0)).max() > -SLACK:
            compare(int(promise.argmax()), torch.ones_like(first, dtype=torch.bool))
        return best.float().to(images.device), found.to(images.device)

    def _compare(self, images: Local, number: int, rows: Tensor, bounds: Tensor, limits: Tensor) -> Tensor:
        """Similarities of some images to a picture, -inf for those that can't be above their limits."""
        height = images.mean.shape[2]
        padded = mirrored(self.pictures[number, None].to(images.mean.device))
        values = bounds.sum(1)
        left = torch.arange(len(rows))
        for strip in self.order[number].tolist():
            part = slice(strip * self.strip, min((strip + 1) * self.strip, height))
            other = Local.from_padded(padded[:, :, part.start : part.stop + 2 * REACH])
            groups = rows[left].to(padded.device).split(max(1, self.values // other.mean.numel()))
            means = torch.cat([ssim(images.part(group, part), other) for group in groups]).double().cpu()
            values[left] += means * ((part.stop - part.start) / height) - bounds[left, strip]
            left = left[values[left] > limits[left]]
            if not len(left):
                break
        return torch.full_like(values, -torch.inf).index_copy_(0, left, values[left])

    def _bounds(self, image: Tensor) -> Tensor:
        """Upper bounds of the parts that strips have in the similarity of an image to each picture, (M, strips)."""
        size = max(1, self.values // image[0].numel())
        maps = torch.cat([bound(image, part).mean(1) for part in self.blocks.split(size)])
        height, width = self.pictures.shape[2:]
        rows, columns = (_shares(length, image.device) for length in (height, width))
        parts = (maps @ columns * rows).split(self.strip // BLOCK, 1)
        return torch.stack([part.sum(1) for part in parts], 1)


def block_statistics(local: Local) -> Tensor:
    """Statistics of blocks, (N, 6, 3, rows, columns): means of what :func:`bound` needs, range of the mean."""
    maps = (local.mean, local.mean.square(), local.variance.sqrt(), local.variance)
    means = [F.avg_pool2d(values, BLOCK, ceil_mode=True) for values in maps]
    extremes = [sign * F.max_pool2d(sign * local.mean, BLOCK, ceil_mode=True) for sign in (-1, 1)]
    return torch.stack([*means, *extremes], 1)


def bound(a: Tensor, b: Tensor) -> Tensor:
    """Upper bounds of the mean SSIM in each block, (M, 3, rows, columns), by the statistics of one and of M pictures.

    With means m, n and deviations s, t at a pixel, SSIM is at most L C, where 1 - L = (m - n)² / (m² + n² + C1) and
    1 - C = (s - t)² / (s² + t² + C2), as the covariance is at most s t (Cauchy-Schwarz). x² / y is convex, so its mean
    is at least (mean of x)² / mean of y (Jensen); 1 - L C is 1 - L + L (1 - C), at least 1 - C, and L is least at ends.
    """
    mean, square, deviation, variance, low, high = a
    means, squares, deviations, variances, lows, highs = b.unbind(1)
    darkness = _distance(mean, means, square + squares)
    contrast = (deviation - deviations).square_().div_((variance + C2) + variances)
    least = 1 - torch.maximum(
        _distance(low, highs, low.square() + highs.square()), _distance(high, lows, high.square() + lows.square())
    )
    return 1 - torch.maximum(contrast, darkness.addcmul_(least, contrast))


def _distance(a: Tensor, b: Tensor, squares: Tensor) -> Tensor:
    """One minus the luminance term of SSIM."""
    return (a - b).square_().div_(squares.add_(C1))


def _shares(length: int, device: torch.device) -> Tensor:
    """Shares of the blocks along a side in its pixels; the last block may be cut."""
    sizes = torch.full((math.ceil(length / BLOCK),), BLOCK, dtype=torch.float32, device=device)
    sizes[-1] = (length - 1) % BLOCK + 1
    return sizes / length


def _blur(padded: Tensor) -> Tensor:
    """Means under the window at every pixel that has one: (N, 3, H, W) of pictures with their borders."""
    weights = [math.exp(-(step**2) / (2 * 1.5**2)) for step in range(-REACH, REACH + 1)]
    # Sums of shifted pictures: convolutions of a single channel are slow on CPUs.
    for dim in (3, 2):
        size = padded.shape[dim] - 2 * REACH
        blurred = padded.narrow(dim, 0, size) * (weights[0] / sum(weights))
        for start, weight in enumerate(weights[1:], 1):
            blurred.add_(padded.narrow(dim, start, size), alpha=weight / sum(weights))
        padded = blurred
    return padded
