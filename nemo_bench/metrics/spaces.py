"""Spaces in which pictures are compared. Here those of pixels; those of networks are in ``networks.py``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from nemo_bench.diffusion.noise import tiled_distance
from nemo_bench.errors import ConfigError

PAIRED_VALUES = 1 << 18
"""Values compared at a time on a CPU, few enough for its cache; a GPU takes :data:`GPU_FACTOR` times as many."""
GPU_FACTOR = 64
_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales of MS-SSIM (Wang et al. 2003)."""


@dataclass(frozen=True)
class ImageSpace(ABC):
    """What is looked at when pictures are compared. Spaces of equal settings share what they load and embed."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Short name for titles of metrics."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What is compared and how, with preprocessing."""

    @property
    def citation(self) -> str:
        """Where it comes from."""
        return ""

    @property
    def is_distance(self) -> bool:
        """Whether small values stand for pictures that are alike."""
        return False

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Lowest and highest possible value of a comparison, None where there is none."""
        return None, None

    @property
    def view(self) -> Hashable:
        """Equal for spaces whose :meth:`embed` gives the same."""
        return self

    def check(self) -> None:  # noqa: B027 - most spaces need nothing
        """Makes sure that nothing is missing, before anything loads.

        Raises:
            NemoBenchError: Weights or a library are missing; the message says how to get them.
        """

    @property
    def is_fetched(self) -> bool:
        """Whether :meth:`fetch` has nothing to download."""
        return True

    def fetch(self) -> None:  # noqa: B027 - most spaces have nothing to fetch
        """Downloads what it has to, before anything runs.

        Raises:
            ModelError: It can't be had.
        """

    def fingerprint(self) -> Mapping[str, Any]:
        """What decides its values: settings, and digests in place of paths."""
        return {"kind": type(self).__name__, **asdict(self)}

    @abstractmethod
    def embed(self, pictures: Sequence[Image.Image], size: tuple[int, int], device: torch.device) -> Tensor:
        """Pictures as this space sees them.

        Args:
            pictures: N RGB pictures of any sizes, at least one.
            size: Width and height of the generated images; spaces of pixels bring all pictures to it.
            device: Where the result is, and is computed.

        Returns:
            (N, ...), float32.
        """

    @abstractmethod
    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        """Compares embedded pictures one to one.

        Args:
            a: N of them.
            b: N of them.

        Returns:
            (N,) similarities or distances.
        """

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compares each of some embedded pictures with each of others, a bounded number at a time.

        Args:
            a: N of them.
            b: M of them.

        Returns:
            (N, M) similarities or distances.
        """
        rows, columns = torch.meshgrid(torch.arange(len(a)), torch.arange(len(b)), indexing="ij")
        size = _at_once(b)
        parts = zip(rows.flatten().split(size), columns.flatten().split(size), strict=True)
        return torch.cat([self.pair(a[i], b[j]) for i, j in parts]).reshape(len(a), len(b))

    def nearest(self, a: Tensor, b: Tensor) -> Tensor:
        """The value of each of some embedded pictures to the one of others that it is most like, (N,)."""
        values = self.compare(a, b)
        return values.amin(1) if self.is_distance else values.amax(1)


class Pixels(ImageSpace):
    """Pictures themselves, (N, 3, H, W) in [0, 1], all brought to one size (bicubic)."""

    @property
    def title(self) -> str:
        """See :attr:`ImageSpace.title`."""
        return "Pixels"

    @property
    def description(self) -> str:
        """See :attr:`ImageSpace.description`."""
        return "root mean squared difference of pixels in [0, 1]"

    @property
    def is_distance(self) -> bool:
        """See :attr:`ImageSpace.is_distance`."""
        return True

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """See :attr:`ImageSpace.bounds`."""
        return 0.0, 1.0

    @property
    def view(self) -> Hashable:
        """See :attr:`ImageSpace.view`."""
        return Pixels

    def embed(self, pictures: Sequence[Image.Image], size: tuple[int, int], device: torch.device) -> Tensor:
        """See :meth:`ImageSpace.embed`."""
        sized = [p if p.size == size else p.resize(size, Image.Resampling.BICUBIC) for p in pictures]
        return to_tensor(sized).to(device)

    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSpace.pair`."""
        return (a - b).square().mean((1, 2, 3)).sqrt()


class PixelDistance(Pixels):
    """Root mean squared difference of pixels: the normalized Euclidean distance of Carlini et al. 2023."""

    @property
    def title(self) -> str:
        """See :attr:`ImageSpace.title`."""
        return "Pixel distance"

    @property
    def citation(self) -> str:
        """See :attr:`ImageSpace.citation`."""
        return "Carlini et al. 2023, section 4"


@dataclass(frozen=True)
class TiledDistance(Pixels):
    """The largest pixel distance among tiles, which like backgrounds can't make small (Carlini et al. 2023).

    Args:
        tiles: Tiles along either side; 4 are the published 16 tiles of 128 by 128 pixels in pictures of 512 by 512.
    """

    tiles: int = 4

    @property
    def title(self) -> str:
        """See :attr:`ImageSpace.title`."""
        return "Tiled distance"

    @property
    def description(self) -> str:
        """See :attr:`ImageSpace.description`."""
        return f"largest of the root mean squared pixel differences of {self.tiles} by {self.tiles} tiles"

    @property
    def citation(self) -> str:
        """See :attr:`ImageSpace.citation`."""
        return "Carlini et al. 2023, section 4.2"

    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSpace.pair`."""
        return tiled_distance(a, b, self.tiles)


class SSIM(Pixels):
    """Structural similarity (Wang et al. 2004): Gaussian window 11, sigma 1.5, data range 1, borders mirrored."""

    @property
    def title(self) -> str:
        """See :attr:`ImageSpace.title`."""
        return "SSIM"

    @property
    def description(self) -> str:
        """See :attr:`ImageSpace.description`."""
        return "SSIM (Gaussian window 11, sigma 1.5, data range 1, borders mirrored)"

    @property
    def citation(self) -> str:
        """See :attr:`ImageSpace.citation`."""
        return "Wang et al. 2004"

    @property
    def is_distance(self) -> bool:
        """See :attr:`ImageSpace.is_distance`."""
        return False

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """See :attr:`ImageSpace.bounds`."""
        return -1.0, 1.0

    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSpace.pair`."""
        return _ssim(a, _moments(a), b, _moments(b))

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSpace.compare`.

        Each picture's own moments are taken once, not once a pair, as a library's function for pairs would.
        """
        moments = _moments(a)
        columns = []
        for some in b.split(_at_once(b)):
            theirs = _moments(some)
            rows = [_ssim(a[i, None], (moments[0][i, None], moments[1][i, None]), some, theirs) for i in range(len(a))]
            columns.append(torch.stack(rows))
        return torch.cat(columns, 1)


@dataclass(frozen=True)
class MultiscaleSSIM(Pixels):
    """Multi-scale SSIM (Wang et al. 2003) by torchmetrics.

    Args:
        scales: Number of scales. The published five need pictures of more than 160 pixels on a side; with fewer, the
            weights of the first ones are scaled to a sum of one.
    """

    scales: int = 5

    @property
    def title(self) -> str:
        """See :attr:`ImageSpace.title`."""
        return "MS-SSIM" if self.scales == len(_BETAS) else f"MS-SSIM ({self.scales} scales)"

    @property
    def description(self) -> str:
        """See :attr:`ImageSpace.description`."""
        return f"MS-SSIM ({self.scales} scales, Gaussian window 11, sigma 1.5, data range 1)"

    @property
    def citation(self) -> str:
        """See :attr:`ImageSpace.citation`."""
        return "Wang et al. 2003"

    @property
    def is_distance(self) -> bool:
        """See :attr:`ImageSpace.is_distance`."""
        return False

    def check(self) -> None:
        """See :meth:`ImageSpace.check`."""
        if not 1 <= self.scales <= len(_BETAS):
            raise ConfigError(f"MS-SSIM has 1 to {len(_BETAS)} scales, given {self.scales}")

    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSpace.pair`.

        Raises:
            ConfigError: The pictures are too small for so many scales.
        """
        least = 10 * max(1, self.scales - 1) ** 2
        if min(a.shape[2:]) <= least:
            height, width = a.shape[2:]
            msg = f"MS-SSIM with {self.scales} scales needs pictures of more than {least} pixels on a side, given"
            raise ConfigError(f"{msg} {width}x{height}; give its space fewer scales, or leave it out")
        betas = _BETAS[: self.scales]
        weights = tuple(beta / sum(betas) for beta in betas) if self.scales < len(_BETAS) else betas
        values = multiscale_structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", betas=weights)
        return values.reshape(len(a))


def _at_once(pictures: Tensor) -> int:
    """How many of some embedded pictures are compared at a time, so that memory does not grow with their number."""
    values = PAIRED_VALUES * (1 if pictures.device.type == "cpu" else GPU_FACTOR)
    return max(1, values // pictures[0].numel())


def _blur(images: Tensor) -> Tensor:
    """Means under a Gaussian window of 11 by 11 and sigma 1.5 at every pixel, borders mirrored."""
    weights = [math.exp(-(step**2) / (2 * 1.5**2)) for step in range(-5, 6)]
    # Sums of shifted pictures: convolutions of a single channel are slow on CPUs.
    for dim in (2, 3):
        size = images.shape[dim]
        padded = F.pad(images, (0, 0, 5, 5) if dim == 2 else (5, 5, 0, 0), mode="reflect")
        images = torch.zeros_like(images)
        for start, weight in enumerate(weights):
            images.add_(padded.narrow(dim, start, size), alpha=weight / sum(weights))
    return images


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Local means and variances."""
    mean = _blur(images)
    return mean, (_blur(images.square()) - mean.square()).clamp(min=0)


def _ssim(a: Tensor, of_a: tuple[Tensor, Tensor], b: Tensor, of_b: tuple[Tensor, Tensor]) -> Tensor:
    """SSIM of pictures, of which ``a`` may be a single one, with their moments."""
    (mean_a, variance_a), (mean_b, variance_b) = of_a, of_b
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    return (luminance * (2 * covariance + c2) / (variance_a + variance_b + c2)).mean((1, 2, 3))


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (N, 3, H, W) values in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255
