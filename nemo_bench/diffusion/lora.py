"""Low-rank adaptations of a pipeline's weights (LoRA, Hu et al. 2021), loaded by diffusers and fused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.records.io import digest, file_digest

if TYPE_CHECKING:
    from nemo_bench.hub import Repository

WEIGHTS = "pytorch_lora_weights.safetensors"
"""Default file name of diffusers."""


@dataclass(frozen=True)
class Lora:
    """A LoRA that is not loaded yet."""

    #: ``.safetensors`` file, folder with one, hub id such as ``user/name``, or a file in a repository such as
    #: ``user/name/style.safetensors``.
    path: str
    scale: float = 1.0  #: Factor on the change of the weights; 1 as trained.
    local_files_only: bool = False  #: Use downloaded files only.

    @cached_property
    def _location(self) -> tuple[Repository | None, str]:
        """Repository, None for local files, and path of the file of weights."""
        path = Path(self.path)
        if path.is_file():
            return None, str(path)
        if path.is_dir():
            return None, str(path / self._weights_among([file.name for file in path.iterdir()]))
        if not (match := re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/(.+))?", self.path)) or path.is_absolute():
            raise ModelError(
                f"model.lora={self.path} is no file, no folder and no hub id; give a .safetensors file, a folder with "
                "one, user/name, or user/name/file.safetensors"
            )
        from nemo_bench import hub

        place, name = match.groups()
        try:
            repository = hub.look(place, local_files_only=self.local_files_only)
        except ModelError as error:
            raise ModelError(f"model.lora={self.path}: {error}") from error
        if name and name not in repository.files:
            raise ModelError(f"model.lora={self.path}: '{place}' has no file {name}. {_listed(repository.files)}")
        return repository, name or self._weights_among(repository.files)

    def _weights_among(self, names: Iterable[str]) -> str:
        files = sorted(name for name in names if name.endswith(".safetensors"))
        if WEIGHTS in files:
            return WEIGHTS
        if len(files) != 1:
            raise ModelError(f"model.lora={self.path}: name one file of weights in it. {_listed(names)}")
        return files[0]

    def check(self) -> None:
        """Raises NemoBenchError if the file is missing or holds no LoRA, or a library is missing."""
        if find_spec("peft") is None:
            raise ConfigError("model.lora needs peft, with which diffusers loads it: pip install 'nemo-bench[lora]'")
        repository, name = self._location
        if not name.endswith(".safetensors"):
            raise ModelError(f"model.lora={self.path}: expected a .safetensors file; convert it first")
        if repository is None and not holds_lora(Path(name)):
            raise ModelError(f"model.lora={self.path} holds no LoRA; the model itself is model.source")

    @property
    def is_downloaded(self) -> bool:
        """Whether the file is on this machine."""
        repository, name = self._location
        return repository is None or repository.has_downloaded(name)

    def digest(self) -> str:
        """Digest of weights and scale, 16 hexadecimal digits: of a file by contents, of a hub id by commit."""
        repository, name = self._location
        content = file_digest(Path(name)) if repository is None else [repository.place, name, repository.commit]
        return digest([content, self.scale])

    def fuse(self, pipeline: Any) -> None:
        """Adds the LoRA to the weights of a pipeline; raises ModelError if it can't be read or matches no layer."""
        repository, name = self._location
        file = Path(name) if repository is None else repository.get(name)
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
            if not pipeline.get_list_adapters():
                raise ValueError("none of its layers is one of the model's")
            pipeline.fuse_lora(lora_scale=self.scale)
            pipeline.unload_lora_weights()
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            lines = str(error).strip().splitlines()
            raise ModelError(
                f"model.lora={self.path} does not fit the model ({' '.join(lines[:2])}); give the model that it was "
                "trained on as model.source"
            ) from error


def holds_lora(file: Path) -> bool:
    """Whether the weights in a ``.safetensors`` file are named as those of a LoRA."""
    try:
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            return any("lora" in name.lower() for name in names)
    except (OSError, SafetensorError):
        return False


def looks_like_lora(files: Iterable[str]) -> bool:
    """Whether the file names of a folder or repository are those of a LoRA."""
    tops = {name for name in files if len(PurePosixPath(name).parts) == 1}
    has_lora_file = any("lora" in name.lower() and name.endswith(".safetensors") for name in tops)
    return has_lora_file or "adapter_config.json" in tops


def _listed(names: Iterable[str]) -> str:
    files = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".ckpt")))
    return f"Files of weights in it: {', '.join(files[:20]) or 'none'}"
