"""Low-rank changes of a pipeline's weights (LoRA), loaded by diffusers and fused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from nemo_bench import hub
from nemo_bench.diffusion.digests import file_digest
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.records.io import digest

WEIGHTS = "pytorch_lora_weights.safetensors"
"""Name that diffusers saves a LoRA under."""
_SIGNS = {WEIGHTS, "adapter_config.json"}


@dataclass(frozen=True)
class Lora:
    """A LoRA that has not been loaded.

    Attributes:
        path: ``.safetensors`` file, folder with one, hub id such as ``user/name``, or a file in one such as
            ``user/name/style.safetensors``.
        scale: What the change is multiplied by; 1 as it was trained.
        local_files_only: Never ask the hub, take what it gave before.
    """

    path: str
    scale: float = 1.0
    local_files_only: bool = False

    @cached_property
    def _place(self) -> tuple[hub.Repository | None, str]:
        """Repository of the hub, None for what is here, and path of the file."""
        path = Path(self.path)
        if path.is_file():
            return None, str(path)
        if path.is_dir():
            name = self._only([p.name for p in path.iterdir()])
            return None, str(path / name)
        if not (match := re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/(.+))?", self.path)) or path.is_absolute():
            raise ModelError(
                f"model.lora={self.path} is no file, no folder and no hub id; give a .safetensors file, a folder with "
                "one, user/name, or user/name/file.safetensors"
            )
        place, name = match.groups()
        try:
            repository = hub.look(place, local_files_only=self.local_files_only)
        except ModelError as error:
            raise ModelError(f"model.lora={self.path}: {error}") from error
        if name and name not in repository.files:
            raise ModelError(f"model.lora={self.path}: '{place}' has no file {name}. {_listed(repository.files)}")
        return repository, name or self._only(repository.files)

    def _only(self, names: Iterable[str]) -> str:
        """The file of weights among some names."""
        files = sorted(name for name in names if name.endswith(".safetensors"))
        if WEIGHTS in files:
            return WEIGHTS
        if len(files) != 1:
            raise ModelError(f"model.lora={self.path}: name one file of weights in it. {_listed(names)}")
        return files[0]

    def check(self) -> None:
        """Makes sure that it can be loaded, as far as that shows before anything is.

        Raises:
            NemoBenchError: The file is missing or holds no LoRA, or a library is missing.
        """
        if find_spec("peft") is None:
            raise ConfigError("model.lora needs peft, with which diffusers loads it: pip install 'nemo-bench[lora]'")
        repository, name = self._place
        if not name.endswith(".safetensors"):
            raise ModelError(f"model.lora={self.path}: expected a .safetensors file; convert it first")
        if repository is None and not holds_lora(Path(name)):
            raise ModelError(f"model.lora={self.path} holds no LoRA; the model itself is model.source")

    @property
    def is_downloaded(self) -> bool:
        """Whether nothing is left to be downloaded."""
        repository, name = self._place
        return repository is None or repository.has_downloaded(name)

    def digest(self) -> str:
        """Digest of weights and scale, 16 hexadecimal digits; of a file its contents, of the hub id and commit.

        Raises:
            ModelError: It can't be found.
        """
        repository, name = self._place
        content = file_digest(Path(name)) if repository is None else [repository.place, name, repository.commit]
        return digest([content, self.scale])

    def fuse(self, pipeline: Any) -> None:
        """Adds it to the weights of a pipeline.

        Args:
            pipeline: A diffusers pipeline, changed in place.

        Raises:
            ModelError: It can't be read, or fits no layer of the pipeline.
        """
        repository, name = self._place
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
    """Whether the names of the weights in a ``.safetensors`` file are those of a LoRA."""
    try:
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            return any("lora" in name.lower() for name in names)
    except (OSError, SafetensorError):
        return False


def looks_like_lora(names: Iterable[str]) -> bool:
    """Whether files of these names make up a LoRA; only the names are looked at."""
    tops = {name for name in names if len(PurePosixPath(name).parts) == 1}
    return bool(tops & _SIGNS) or any("lora" in n.lower() and n.endswith(".safetensors") for n in tops)


def _listed(names: Iterable[str]) -> str:
    files = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".ckpt")))
    return f"Files of weights in it: {', '.join(files[:20]) or 'none'}"
