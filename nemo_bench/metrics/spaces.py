"""Spaces in which pictures are compared: pixels here, networks in ``networks.py`` and ``clip.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion.noise import tiled_distance
from nemo_bench.errors import ConfigError
from nemo_bench.metrics.ssim import Local, SSIMPool, ssim
from nemo_bench.records.io import file_digest
from nemo_bench.records.ranges import Count, check_ranges

PAIRED_VALUES = 1 << 17
"""Values compared at a time on a CPU, few enough for its cache; a GPU takes :data:`GPU_FACTOR` times as many."""
GPU_FACTOR = 64
_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales of MS-SSIM (Wang et al. 2003)."""


class Pool(Protocol):
    """Embedded pictures that many images are compared with, prepared once for all of them."""

    def nearest(self, images: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Finds the most similar picture of each image.

        Args:
            images: N embedded images.
            known: Comparisons made before, (N, M), nan where there is none.

        Returns:
            Similarities or distances, and numbers of the pictures, (N,) each.
        """
        ...


@dataclass(frozen=True)
class ImageSpace(ABC):
    """A way to compare pictures. Spaces of equal settings share networks and embeddings."""

    citation: ClassVar[str] = ""  #: Source.
    is_distance: ClassVar[bool] = False  #: Whether similar pictures have small values.
    #: Lowest and highest possible value of a comparison, None for no bound.
    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)

    def __post_init__(self) -> None:
        check_ranges(type(self).__name__, type(self), vars(self))

    @property
    @abstractmethod
    def title(self) -> str:
        """Short name for titles of metrics."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The value of a comparison, with preprocessing."""

    @property
    def view(self) -> Hashable:
        """Equal for spaces with the same :meth:`embed`."""
        return self

    def check(self) -> None:  # noqa: B027 - most spaces need nothing
        """Raises NemoBenchError if weights or a library are missing; the message says how to get them."""

    @property
    def weights(self) -> Path | None:
        """File of the weights, None for a space without one."""
        return None

    @property
    def is_fetched(self) -> bool:
        """Whether :meth:`fetch` has nothing to download."""
        return True

    def fetch(self) -> None:  # noqa: B027 - most spaces have nothing to fetch
        """Downloads weights, before anything runs; raises ModelError if that fails."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Everything that changes the values: settings, with digests in place of paths."""
        settings = {"kind": type(self).__name__, **asdict(self)}
        return {**settings, "file": file_digest(self.weights)} if self.weights else settings

    @abstractmethod
    def embed(self, pictures: Sequence[Image.Image], size: tuple[int, int], device: torch.device) -> Tensor:
        """Embeds N RGB pictures of any sizes, N at least 1, as (N, ...), float32, on a device.

        Spaces of pixels resize all pictures to the size of the generated images, width and height.
        """

    @abstractmethod
    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarities or distances, (N,), of N embedded pictures to N others, one to one."""

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarities or distances, (N, M), of each of N embedded pictures to each of M; in bounded memory."""
        rows, columns = torch.meshgrid(torch.arange(len(a)), torch.arange(len(b)), indexing="ij")
        size = _batch_size(b)
        parts = zip(rows.flatten().split(size), columns.flatten().split(size), strict=True)
        return torch.cat([self.pair(a[i], b[j]) for i, j in parts]).reshape(len(a), len(b))

    def nearest(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarities or distances, (N,), of N embedded pictures to the most similar of M others."""
        return self.best(self.compare(a, b))

    def best(self, values: Tensor) -> Tensor:
        """The most similar, (N,), of comparisons (N, M)."""
        return values.amin(1) if self.is_distance else values.amax(1)

    def pool(self, pictures: Tensor) -> Pool:
        """Prepares M embedded pictures, at least 1, for a search for the most similar."""
        return _ComparedPool(self, pictures)


@dataclass(frozen=True)
class _ComparedPool:
    """A pool all of whose pictures are compared with each image."""

    space: ImageSpace
    pictures: Tensor

    def nearest(self, images: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values = self.space.compare(images, self.pictures)
        value, number = values.min(1) if self.space.is_distance else values.max(1)
        return value, number


class Pixels(ImageSpace):
    """Pictures themselves, (N, 3, H, W) in [0, 1], all resized to one size (bicubic)."""

    view = "pixels"

    @override
    def embed(self, pictures: Sequence[Image.Image], size: tuple[int, int], device: torch.device) -> Tensor:
        sized = [p if p.size == size else p.resize(size, Image.Resampling.BICUBIC) for p in pictures]
        return to_tensor(sized).to(device)


class PixelDistance(Pixels):
    """Root mean squared difference of pixels: the normalized Euclidean distance of Carlini et al. 2023."""

    title = "Pixel distance"
    description = "root mean squared difference of pixels in [0, 1]"
    citation = "Carlini et al. 2023, section 4"
    is_distance = True
    bounds = (0.0, 1.0)

    @override
    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3)).sqrt()


@dataclass(frozen=True)
class TiledDistance(Pixels):
    """The largest pixel distance among tiles, so that similar backgrounds can't make it small (Carlini et al. 2023)."""

    #: Tiles along either side; 4 gives the published 16 tiles of 128x128 pixels in pictures of 512x512.
    tiles: Count = 4

    title = "Tiled distance"
    citation = "Carlini et al. 2023, section 4.2"
    is_distance = True
    bounds = (0.0, 1.0)

    @property
    @override
    def description(self) -> str:
        return f"largest of the root mean squared pixel differences of {self.tiles} by {self.tiles} tiles"

    @override
    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        return tiled_distance(a, b, self.tiles)


class SSIM(Pixels):
    """Structural similarity (Wang et al. 2004): Gaussian window 11, sigma 1.5, data range 1, borders mirrored."""

    title = "SSIM"
    description = "SSIM (Gaussian window 11, sigma 1.5, data range 1, borders mirrored)"
    citation = "Wang et al. 2004"
    bounds = (-1.0, 1.0)

    @override
    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        return ssim(Local.from_pictures(a), Local.from_pictures(b))

    @override
    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        # Computes the moments of each picture once; a library's function for pairs computes them once per pair.
        pictures = [Local.from_pictures(picture) for picture in a.split(1)]
        parts = [Local.from_pictures(part) for part in b.split(_batch_size(b))]
        return torch.stack([torch.cat([ssim(picture, part) for part in parts]) for picture in pictures])

    @override
    def pool(self, pictures: Tensor) -> SSIMPool:
        return SSIMPool(pictures, _values_at_once(pictures.device))


@dataclass(frozen=True)
class MultiscaleSSIM(Pixels):
    """Multi-scale SSIM (Wang et al. 2003) by torchmetrics; pictures too small for the scales raise ConfigError."""

    #: Number of scales. The published five need pictures of more than 160 pixels on a side; fewer take the first
    #: weights, scaled to a sum of one.
    scales: Annotated[int, Field(ge=1, le=len(_BETAS))] = len(_BETAS)

    citation = "Wang et al. 2003"
    bounds = (0.0, 1.0)

    @property
    @override
    def title(self) -> str:
        return "MS-SSIM" if self.scales == len(_BETAS) else f"MS-SSIM ({self.scales} scales)"

    @property
    @override
    def description(self) -> str:
        return f"MS-SSIM ({self.scales} scales, Gaussian window 11, sigma 1.5, data range 1)"

    @override
    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

        least = 10 * max(1, self.scales - 1) ** 2
        if min(a.shape[2:]) <= least:
            height, width = a.shape[2:]
            msg = f"MS-SSIM with {self.scales} scales needs pictures of more than {least} pixels on a side, given"
            raise ConfigError(f"{msg} {width}x{height}; give its space fewer scales, or leave it out")
        betas = _BETAS[: self.scales]
        weights = tuple(beta / sum(betas) for beta in betas) if self.scales < len(_BETAS) else betas
        values = multiscale_structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", betas=weights)
        return values.reshape(len(a))


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (N, 3, H, W) values in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


def _values_at_once(device: torch.device) -> int:
    """Number of values computed with at a time."""
    return PAIRED_VALUES * (1 if device.type == "cpu" else GPU_FACTOR)


def _batch_size(pictures: Tensor) -> int:
    """Number of pictures compared at a time, so that memory does not grow with their number."""
    return max(1, _values_at_once(pictures.device) // pictures[0].numel())
