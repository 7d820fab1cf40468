"""Networks that embed pictures: SSCD and Inception; and LPIPS. Their weights are trained ones, from files."""

from __future__ import annotations

import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench.errors import ConfigError, ModelError, first_line
from nemo_bench.metrics.spaces import ImageSpace, Pixels, to_tensor
from nemo_bench.records.io import file_digest

BATCH = 64
"""Pictures in a batch of a network."""


class Network(ImageSpace):
    """A network that embeds each picture as a vector, (N, D); vectors are compared by their cosine."""

    bounds = (-1.0, 1.0)

    @abstractmethod
    def load(self) -> nn.Module:
        """The network with trained weights, on the CPU; raises ModelError if they are missing or of another network."""

    @abstractmethod
    def prepare(self, network: Any, picture: Image.Image) -> Tensor:
        """The input of the network for a picture of any size, (3, H, W)."""

    @abstractmethod
    def forward(self, network: Any, pixels: Tensor) -> Tensor:
        """Vectors of prepared pictures, (N, D)."""

    @override
    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image], size: tuple[int, int], device: torch.device) -> Tensor:
        network = loaded(self, device)
        vectors: dict[int, Tensor] = {}
        for start in range(0, len(pictures), BATCH):
            by_shape: dict[torch.Size, dict[int, Tensor]] = {}
            for number, picture in enumerate(pictures[start : start + BATCH], start):
                pixels = self.prepare(network, picture)
                by_shape.setdefault(pixels.shape, {})[number] = pixels
            for batch in by_shape.values():
                embedded = self.forward(network, torch.stack([*batch.values()]).to(device)).float()
                vectors.update(zip(batch, embedded, strict=True))
        return torch.stack([vectors[number] for number in range(len(pictures))])

    @override
    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a, b)

    @override
    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        return F.normalize(a) @ F.normalize(b).T


@cache
def loaded(space: Network | LPIPS, device: torch.device) -> nn.Module:
    """The network of a space, loaded once for all metrics that use it."""
    network = space.load().eval().to(device)
    for parameter in network.parameters():
        parameter.requires_grad = False  # one by one: TorchScript modules know no other way
    return network


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_PROTOCOLS = {
    "disc_mixup": SimpleNamespace(
        network="disc_mixup", dimensions=512, resize=[320, 320], crop=None, statistics=_IMAGENET,
        description="resized to 320x320, ImageNet statistics, as in Hintersdorf et al. 2024",
    ),
    "disc_large_wen": SimpleNamespace(
        network="disc_large", dimensions=1024, resize=[256], crop=[224, 224],
        statistics={"mean": [0.5] * 3, "std": [0.5] * 3},
        description="shorter side resized to 256, central 224x224, mean and deviation 0.5, as in Wen et al. 2024",
    ),
    "disc_large_membench": SimpleNamespace(
        network="disc_large", dimensions=1024, resize=[288, 288], crop=None, statistics=_IMAGENET,
        description="resized to 288x288, ImageNet statistics, as in MemBench, Hong et al. 2024",
    ),
}  # fmt: skip
"""Published uses of SSCD, each one of its networks with a preparation of pictures; by name in the settings."""


@dataclass(frozen=True)
class SSCD(Network):
    """Self-supervised descriptor for copy detection (Pizzi et al. 2022), from a published TorchScript file.

    The published networks and preparations give numbers on different scales. A protocol is one network with one
    preparation, and a file of another network is refused.
    """

    #: ``sscd_disc_mixup.torchscript.pt`` (ResNet-50) or ``sscd_disc_large.torchscript.pt`` (ResNeXt-101).
    file: str = ""
    #: ``disc_mixup``, the first network at 320x320; or the second one as ``disc_large_wen``, the centre at 224x224, or
    #: ``disc_large_membench``, 288x288.
    protocol: Literal["disc_mixup", "disc_large_wen", "disc_large_membench"] = "disc_mixup"
    sha256: str | None = None  #: Expected digest of the file, or its beginning.

    citation = "Pizzi et al. 2022"

    @property
    @override
    def title(self) -> str:
        return f"SSCD {self.protocol.replace('_', ' ')}"

    @property
    def _protocol(self) -> Any:
        return _PROTOCOLS[self.protocol]

    @property
    @override
    def description(self) -> str:
        return f"cosine similarity of SSCD embeddings ({self._protocol.network}, {self._protocol.description})"

    @property
    @override
    def weights(self) -> Path:
        return Path(self.file)

    def check_file(self) -> None:
        """Raises ModelError if the file is missing or damaged; :meth:`check` loads it too, to recognize the network."""
        name = f"sscd_{self._protocol.network}.torchscript.pt"
        url = f"https://dl.fbaipublicfiles.com/sscd-copy-detection/{name}"
        _check_download(f"SSCD {self.protocol}", self.file, self.sha256, url)

    @override
    def check(self) -> None:
        self.check_file()
        _check_network(self)

    @override
    def load(self) -> nn.Module:
        with _reading(self.file, "is no TorchScript file of SSCD"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # SSCD is published as TorchScript alone
            return torch.jit.load(self.file, map_location="cpu")

    @override
    def prepare(self, network: Any, picture: Image.Image) -> Tensor:
        from torchvision.transforms.v2 import functional

        # The picture itself is resized, then normalized as a tensor: the order of all published scripts.
        picture = functional.resize(picture, self._protocol.resize)
        if self._protocol.crop:
            picture = functional.center_crop(picture, self._protocol.crop)
        return functional.normalize(to_tensor([picture])[0], **self._protocol.statistics)

    @override
    def forward(self, network: Any, pixels: Tensor) -> Tensor:
        vectors: Tensor = network(pixels)
        expected = self._protocol.dimensions
        if vectors.shape != (len(pixels), expected):
            raise ModelError(
                f"SSCD {self.protocol}: {self.file} gives {vectors.shape[-1]} values a picture, expected {expected}; "
                "it is another network"
            )
        return vectors


@dataclass(frozen=True)
class Inception(Network):
    """Inception-v3 as in the original FID (Heusel et al. 2017), its 2048 values after the last pooling."""

    file: str = ""  #: State file of torch-fidelity.
    sha256: str | None = None  #: Expected digest of the file, or its beginning.

    title = "Inception"
    description = "Inception-v3 (FID weights of 2015-12-05, 2048 values, 299x299 bilinear with antialiasing)"
    citation = "Szegedy et al. 2016"

    @property
    @override
    def weights(self) -> Path:
        return Path(self.file)

    @override
    def check(self) -> None:
        if find_spec("torch_fidelity") is None:
            raise ConfigError("Inception needs torch-fidelity: pip install 'nemo-bench[fid]'")
        release = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
        url = f"{release}/weights-inception-2015-12-05-6726825d.pth"
        _check_download("Inception", self.file, self.sha256, url)
        _check_network(self)

    @override
    def load(self) -> nn.Module:
        from torchmetrics.image.fid import NoTrainInceptionV3

        with _reading(self.file, "has no weights of Inception"):
            _refuse_code(self.file)
            return NoTrainInceptionV3("inception-v3-compat", ["2048"], self.file)

    @override
    def prepare(self, network: Any, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # the network resizes by itself

    @override
    def forward(self, network: Any, pixels: Tensor) -> Tensor:
        return network(pixels)


@dataclass(frozen=True)
class LPIPS(Pixels):
    """Learned perceptual distance (Zhang et al. 2018) by torchmetrics, at the size of the images.

    The weights of the backbone must be in the cache of torchvision; nothing is downloaded here.
    """

    net: Literal["alex", "vgg", "squeeze"] = "alex"  #: Backbone.

    citation = "Zhang et al. 2018"
    is_distance = True
    bounds = (0.0, None)

    @property
    @override
    def title(self) -> str:
        return f"LPIPS {self.net}"

    @property
    @override
    def description(self) -> str:
        return f"LPIPS distance ({self.net} backbone)"

    @property
    def _url(self) -> str:
        from torchvision import models

        backbone = {"alex": "AlexNet", "vgg": "VGG16", "squeeze": "SqueezeNet1_1"}[self.net]
        return models.get_weight(f"{backbone}_Weights.IMAGENET1K_V1").url

    @property
    @override
    def weights(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(self._url).name

    @override
    def check(self) -> None:
        if not self.weights.is_file():
            raise ModelError(
                f"no weights for LPIPS {self.net}: {self.weights} does not exist. Download {self._url} once and put it "
                "there (TORCH_HOME moves that folder), or leave LPIPS out"
            )
        check_readable(f"LPIPS {self.net}", self.weights)
        _check_network(self)

    def load(self) -> nn.Module:
        """The network with trained weights, on the CPU; raises ModelError for a file of another network."""
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        with _reading(self.weights, f"has no weights of LPIPS {self.net}"):
            _refuse_code(self.weights)
            return LearnedPerceptualImagePatchSimilarity(self.net).net

    @override
    @torch.no_grad()
    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        return loaded(self, a.device)(a, b, normalize=True).reshape(len(a))


def check_readable(kind: str, path: Path) -> None:
    """Raises ModelError if a file of weights, of safetensors or torch, was cut off or damaged; it names the network."""
    if damage := _damage(path, path.stat().st_mtime_ns):
        raise ModelError(f"no weights for {kind}: {path} can't be read ({damage}); download it again")


@cache
def _damage(path: Path, time: int) -> str:
    """Reason why a file of weights, last written at a time, can't be read; empty if it can."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return ""
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            return f"{damaged} in it is damaged" if damaged else ""
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many libraries, for many kinds of damage
        return first_line(error)
    return ""


def _check_download(kind: str, file: str, sha256: str | None, url: str) -> None:
    """Raises ModelError if a file of weights is missing, damaged or another one."""
    path = Path(file)
    if not file or not path.is_file():
        given = f"'{file}' does not exist" if file else "no file is given"
        raise ModelError(
            f"no weights for {kind}: {given}. Download {url} once into a folder of weights, and name that folder: "
            "weights=FOLDER"
        )
    if sha256 and not file_digest(path).startswith(sha256.lower()):
        raise ModelError(f"{kind}: {file} has SHA-256 {file_digest(path)}, expected {sha256}; download it again")
    check_readable(kind, path)


@contextmanager
def _reading(file: str | Path, mismatch: str) -> Iterator[None]:
    """Raises ModelError if the code in it fails because the file is of another network."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        raise ModelError(f"{file} {mismatch} ({first_line(error)}); download it again") from error


def _refuse_code(file: str | Path) -> None:
    """Raises UnpicklingError for a file that would run code: libraries load some files without a look at that."""
    torch.load(file, map_location="cpu", weights_only=True)


def _check_network(space: SSCD | Inception | LPIPS) -> None:
    """Raises ModelError if a space's file of weights is of another network; tried once while the file is the same."""
    _try_network(space, space.weights.stat().st_mtime_ns)


@cache
@torch.no_grad()
def _try_network(space: SSCD | Inception | LPIPS, time: int) -> None:
    network = space.load().eval()
    if isinstance(space, SSCD):  # only the output of a TorchScript file says which network it is
        space.forward(network, torch.zeros(1, 3, 64, 64))
