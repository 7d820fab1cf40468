"""Networks that embed pictures: open_clip, SSCD, Inception; and LPIPS. Weights are always trained ones.

Nothing is downloaded but by open_clip, for a named pair of model and weights; all else is a file that must be there.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision import models
from torchvision.transforms import v2

from nemo_bench import hub
from nemo_bench.diffusion import file_digest, folder_digest
from nemo_bench.errors import ConfigError, ModelError, did_you_mean
from nemo_bench.metrics.spaces import ImageSpace, Pixels, to_tensor
from nemo_bench.records.io import parse_json

BATCH = 64
"""Pictures that a network sees at once."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Network(ImageSpace):
    """A network that gives each picture a vector, (N, D); vectors are compared by their cosine."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """See :attr:`ImageSpace.bounds`."""
        return -1.0, 1.0

    @abstractmethod
    def load(self) -> nn.Module:
        """The network with trained weights, on the CPU.

        Raises:
            ModelError: The weights can't be had.
        """

    @abstractmethod
    def prepare(self, network: Any, picture: Image.Image) -> Tensor:
        """A picture as the network wants it, (3, H, W)."""

    @abstractmethod
    def forward(self, network: Any, pixels: Tensor) -> Tensor:
        """Vectors of prepared pictures, (N, D)."""

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image], size: tuple[int, int], device: torch.device) -> Tensor:
        """See :meth:`ImageSpace.embed`; each picture is prepared from its own size."""
        network = loaded(self, device)
        vectors: dict[int, Tensor] = {}
        for start in range(0, len(pictures), BATCH):
            pixels = {start + i: self.prepare(network, p) for i, p in enumerate(pictures[start : start + BATCH])}
            for shape in dict.fromkeys(image.shape for image in pixels.values()):
                alike = {number: image for number, image in pixels.items() if image.shape == shape}
                found = self.forward(network, torch.stack(list(alike.values())).to(device)).float()
                vectors.update(zip(alike, found, strict=True))
        return torch.stack([vectors[number] for number in range(len(pictures))])

    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSpace.pair`."""
        return F.cosine_similarity(a, b)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSpace.compare`."""
        return F.normalize(a) @ F.normalize(b).T


@cache
def loaded(space: Network | LPIPS, device: torch.device) -> nn.Module:
    """The network of a space, made once for all metrics that use it."""
    network = space.load().eval().to(device)
    for parameter in network.parameters():
        parameter.requires_grad = False  # one by one: TorchScript modules know no other way
    return network


HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""What open_clip takes from a repository of the hub."""


_QUICK = "-quickgelu"
"""What open_clip's names of architectures end with that have QuickGELU where the same without it have GELU."""


class _Clip(nn.Module):
    def __init__(self, model: str, pretrained: str | None, **preparation: Any) -> None:
        super().__init__()
        self.network, self.preprocess = open_clip.create_model_from_pretrained(model, pretrained, **preparation)
        self.tokenizer = open_clip.get_tokenizer(model)


@dataclass(frozen=True)
class OpenClip(Network):
    """An open_clip model with its own preprocessing and tokenizer.

    Weights are used with the activation that they were trained with, GELU or QuickGELU: those of OpenAI, MetaCLIP and
    DFN need an architecture whose name ends with ``-quickgelu``. What disagrees is refused. A file of weights says
    nothing of its activation; it is recognized if it is one of those that open_clip lists, or else by the
    ``open_clip_config.json`` or ``config.json`` it was published with, beside it.

    Args:
        model: Architecture, such as ``ViT-B-32-quickgelu``, or ``local-dir:FOLDER`` with ``open_clip_config.json`` and
            weights.
        pretrained: Weights tag, such as ``openai``, or file; unused for a local folder.
    """

    model: str = "ViT-B-32-quickgelu"
    pretrained: str | None = None

    @property
    def _folder(self) -> Path | None:
        return Path(self.model.removeprefix("local-dir:")) if self.model.startswith("local-dir:") else None

    @property
    def title(self) -> str:
        """See :attr:`ImageSpace.title`."""
        return "CLIP" if self._folder else f"CLIP {self.model}"

    @property
    def description(self) -> str:
        """See :attr:`ImageSpace.description`."""
        weights = (
            "weights of its folder" if self._folder else f"{self.model}, weights {Path(str(self.pretrained)).name}"
        )
        return f"cosine similarity of open_clip embeddings ({weights})"

    @property
    def citation(self) -> str:
        """See :attr:`ImageSpace.citation`."""
        return "Radford et al. 2021"

    def check(self) -> None:
        """See :meth:`ImageSpace.check`."""
        if self._folder:
            _check_clip_folder(self._folder)
        elif self.model not in open_clip.list_models():
            known = did_you_mean(self.model, open_clip.list_models())
            raise ModelError(f"unknown open_clip model '{self.model}' (no weights for it). {known}")
        elif not self.pretrained:
            raise ModelError(f"no weights for open_clip model '{self.model}': set pretrained to a tag or file")
        elif not Path(self.pretrained).is_file():
            tags = open_clip.list_pretrained_tags_by_model(self.model)
            if self.pretrained not in tags:
                hint = did_you_mean(self.pretrained, tags) if tags else "There are none; give a file."
                if self._twin and self.pretrained in open_clip.list_pretrained_tags_by_model(self._twin):
                    hint = f"They belong to '{self._twin}': name that as the model."
                raise ModelError(
                    f"no weights for open_clip model '{self.model}', pretrained '{self.pretrained}'. {hint}"
                )
        else:
            _check_whole(f"open_clip model '{self.model}'", Path(self.pretrained))
        self._check_activation()

    @property
    def _twin(self) -> str | None:
        """The architecture that differs in its activation alone, if open_clip has it."""
        twin = self.model.removesuffix(_QUICK) if self.model.endswith(_QUICK) else self.model + _QUICK
        return twin if twin in open_clip.list_models() else None

    def _check_activation(self) -> None:
        """Raises ModelError where the network would have another activation than its weights were trained with."""
        if self._folder:
            own = _quick_by_open_clip(self._folder)
            files = [file for file in self._folder.iterdir() if file.suffix in {".safetensors", ".bin", ".pt", ".pth"}]
            told = {_quick_by_transformers(self._folder), *map(_quick_by_digest, files)}
            mend = f"correct quick_gelu in {self._folder / 'open_clip_config.json'}"
        else:
            own = bool(open_clip.get_model_config(self.model).get("quick_gelu", False))
            told = self._told_by_weights(Path(str(self.pretrained)))
            mend = f"name '{self._twin}' as the model" if self._twin else "name a local-dir:FOLDER as the model"
        names = {True: "QuickGELU", False: "GELU"}
        if (not own) in told:
            raise ModelError(
                f"open_clip model '{self.model}' has {names[bool(own)]}, but its weights "
                f"{'' if self._folder else repr(self.pretrained) + ' '}were trained with {names[not own]}; {mend}"
            )
        if told <= {None} and not own and not self._folder and self._twin:
            raise ModelError(
                f"open_clip model '{self.model}' has GELU, and nothing tells whether its weights '{self.pretrained}' "
                f"were trained with it. If they were trained with QuickGELU, as those of OpenAI were, {mend}; if not, "
                f"put the open_clip_config.json that they were published with beside them, or one that holds "
                '{"model_cfg": {"quick_gelu": false}}'
            )

    def _told_by_weights(self, file: Path) -> set[bool | None]:
        if not file.is_file():
            return {bool(self._listed.get("quick_gelu", False))}
        return {_quick_by_digest(file), _quick_by_open_clip(file.parent), _quick_by_transformers(file.parent)}

    def fingerprint(self) -> Mapping[str, Any]:
        """See :meth:`ImageSpace.content`."""
        content = super().fingerprint()
        if self._folder:
            return {**content, "model": folder_digest(self._folder)}
        if self.pretrained and Path(self.pretrained).is_file():
            return {**content, "pretrained": file_digest(Path(self.pretrained))}
        return content

    @property
    def is_fetched(self) -> bool:
        """See :attr:`ImageSpace.is_fetched`."""
        if self._folder or Path(str(self.pretrained)).is_file():
            return True
        return self._downloaded is not None

    @property
    def _listed(self) -> dict[str, Any]:
        """What open_clip knows of the weights of this tag."""
        return dict(open_clip.get_pretrained_cfg(self.model, str(self.pretrained)))

    @property
    def _downloaded(self) -> str | None:
        """File of the weights of this tag, None before it was downloaded."""
        place, _, file = self._listed.get("hf_hub", "").rpartition("/")
        found = [try_to_load_from_cache(place, name) for name in ([file] if file else HUB_FILES)] if place else []
        return next((path for path in found if isinstance(path, str)), None)

    def fetch(self) -> None:
        """See :meth:`ImageSpace.fetch`."""
        if self.is_fetched:
            return
        try:
            if place := self._listed.get("hf_hub", "").rpartition("/")[0]:
                hub.look(place, or_downloaded=False)  # says at once, and why, where open_clip would try for a minute
            open_clip.download_pretrained(self._listed)
        except ModelError as error:
            raise ModelError(f"weights '{self.pretrained}' of open_clip model '{self.model}': {error}") from error
        except Exception as error:  # of whichever client the hub's library uses
            first = str(error).strip().split("\n")[0]
            raise ModelError(
                f"the weights '{self.pretrained}' of open_clip model '{self.model}' can't be downloaded ({first}); get "
                "them where there is a connection and take the cache along (HF_HOME), or give their file as pretrained"
            ) from error

    def load(self) -> nn.Module:
        """See :meth:`Network.load`."""
        weights, preparation = self.pretrained, {}
        if not self._folder and (known := self._downloaded):
            # Given the tag, open_clip would ask the hub again, for a minute where there is no network.
            keys = {"image_mean": "mean", "image_std": "std", "image_interpolation": "interpolation"}
            keys["image_resize_mode"] = "resize_mode"
            preparation = {key: self._listed[name] for key, name in keys.items() if name in self._listed}
            weights = known
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="QuickGELU mismatch")
                return _Clip(self.model, weights, **preparation)
        except UserWarning as error:
            raise ModelError(f"open_clip model '{self.model}', pretrained '{self.pretrained}': {error}") from error
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            msg = f"no weights for open_clip model '{self.model}', pretrained '{self.pretrained}' ({error})"
            raise ModelError(f"{msg}; give a known pair, a weights file, or local-dir:FOLDER") from error

    def prepare(self, network: Any, picture: Image.Image) -> Tensor:
        """See :meth:`Network.prepare`."""
        return network.preprocess(picture)

    def forward(self, network: Any, pixels: Tensor) -> Tensor:
        """See :meth:`Network.forward`."""
        return network.network.encode_image(pixels)

    @torch.no_grad()
    def embed_text(self, text: str, device: torch.device) -> tuple[Tensor, bool]:
        """A text in this space.

        Args:
            text: Cut at the tokenizer's length.
            device: Where the vector is, and is computed.

        Returns:
            The vector, (D,), float32, and whether the text was cut.
        """
        network: Any = loaded(self, device)
        tokens = network.tokenizer([text])
        length = tokens.shape[1]
        longer = network.tokenizer([text], context_length=length + 1)[:, :length]
        vector: Tensor = network.network.encode_text(tokens.to(device))[0]
        return vector.float(), not torch.equal(tokens, longer)


def _quick_by_open_clip(folder: Path) -> bool | None:
    """Whether open_clip's settings in a folder say QuickGELU, None where there are none."""
    settings = _json(folder / "open_clip_config.json")
    return None if settings is None else bool(settings.get("model_cfg", {}).get("quick_gelu", False))


def _quick_by_transformers(folder: Path) -> bool | None:
    """Whether transformers' settings of the same weights say QuickGELU, None where they say nothing."""
    towers = [(_json(folder / "config.json") or {}).get(tower) for tower in ("vision_config", "text_config")]
    named = {tower["hidden_act"] for tower in towers if isinstance(tower, dict) and "hidden_act" in tower}
    return "quick_gelu" in named if named else None


def _quick_by_digest(file: Path) -> bool | None:
    """Whether a file of weights that open_clip knows needs QuickGELU, None where it is another one."""
    found = file_digest(file)
    return next((quick for beginning, quick in _known_files() if found.startswith(beginning)), None)


@cache
def _known_files() -> list[tuple[str, bool]]:
    """Beginnings of SHA-256 of files that open_clip lists, as their addresses hold them, and whether QuickGELU."""
    known = []
    for model, tag in open_clip.list_pretrained():
        listed = open_clip.get_pretrained_cfg(model, tag)
        parts = re.findall(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth?$", listed.get("url", ""))
        known += [(long or short, bool(listed.get("quick_gelu", False))) for long, short in parts]
    return known


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is no JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object; get it again")
    return content


def _check_file(kind: str, file: str, sha256: str | None, origin: str) -> None:
    """Raises ModelError where a file of weights is missing or another one."""
    path = Path(file)
    if not file or not path.is_file():
        given = f"'{file}' does not exist" if file else "no file is given"
        raise ModelError(
            f"no weights for {kind}: {given}. Download {origin} once into a folder of weights, and name that folder: "
            "weights=FOLDER"
        )
    if sha256 and not file_digest(path).startswith(sha256.lower()):
        raise ModelError(f"{kind}: {file} has SHA-256 {file_digest(path)}, expected {sha256}; download it again")
    _check_whole(kind, path)


def _check_whole(kind: str, path: Path) -> None:
    """Raises ModelError where a file of weights was cut off, is damaged, or holds something else."""
    about = path.stat()
    if why := _damage(path, about.st_size, about.st_mtime_ns):
        raise ModelError(f"no weights for {kind}: {path} can't be read ({why}); download it again")


@cache
def _damage(path: Path, size: int, time: int) -> str:
    """Why a file of weights that was last written at a time can't be read, empty where it can."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return ""
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            return f"{bad} in it is damaged" if bad else ""
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many libraries, for many kinds of damage
        return str(error).strip().split("\n")[0] or type(error).__name__
    return ""


def _check_clip_folder(folder: Path) -> None:
    """Raises ModelError where a folder of open_clip can't be read; its weights are not loaded."""
    what = f"open_clip model 'local-dir:{folder}'"
    settings = _json(folder / "open_clip_config.json")
    if settings is None:
        raise ModelError(f"{what}: there is no open_clip_config.json in that folder")
    if "model_cfg" not in settings:
        raise ModelError(f"{what}: its open_clip_config.json has no 'model_cfg'; copy the folder again")
    for name in HUB_FILES:
        if (folder / name).is_file():
            _check_whole(what, folder / name)


def _check_loads(space: Network | LPIPS, path: Path) -> None:
    """Raises ModelError where a file of weights is of another network; each file is loaded once for this."""
    about = path.stat()
    _try(space, about.st_size, about.st_mtime_ns)


@cache
@torch.no_grad()
def _try(space: Network | LPIPS, size: int, time: int) -> None:
    network = space.load().eval()
    if isinstance(space, SSCD):  # only its output tells which one it is
        space.forward(network, torch.zeros(1, 3, 64, 64))


@dataclass(frozen=True)
class _Copies:
    network: str
    dimensions: int
    preparation: str
    transforms: Sequence[Any]
    paper: str


_SSCD = {
    "disc_mixup": _Copies(
        "disc_mixup",
        512,
        "resized to 320x320, ImageNet statistics",
        [v2.Resize((320, 320)), v2.Normalize(*_IMAGENET)],
        "as in Hintersdorf et al. 2024",
    ),
    "disc_large_wen": _Copies(
        "disc_large",
        1024,
        "shorter side resized to 256, central 224x224, mean and deviation 0.5",
        [v2.Resize(256), v2.CenterCrop(224), v2.Normalize([0.5] * 3, [0.5] * 3)],
        "as in Wen et al. 2024",
    ),
    "disc_large_membench": _Copies(
        "disc_large",
        1024,
        "resized to 288x288, ImageNet statistics",
        [v2.Resize((288, 288)), v2.Normalize(*_IMAGENET)],
        "as in MemBench, Hong et al. 2024",
    ),
}


@dataclass(frozen=True)
class SSCD(Network):
    """Self-supervised descriptor for copy detection (Pizzi et al. 2022), from a published TorchScript file.

    The published networks, and the ways to prepare pictures for them, give numbers on different scales; a protocol is
    one network with one way, and a file of another network is refused.

    Args:
        file: ``sscd_disc_mixup.torchscript.pt`` (ResNet-50) or ``sscd_disc_large.torchscript.pt`` (ResNeXt-101).
        protocol: ``disc_mixup``: the first, pictures resized to 320x320, ImageNet statistics; ``disc_large_wen``: the
            second, shorter side 256, central 224x224, mean and deviation 0.5; ``disc_large_membench``: the second,
            288x288, ImageNet statistics.
        sha256: Digest that the file must have, or its beginning.
    """

    file: str = ""
    protocol: Literal["disc_mixup", "disc_large_wen", "disc_large_membench"] = "disc_mixup"
    sha256: str | None = None

    @property
    def title(self) -> str:
        """See :attr:`ImageSpace.title`."""
        return f"SSCD {self.protocol.replace('_', ' ')}"

    @property
    def description(self) -> str:
        """See :attr:`ImageSpace.description`."""
        about = _SSCD[self.protocol]
        return f"cosine similarity of SSCD embeddings ({about.network}, {about.preparation}, {about.paper})"

    @property
    def citation(self) -> str:
        """See :attr:`ImageSpace.citation`."""
        return "Pizzi et al. 2022"

    def check_file(self) -> None:
        """Makes sure that the file is there and whole; of which network it is, :meth:`check` tells too.

        Raises:
            ModelError: It is not; the message says how to get it.
        """
        name = f"sscd_{_SSCD[self.protocol].network}.torchscript.pt"
        origin = f"https://dl.fbaipublicfiles.com/sscd-copy-detection/{name}"
        _check_file(f"SSCD {self.protocol}", self.file, self.sha256, origin)

    def check(self) -> None:
        """See :meth:`ImageSpace.check`."""
        self.check_file()
        _check_loads(self, Path(self.file))

    def fingerprint(self) -> Mapping[str, Any]:
        """See :meth:`ImageSpace.content`."""
        return {**super().fingerprint(), "file": file_digest(Path(self.file))}

    def load(self) -> nn.Module:
        """See :meth:`Network.load`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # SSCD is published as TorchScript alone
                return torch.jit.load(self.file, map_location="cpu")
        except (OSError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"{self.file} is no TorchScript file of SSCD ({first}); download it again") from error

    def prepare(self, network: Any, picture: Image.Image) -> Tensor:
        """See :meth:`Network.prepare`."""
        return _transform(_SSCD[self.protocol].transforms, picture)

    def forward(self, network: Any, pixels: Tensor) -> Tensor:
        """See :meth:`Network.forward`.

        Raises:
            ModelError: The file holds the network of another protocol.
        """
        vectors: Tensor = network(pixels)
        expected = _SSCD[self.protocol].dimensions
        if vectors.shape != (len(pixels), expected):
            given = vectors.shape[-1]
            raise ModelError(
                f"SSCD {self.protocol}: {self.file} gives {given} values a picture, expected {expected}; "
                "it is another network"
            )
        return vectors


def _transform(transforms: Sequence[Any], picture: Image.Image) -> Tensor:
    """Resizes the picture itself, then normalizes it as a tensor: the order of all published scripts."""
    *resizing, normalize = transforms
    for step in resizing:
        picture = step(picture)
    pixels: Tensor = normalize(to_tensor([picture])[0])
    return pixels


@dataclass(frozen=True)
class Inception(Network):
    """Inception-v3 as in the original FID (Heusel et al. 2017), its 2048 values after the last pooling.

    Args:
        file: State file of torch-fidelity.
        sha256: Digest that the file must have, or its beginning.
    """

    file: str = ""
    sha256: str | None = None

    @property
    def title(self) -> str:
        """See :attr:`ImageSpace.title`."""
        return "Inception"

    @property
    def description(self) -> str:
        """See :attr:`ImageSpace.description`."""
        return "Inception-v3 (FID weights of 2015-12-05, 2048 values, 299x299 bilinear with antialiasing)"

    @property
    def citation(self) -> str:
        """See :attr:`ImageSpace.citation`."""
        return "Szegedy et al. 2016"

    def check(self) -> None:
        """See :meth:`ImageSpace.check`."""
        if find_spec("torch_fidelity") is None:
            raise ConfigError("Inception needs torch-fidelity: pip install 'nemo-bench[fid]'")
        release = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
        _check_file("Inception", self.file, self.sha256, f"{release}/weights-inception-2015-12-05-6726825d.pth")
        _check_loads(self, Path(self.file))

    def fingerprint(self) -> Mapping[str, Any]:
        """See :meth:`ImageSpace.content`."""
        return {**super().fingerprint(), "file": file_digest(Path(self.file))}

    def load(self) -> nn.Module:
        """See :meth:`Network.load`."""
        try:
            return NoTrainInceptionV3("inception-v3-compat", ["2048"], self.file)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"{self.file} has no weights of Inception ({first}); download it again") from error

    def prepare(self, network: Any, picture: Image.Image) -> Tensor:
        """See :meth:`Network.prepare`; the network resizes by itself."""
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def forward(self, network: Any, pixels: Tensor) -> Tensor:
        """See :meth:`Network.forward`."""
        return network(pixels)


_BACKBONES = {
    "alex": models.AlexNet_Weights.IMAGENET1K_V1,
    "vgg": models.VGG16_Weights.IMAGENET1K_V1,
    "squeeze": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}


@dataclass(frozen=True)
class LPIPS(Pixels):
    """Learned perceptual distance (Zhang et al. 2018) by torchmetrics, at the size of the images.

    The network's weights must be where torchvision keeps what it downloads; nothing is downloaded here.

    Args:
        net: Backbone.
    """

    net: Literal["alex", "vgg", "squeeze"] = "alex"

    @property
    def title(self) -> str:
        """See :attr:`ImageSpace.title`."""
        return f"LPIPS {self.net}"

    @property
    def description(self) -> str:
        """See :attr:`ImageSpace.description`."""
        return f"LPIPS distance ({self.net} backbone)"

    @property
    def citation(self) -> str:
        """See :attr:`ImageSpace.citation`."""
        return "Zhang et al. 2018"

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """See :attr:`ImageSpace.bounds`."""
        return 0.0, None

    @property
    def _file(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(_BACKBONES[self.net].url).name

    def check(self) -> None:
        """See :meth:`ImageSpace.check`."""
        if not self._file.is_file():
            url = _BACKBONES[self.net].url
            raise ModelError(
                f"no weights for LPIPS {self.net}: {self._file} does not exist. Download {url} once and put it there "
                "(TORCH_HOME moves that folder), or leave LPIPS out"
            )
        _check_whole(f"LPIPS {self.net}", self._file)
        _check_loads(self, self._file)

    def fingerprint(self) -> Mapping[str, Any]:
        """See :meth:`ImageSpace.content`."""
        return {**super().fingerprint(), "file": file_digest(self._file)}

    def load(self) -> nn.Module:
        """The network with trained weights, on the CPU.

        Raises:
            ModelError: The weights can't be read.
        """
        try:
            return LearnedPerceptualImagePatchSimilarity(self.net).net
        except (OSError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"{self._file} has no weights of LPIPS {self.net} ({first}); download it again") from error

    @torch.no_grad()
    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSpace.pair`."""
        return loaded(self, a.device)(a, b, normalize=True).reshape(len(a))
