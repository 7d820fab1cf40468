"""Networks of open_clip, which embed pictures and texts; weights with a tag are downloaded by open_clip."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench import hub
from nemo_bench.diffusion import folder_digest
from nemo_bench.errors import ModelError, did_you_mean, first_line
from nemo_bench.metrics.networks import Network, check_readable, loaded
from nemo_bench.records.io import file_digest, parse_json

HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""File names of weights that open_clip reads in a folder, or in a repository of the hub."""
_QUICK = "-quickgelu"
"""Ending of the names of open_clip's architectures that have QuickGELU in place of GELU."""
_ACTIVATIONS = {True: "QuickGELU", False: "GELU"}


@dataclass(frozen=True)
class OpenClip(Network):
    """An open_clip model with its own preprocessing and tokenizer.

    Weights are used with the activation that they were trained with, GELU or QuickGELU: those of OpenAI, MetaCLIP and
    DFN need an architecture whose name ends with ``-quickgelu``. A mismatch is refused. A file of weights does not
    name its activation; it is taken from open_clip's list of weights, if the file is one of them, or else from the
    ``open_clip_config.json`` or ``config.json`` beside it.
    """

    #: Architecture, such as ``ViT-B-32-quickgelu``, or ``local-dir:FOLDER`` with ``open_clip_config.json`` and weights.
    model: str = "ViT-B-32-quickgelu"
    pretrained: str | None = None  #: Weights tag, such as ``openai``, or file; unused for a local folder.

    citation = "Radford et al. 2021"

    @property
    def _folder(self) -> Path | None:
        return Path(self.model.removeprefix("local-dir:")) if self.model.startswith("local-dir:") else None

    @property
    def _file(self) -> Path | None:
        """File of weights, None for a tag or a folder."""
        path = Path(self.pretrained or "")
        return path if path.is_file() and not self._folder else None

    @property
    @override
    def title(self) -> str:
        return "CLIP" if self._folder else f"CLIP {self.model}"

    @property
    @override
    def description(self) -> str:
        weights = f"{self.model}, weights {Path(str(self.pretrained)).name}"
        return f"cosine similarity of open_clip embeddings ({'weights of its folder' if self._folder else weights})"

    @override
    def check(self) -> None:
        import open_clip

        if self._folder:
            _check_folder(self._folder)
        elif self.model not in open_clip.list_models():
            known = did_you_mean(self.model, open_clip.list_models())
            raise ModelError(f"unknown open_clip model '{self.model}' (no weights for it). {known}")
        elif not self.pretrained:
            raise ModelError(f"no weights for open_clip model '{self.model}': set pretrained to a tag or file")
        elif self._file:
            check_readable(f"open_clip model '{self.model}'", self._file)
        elif self.pretrained not in (tags := open_clip.list_pretrained_tags_by_model(self.model)):
            hint = did_you_mean(self.pretrained, tags) if tags else "There are none; give a file."
            if self._twin and self.pretrained in open_clip.list_pretrained_tags_by_model(self._twin):
                hint = f"They belong to '{self._twin}': name that as the model."
            raise ModelError(f"no weights for open_clip model '{self.model}', pretrained '{self.pretrained}'. {hint}")
        self._check_activation()

    def _check_activation(self) -> None:
        """Raises ModelError if the network has another activation than its weights were trained with."""
        import open_clip

        if self._folder:
            architecture = (_read_object(self._folder / "open_clip_config.json") or {}).get("model_cfg", {})
            files = [file for file in self._folder.iterdir() if file.suffix in {".safetensors", ".bin", ".pt", ".pth"}]
            evidence = _evidence(self._folder, files)
            remedy = f"correct quick_gelu in {self._folder / 'open_clip_config.json'}"
        else:
            architecture = open_clip.get_model_config(self.model)
            evidence = _evidence(self._file.parent, [self._file]) if self._file else {_is_quick(self._listed)}
            remedy = f"name '{self._twin}' as the model" if self._twin else "name a local-dir:FOLDER as the model"
        own = _is_quick(architecture)
        if (not own) in evidence:
            raise ModelError(
                f"open_clip model '{self.model}' has {_ACTIVATIONS[own]}, but its weights "
                f"{'' if self._folder else repr(self.pretrained) + ' '}were trained with {_ACTIVATIONS[not own]}; "
                f"{remedy}"
            )
        if not evidence and not own and self._twin:
            raise ModelError(
                f"open_clip model '{self.model}' has GELU, and nothing tells whether its weights '{self.pretrained}' "
                f"were trained with it. If they were trained with QuickGELU, as those of OpenAI were, {remedy}; if "
                "not, put the open_clip_config.json that they were published with beside them, or one that holds "
                '{"model_cfg": {"quick_gelu": false}}'
            )

    @property
    def _twin(self) -> str | None:
        """The architecture that differs in its activation alone, if open_clip has it."""
        import open_clip

        twin = self.model.removesuffix(_QUICK) if self.model.endswith(_QUICK) else self.model + _QUICK
        return twin if twin in open_clip.list_models() else None

    @override
    def fingerprint(self) -> Mapping[str, Any]:
        settings = super().fingerprint()
        if self._folder:
            return {**settings, "model": folder_digest(self._folder)}
        return {**settings, "pretrained": file_digest(self._file)} if self._file else settings

    @property
    def _listed(self) -> dict[str, Any]:
        """open_clip's entry for the weights of this tag."""
        import open_clip

        return dict(open_clip.get_pretrained_cfg(self.model, str(self.pretrained)))

    @property
    def _downloaded(self) -> str | None:
        """File of the weights of this tag, None before it was downloaded."""
        repository, _, file = self._listed.get("hf_hub", "").rpartition("/")
        names = ([file] if file else HUB_FILES) if repository else []
        cached = (try_to_load_from_cache(repository, name) for name in names)
        return next((path for path in cached if isinstance(path, str)), None)

    @property
    @override
    def is_fetched(self) -> bool:
        return bool(self._folder or self._file or self._downloaded)

    @override
    def fetch(self) -> None:
        import open_clip

        if self.is_fetched:
            return
        try:
            if repository := self._listed.get("hf_hub", "").rpartition("/")[0]:
                hub.look(repository, or_downloaded=False)  # fails at once, with the reason; open_clip tries a minute
            open_clip.download_pretrained(self._listed)
        except ModelError as error:
            raise ModelError(f"weights '{self.pretrained}' of open_clip model '{self.model}': {error}") from error
        except Exception as error:  # of whichever client the hub's library uses
            raise ModelError(
                f"the weights '{self.pretrained}' of open_clip model '{self.model}' can't be downloaded "
                f"({first_line(error)}); get them where there is a connection and take the cache along (HF_HOME), or "
                "give their file as pretrained"
            ) from error

    @override
    def load(self) -> nn.Module:
        import open_clip

        weights = self.pretrained
        options = {}
        if not self._folder and self._downloaded:
            # Given the tag, open_clip would ask the hub again, for a minute where there is no network.
            weights = self._downloaded
            names = {"mean", "std", "interpolation", "resize_mode"} & self._listed.keys()
            options = {f"image_{name}": self._listed[name] for name in names}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="QuickGELU mismatch")
                network, network.preprocess = open_clip.create_model_from_pretrained(self.model, weights, **options)
                network.tokenizer = open_clip.get_tokenizer(self.model)
                return network
        except UserWarning as error:
            raise ModelError(f"open_clip model '{self.model}', pretrained '{self.pretrained}': {error}") from error
        except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
            msg = f"no weights for open_clip model '{self.model}', pretrained '{self.pretrained}' ({error})"
            raise ModelError(f"{msg}; give a known pair, a weights file, or local-dir:FOLDER") from error

    @override
    def prepare(self, network: Any, picture: Image.Image) -> Tensor:
        return network.preprocess(picture)

    @override
    def forward(self, network: Any, pixels: Tensor) -> Tensor:
        return network.encode_image(pixels)

    @torch.no_grad()
    def embed_text(self, text: str, device: torch.device) -> tuple[Tensor, bool]:
        """Embeds a text as a vector, (D,), float32; also says whether it was cut at the tokenizer's length."""
        network: Any = loaded(self, device)
        tokens = network.tokenizer([text])
        length = tokens.shape[1]
        longer = network.tokenizer([text], context_length=length + 1)[:, :length]
        vector: Tensor = network.encode_text(tokens.to(device))[0]
        return vector.float(), not torch.equal(tokens, longer)


def _check_folder(folder: Path) -> None:
    """Raises ModelError if a folder of open_clip can't be read; its weights are not loaded."""
    kind = f"open_clip model 'local-dir:{folder}'"
    settings = _read_object(folder / "open_clip_config.json")
    if settings is None:
        raise ModelError(f"{kind}: there is no open_clip_config.json in that folder")
    if "model_cfg" not in settings:
        raise ModelError(f"{kind}: its open_clip_config.json has no 'model_cfg'; copy the folder again")
    for name in HUB_FILES:
        if (folder / name).is_file():
            check_readable(kind, folder / name)


def _is_quick(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("quick_gelu", False))


def _evidence(folder: Path, files: Iterable[Path]) -> set[bool]:
    """Whether weights were trained with QuickGELU: answers of open_clip's list of files and of settings beside them."""
    digests = [file_digest(file) for file in files]
    evidence = {quick for beginning, quick in _listed_digests() if any(d.startswith(beginning) for d in digests)}
    settings = _read_object(folder / "open_clip_config.json")
    if settings is not None:
        evidence.add(_is_quick(settings.get("model_cfg", {})))
    of_transformers = _read_object(folder / "config.json") or {}
    towers = [of_transformers.get(tower) for tower in ("vision_config", "text_config")]
    activations = {tower["hidden_act"] for tower in towers if isinstance(tower, dict) and "hidden_act" in tower}
    if activations:
        evidence.add("quick_gelu" in activations)
    return evidence


@cache
def _listed_digests() -> list[tuple[str, bool]]:
    """Beginnings of SHA-256 in the addresses of open_clip's weights, each with whether they need QuickGELU."""
    import open_clip

    digests = []
    for model, tag in open_clip.list_pretrained():
        listed = open_clip.get_pretrained_cfg(model, tag)
        parts = re.findall(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth?$", listed.get("url", ""))
        digests += [(long or short, _is_quick(listed)) for long, short in parts]
    return digests


def _read_object(file: Path) -> dict[str, Any] | None:
    """A JSON object, None if there is no such file."""
    if not file.is_file():
        return None
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is no JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object; get it again")
    return content
