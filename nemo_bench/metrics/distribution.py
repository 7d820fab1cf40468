"""Distances between the distribution of a whole set of images and that of real pictures."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench.errors import ConfigError
from nemo_bench.metrics.base import BenchMetric
from nemo_bench.metrics.networks import Inception, Network
from nemo_bench.records.images import list_images, unreadable
from nemo_bench.records.io import digest
from nemo_bench.records.ranges import Count

if TYPE_CHECKING:
    from torchmetrics import Metric

_ALONE: dict[str, Any] = {"sync_on_compute": False}  # one process has all features; others must not be waited for


class SetMetric(BenchMetric):
    """A distance between all images and the pictures of a folder, in the features of a network.

    Estimates from fewer images than the features have dimensions are biased, and only comparable at equal numbers.

    Args:
        folder: Real pictures (:data:`nemo_bench.records.images.ENDINGS`), in subfolders too.
    """

    name: ClassVar[str]
    family = "quality"
    per = "set"
    needs = frozenset({"images", "real"})
    higher_is_better = False
    space: Network

    def __init__(self, space: Network, folder: str | None = None) -> None:
        super().__init__(space)
        self.folder = folder
        self.title = self.name if isinstance(space, Inception) else f"{self.name} ({space.title})"
        self.features = f"features: {space.description.removeprefix('cosine similarity of ')}"

    @property
    def files(self) -> list[Path]:
        """The real pictures, sorted by name."""
        return list_images(Path(self.folder), deep=True) if self.folder else []

    @override
    def check(self) -> None:
        super().check()
        files = self.files
        if len(files) < 2:
            given = f"{self.folder} holds {len(files)}" if self.folder else "no folder is given"
            raise ConfigError(f"{self.title} compares with at least 2 real pictures, {given}; set real_images=FOLDER")
        if bad := unreadable(files, "real pictures"):
            listed = ", ".join(f"{path} ({why})" for path, why in list(bad.items())[:3])
            more = ", ..." if len(bad) > 3 else ""
            msg = f"{self.title}: {len(bad)} of {len(files)} real pictures can't be read: {listed}{more}"
            raise ConfigError(f"{msg}; replace them, or move them out of {self.folder}")

    @override
    def fingerprint(self) -> Mapping[str, Any]:
        root = Path(self.folder or "")
        pictures = [[path.relative_to(root).as_posix(), path.stat().st_size] for path in self.files]
        return {**super().fingerprint(), "folder": digest(pictures)}

    @abstractmethod
    def distance(self, images: Tensor, real: Tensor) -> Metric:
        """A new torchmetrics metric for features (N, D) and (M, D)."""

    def knowing(self, images: Tensor, real: Tensor) -> Metric:
        """A torchmetrics metric like :meth:`distance` that was given the real ones."""
        metric = self.distance(images, real)
        metric.update(real.double(), real=True)
        return metric

    @override
    def score(self, images: Tensor, real: Tensor) -> Tensor:
        if min(len(images), len(real)) < 2:
            return images.new_empty(0)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)  # torchmetrics warns that it keeps all features
            torch.manual_seed(0)
            metric = self.knowing(images, real)
            metric.update(images.double(), real=False)
            result = metric.compute()
        return (result[0] if isinstance(result, tuple) else result).reshape(1)


class FID(SetMetric):
    """Fréchet distance of the Gaussians with the mean and covariance of either set (Heusel et al. 2017).

    Inception gives FID, CLIP gives CLIP-FID. Moments of the real pictures are computed once, as long as the tensor
    of them is the same.
    """

    name = "FID"
    lower = 0.0

    def __init__(self, space: Network, folder: str | None = None) -> None:
        super().__init__(space, folder)
        self.description = f"Fréchet distance between all images and real ones of {self.features}"
        self.citation = "Heusel et al. 2017" if isinstance(space, Inception) else "Kynkäänniemi et al. 2023"
        self._known: tuple[Tensor, Metric] | None = None

    @override
    def distance(self, images: Tensor, real: Tensor) -> Metric:
        from torchmetrics.image.fid import FrechetInceptionDistance

        network = nn.Identity()  # features come in already
        network.num_features = torch.tensor(images.shape[1])
        return FrechetInceptionDistance(network, reset_real_features=False, **_ALONE)

    @override
    def knowing(self, images: Tensor, real: Tensor) -> Metric:
        if self._known is None or self._known[0] is not real:
            self._known = real, super().knowing(images, real)
        _, metric = self._known
        metric.reset()  # of the images before
        return metric


class KID(SetMetric):
    """Kernel distance, unbiased, with a cubic kernel, mean over subsets (Bińkowski et al. 2018).

    Args:
        subsets: Number of subsets; the same ones are drawn every time.
        subset_size: Images in each, at most the size of the smaller set.
    """

    name = "KID"
    citation = "Bińkowski et al. 2018"

    def __init__(
        self,
        space: Network,
        folder: str | None = None,
        subsets: Count = 100,
        subset_size: Annotated[int, Field(ge=2)] = 1000,
    ) -> None:
        super().__init__(space, folder)
        self.subsets = subsets
        self.subset_size = subset_size
        self.description = (
            f"squared maximum mean discrepancy, cubic kernel, mean of {subsets} subsets of at most {subset_size}, of "
            f"{self.features}"
        )

    @override
    def distance(self, images: Tensor, real: Tensor) -> Metric:
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(self.subset_size, len(images), len(real))
        return KernelInceptionDistance(nn.Identity(), subsets=self.subsets, subset_size=size, **_ALONE)


class MiFID(SetMetric):
    """FID divided by the cosine distance of images to their nearest training image, if that is small (Bai et al. 2021).

    Args:
        folder: Training images of the model.
        limit: Mean cosine distance above which FID is not divided.
    """

    name = "MiFID"
    citation = "Bai et al. 2021"
    lower = 0.0

    def __init__(
        self, space: Network, folder: str | None = None, limit: Annotated[float, Field(gt=0, le=1)] = 0.1
    ) -> None:
        super().__init__(space, folder)
        self.limit = limit
        self.description = (
            "FID divided by the mean cosine distance of images to the nearest training image where that is below "
            f"{limit:g}, of {self.features}"
        )

    @override
    def distance(self, images: Tensor, real: Tensor) -> Metric:
        from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

        limit = float(self.limit)
        return MemorizationInformedFrechetInceptionDistance(nn.Identity(), cosine_distance_eps=limit, **_ALONE)

    @override
    def score(self, images: Tensor, real: Tensor) -> Tensor:
        # torchmetrics takes the nearest image of each real picture, the paper the nearest real picture of each image.
        return super().score(real, images)
