"""Distances between the distribution of a whole set of images and that of real pictures."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

from nemo_bench.errors import ConfigError
from nemo_bench.metrics.base import BenchMetric
from nemo_bench.metrics.networks import Inception, Network
from nemo_bench.records.images import list_images, unreadable
from nemo_bench.records.io import digest

_ALONE: dict[str, Any] = {"sync_on_compute": False}
"""One process has all features and computes alone; others must not be waited for."""


class _Features(nn.Module):
    """Stands where torchmetrics has its network: what comes in are features already."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        """The features."""
        return features


class SetMetric(BenchMetric):
    """A distance between all images and the pictures of a folder; computed once, from features kept of each image.

    Estimates from fewer images than the features have dimensions are biased, and only comparable at equal numbers.

    Args:
        space: The network whose features are compared.
        folder: Real pictures (:data:`nemo_bench.records.images.ENDINGS`), in subfolders too.
    """

    family = "quality"
    per = "set"
    needs = frozenset({"images", "real"})
    higher_is_better = False
    space: Network

    def __init__(self, space: Network, folder: str | None = None) -> None:
        super().__init__(space)
        self.folder = folder
        self.citation = space.citation

    @property
    def files(self) -> list[Path]:
        """The real pictures, sorted by name."""
        return list_images(Path(self.folder), deep=True) if self.folder else []

    def check(self) -> None:
        """See :meth:`BenchMetric.check`."""
        super().check()
        files = self.files
        if len(files) < 2:
            given = f"{self.folder} holds {len(files)}" if self.folder else "no folder is given"
            msg = f"{self.title} compares with at least 2 real pictures, {given}; set real_images=FOLDER"
            raise ConfigError(msg)
        if bad := unreadable(files, "real pictures"):
            listed = ", ".join(f"{path} ({why})" for path, why in list(bad.items())[:3])
            more = ", ..." if len(bad) > 3 else ""
            msg = f"{self.title}: {len(bad)} of {len(files)} real pictures can't be read: {listed}{more}"
            raise ConfigError(f"{msg}; replace them, or move them out of {self.folder}")

    def fingerprint(self) -> Mapping[str, Any]:
        """See :meth:`BenchMetric.fingerprint`; pictures by name and size in bytes."""
        root = Path(self.folder or "")
        pictures = [[path.relative_to(root).as_posix(), path.stat().st_size] for path in self.files]
        return {**super().fingerprint(), "folder": digest(pictures)}

    @abstractmethod
    def distance(self, images: Tensor, real: Tensor) -> Metric:
        """The torchmetrics metric for features (N, D) and (M, D), which it has not seen yet."""

    def score(self, images: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
        """(1,) value for features (N, D) and (M, D); empty for fewer than two images."""
        if min(len(images), len(real)) < 2:
            return images.new_empty(0)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)  # that all features are kept
            torch.manual_seed(0)
            metric = self.distance(images, real)
            metric.update(images.double(), real=False)
            metric.update(real.double(), real=True)
            result = metric.compute()
        return (result[0] if isinstance(result, tuple) else result).reshape(1)


class FID(SetMetric):
    """Fréchet distance of the Gaussians with the mean and covariance of either set (Heusel et al. 2017).

    Args:
        space: The network; with Inception this is FID, with CLIP what is known as CLIP-FID.
        folder: Real pictures.
    """

    lower = 0.0

    def __init__(self, space: Network, folder: str | None = None) -> None:
        super().__init__(space, folder)
        self.title = "FID" if isinstance(space, Inception) else f"FID ({space.title})"
        self.description = f"Fréchet distance between all images and real ones of features: {_extractor(space)}"
        self.citation = "Heusel et al. 2017" if isinstance(space, Inception) else "Kynkäänniemi et al. 2023"

    def distance(self, images: Tensor, real: Tensor) -> Metric:
        """See :meth:`SetMetric.distance`."""
        return FrechetInceptionDistance(_Features(images.shape[1]), **_ALONE)


class KID(SetMetric):
    """Kernel distance, unbiased, with a cubic kernel, mean over subsets (Bińkowski et al. 2018).

    Args:
        space: The network.
        folder: Real pictures.
        subsets: Number of subsets, drawn alike every time.
        subset_size: Images in each; fewer where a set has fewer.
    """

    def __init__(self, space: Network, folder: str | None = None, subsets: int = 100, subset_size: int = 1000) -> None:
        super().__init__(space, folder)
        self.subsets, self.subset_size = subsets, subset_size
        self.title = "KID" if isinstance(space, Inception) else f"KID ({space.title})"
        self.description = (
            f"squared maximum mean discrepancy, cubic kernel, mean of {subsets} subsets of at most {subset_size}, of "
            f"features: {_extractor(space)}"
        )
        self.citation = "Bińkowski et al. 2018"

    def distance(self, images: Tensor, real: Tensor) -> Metric:
        """See :meth:`SetMetric.distance`."""
        size = min(self.subset_size, len(images), len(real))
        network = _Features(images.shape[1])
        return KernelInceptionDistance(network, subsets=self.subsets, subset_size=size, **_ALONE)


class MiFID(SetMetric):
    """FID divided by how near images are to their nearest real picture, where that is very near (Bai et al. 2021).

    Args:
        space: The network.
        folder: Pictures that the model was trained on.
        limit: Mean cosine distance to the nearest above which FID stays as it is.
    """

    lower = 0.0

    def __init__(self, space: Network, folder: str | None = None, limit: float = 0.1) -> None:
        super().__init__(space, folder)
        self.limit = limit
        self.title = "MiFID" if isinstance(space, Inception) else f"MiFID ({space.title})"
        self.description = (
            "FID divided by the mean cosine distance of images to the nearest training image where that is below "
            f"{limit:g}, of features: {_extractor(space)}"
        )
        self.citation = "Bai et al. 2021"

    def distance(self, images: Tensor, real: Tensor) -> Metric:
        """See :meth:`SetMetric.distance`."""
        network = _Features(images.shape[1])
        return MemorizationInformedFrechetInceptionDistance(network, cosine_distance_eps=self.limit, **_ALONE)

    def score(self, images: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
        """See :meth:`SetMetric.score`."""
        # torchmetrics takes the nearest image of each real picture, the paper the nearest real picture of each image.
        return super().score(real, images)


def _extractor(space: Network) -> str:
    return space.description.removeprefix("cosine similarity of ")
