"""Settings as typed dataclasses, their ranges and choices in the annotations."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from pydantic import Field
from pydantic.fields import FieldInfo

from nemo_bench.config.targets import check_value, is_text
from nemo_bench.errors import ConfigError, did_you_mean, shortened

MOST = 2**31 - 1
"""Largest setting: libraries take numbers of steps, seeds and processes as 32 bits."""
Settings = TypeVar("Settings")


def at_least(least: float) -> FieldInfo:
    """The range from a number to :data:`MOST`."""
    return Field(ge=least, le=MOST)


@dataclass
class SimilaritySettings:
    """Window and scales, see :class:`nemo_bench.diffusion.Similarity`; the measure is a setting of the method."""

    sigma: Annotated[float, at_least(0.15)] = 1.5
    betas: list[float] = field(default_factory=lambda: [0.33, 0.33, 0.33])


@dataclass
class PublishedSettings:
    """What is known of the weights of a model before they are there; for dry runs, no part of a cell."""

    licence: str = ""  #: Licence of the weights.
    gated: bool = False  #: Whether the hub gives the files to those alone who accept its conditions and log in.
    weights: Annotated[float, at_least(0)] | None = None  #: Weights of all networks, in billions.
    download: Annotated[float, at_least(0)] | None = None  #: Files that are loaded, in gigabytes.
    #: Floating point operations of a pass of one sample by the network that denoises, in teraflops: at the model's own
    #: size and number of tokens, a multiplication and an addition counted as two.
    teraflops: Annotated[float, at_least(0)] | None = None


@dataclass
class ModelSettings:
    """A model and how it is used."""

    #: Pipeline folder, hub id or ``.safetensors`` file; ``package:`` stands for the folder of this package.
    source: str = MISSING
    revision: str | None = None  #: Commit, tag or branch of a hub id.
    #: Folder or hub id of a pipeline of the same form; for a ``source`` that is a file of weights.
    config: str | None = None
    local_files_only: bool = False  #: Never ask the hub.
    #: Form of the weights, such as ``fp16`` for ``*.fp16.safetensors``; null for the available one.
    variant: str | None = None
    unet: str | None = None  #: Folder of a UNet in place of the one of ``source``, such as a fine-tuned one.
    lora: str | None = None  #: LoRA added to the weights: ``.safetensors`` file, folder, hub id or ``user/name/FILE``.
    lora_scale: float = 1.0  #: Factor of the LoRA, 1 as trained.
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  #: float32, float16 or bfloat16.
    compiled: bool = False  #: Compile the UNet with torch.compile; changes results by rounding only.
    #: Value layers that can be blocked: ``down+mid`` of a UNet, ``double`` of FLUX, or ``all``.
    layers: Literal["down+mid", "double", "all"] = "down+mid"
    steps: Annotated[int, at_least(1)] = 50  #: DDIM steps.
    guidance: Annotated[float, at_least(0)] = 7.0  #: Scale of classifier-free guidance, 1 for none.
    #: Scale that a network distilled from guidance is told, as FLUX.1-dev; null for the family's own.
    distilled_guidance: Annotated[float, at_least(0)] | None = None
    tokens: Annotated[int, at_least(2)] | None = None  #: Text positions of T5 or Gemma; null for the family's own.
    size: Annotated[int, at_least(16)] | None = None  #: Side of FLUX's images in pixels; null for 1024.
    similarity: SimilaritySettings = field(default_factory=SimilaritySettings)  #: How noise differences are compared.
    #: Models that share published settings of methods and detectors, such as ``sd1``, ``sd2`` and ``sdxl``; None for
    #: other models.
    family: str | None = None
    statistics: str | None = None  #: File of published activation statistics, used in place of measured ones.
    #: Folder of a training by ``nemo-bench train``, whose model takes the place of ``source`` and is named after it.
    training: str | None = None
    truth: str | None = None  #: File of the neurons that memorize, of a model that was trained so that they are known.
    #: open_clip model for alignment and diversity; weights of OpenAI need one of ``-quickgelu``.
    clip: str = "ViT-B-32-quickgelu"
    clip_pretrained: str | None = "openai"  #: Weights of the open_clip model: tag or file.
    #: Licence, size and cost of ``source``; of another one that is given in its place nothing is known.
    published: PublishedSettings = field(default_factory=PublishedSettings)
    summary: str = ""  #: One line for ``nemo-bench ls``.
    citation: str = ""


@dataclass
class PromptSettings:
    """Prompts to benchmark."""

    files: list[str] = MISSING  #: Prompt files, csv, jsonl, txt or parquet.
    #: Files whose prompts are memorized where no kind is annotated; a part of ``files``.
    memorized: list[str] = field(default_factory=list)
    #: Folder of reference images that a file names by relative paths, or that ``nemo-bench references`` fetched; by
    #: default each file's own folder.
    references: str | None = None
    #: Folder of masks, ``<prompt id>.png``, white where the images of a prompt are memorized.
    masks: str | None = None
    calibration: str | None = None  #: General prompts for statistics and threshold.
    #: File of prompts whose reference images the model was not trained on, for audits and ``loss_draws``.
    controls: str | None = None
    #: Prompt files whose neurons methods such as ``shared`` switch off for all prompts; none for the memorized prompts
    #: of ``files``.
    shared_from: list[str] = field(default_factory=list)
    #: At most this many prompts per file, and per file of ``shared_from``.
    limit: Annotated[int, at_least(1)] | None = None
    calibration_limit: Annotated[int, at_least(2)] | None = None  #: At most this many general prompts.
    obtain: str = ""  #: Where to get the files.
    summary: str = ""  #: One line for ``nemo-bench ls``.
    citation: str = ""


@dataclass
class TrainerSettings:
    """Lightning's trainer."""

    accelerator: str = "auto"  #: ``auto``, ``cpu``, ``gpu`` and so on.
    #: Processes per node; null for the number that torchrun started, or one.
    devices: Annotated[int, at_least(1)] | None = None
    num_nodes: Annotated[int, at_least(1)] = 1
    strategy: str = "auto"  #: ``auto``, ``ddp`` and so on.


@dataclass
class LoggerSettings:
    """Experiment tracking."""

    wandb: bool = False  #: Whether cells become Weights & Biases runs.
    csv: bool = False  #: Whether Lightning's CSV logger logs every cell.
    tensorboard: bool = False  #: Whether Lightning's TensorBoard logger logs every cell.
    project: str = "nemo-bench"  #: W&B project.
    entity: str | None = None  #: W&B user or team.
    #: ``online``, ``offline``, or None for wandb's own settings, or else online only with a key.
    mode: Literal["online", "offline"] | None = None
    timeout: Annotated[float, at_least(1)] = 120  #: Most seconds for W&B to begin a run, and to end it.
    thumbnails: Annotated[int, at_least(0)] = 64  #: Number of prompts shown with images.


@dataclass
class LauncherSettings:
    """Where ``nemo-bench run`` works: in this process, or by workers of Slurm or Ray that share the results folder."""

    kind: Literal["local", "slurm", "ray"] = "local"  #: This process, a job array of Slurm, or tasks of Ray.
    workers: Annotated[int, at_least(1)] = 1  #: Processes that take one cell after another; each starts its own ranks.
    #: GPUs of a worker; null for one a rank where ``trainer=gpu``, and with Ray wherever its nodes have any.
    gpus: Annotated[int, at_least(0)] | None = None
    cpus: Annotated[int, at_least(1)] = 1  #: CPUs of a worker, shared by its ranks.
    memory: Annotated[float, Field(gt=0, le=MOST)] | None = None  #: Gigabytes of a worker.
    #: Times that a worker begins again whose node died, was taken back, or whose time was over.
    restarts: Annotated[int, at_least(0)] = 10
    time: str | None = None  #: Slurm: time limit of a worker, such as ``12:00:00``, after which it begins again.
    notice: Annotated[int, Field(ge=1, le=65535)] = 60  #: Slurm: seconds before that limit at which a worker stops.
    partition: str | None = None  #: Slurm: partition; for several a quoted list, ``'a,b'``.
    account: str | None = None  #: Slurm: account that is charged.
    options: list[str] = field(
        default_factory=list
    )  #: Slurm: further options of sbatch, such as ``--constraint=a100``.
    address: str | None = (
        None  #: Ray: address of a cluster, such as ``auto`` or ``ray://head:10001``; null for this machine.
    )


@dataclass
class RunSettings:
    """One cell: a model, a method and prompts, and how they are run."""

    name: str = "default"  #: Folder of the run under ``root``.
    root: str = "results"  #: Folder of all results.
    model: ModelSettings = field(default_factory=ModelSettings)
    method: Any = MISSING  #: ``_target_`` and arguments of the mitigation.
    detector: Any = None  #: ``_target_`` and arguments of the detector, for ``nemo-bench detect`` alone.
    localizer: Any = None  #: ``_target_`` and arguments of the localizer, for ``nemo-bench localize`` alone.
    region: Any = None  #: ``_target_`` and arguments of the localizer of regions, for ``nemo-bench regions`` alone.
    prompts: PromptSettings = field(default_factory=PromptSettings)
    metrics: dict[str, Any] = field(default_factory=dict)  #: ``_target_`` and arguments of each metric by name.
    weights: str = "weights"  #: Folder of the weights that metrics need, each file under its published name.
    real_images: str | None = None  #: Folder of real images for FID and other distances between sets of images.
    seeds: Annotated[int, at_least(1)] = 4  #: Images per prompt.
    localize_seeds: Annotated[int, at_least(2)] = 10  #: Seeds per prompt for noise differences.
    #: Draws of noise and timestep per prompt, over which the training loss of its pictures is measured; 0 for no loss.
    loss_draws: Annotated[int, at_least(0)] = 0
    #: Images in a batch, or ``auto`` for the number that fits on the GPU (32 on a CPU); changes results by rounding
    #: only.
    batch_size: Annotated[int, at_least(1)] | Literal["auto"] = 32
    workers: Annotated[int, at_least(0)] = 0  #: Processes that read images ahead of scoring.
    #: Run each method at every strength that its file has, from mild to strong, and choose one on prompts that are not
    #: reported.
    strengths: bool = False
    summary: str = ""  #: One line about an experiment for ``nemo-bench ls``; only in the file of an experiment.
    #: Cells of an experiment as lines of overrides; only in the file of an experiment.
    grid: list[str] = field(default_factory=list)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    launcher: LauncherSettings = field(default_factory=LauncherSettings)


ROWS = 32
"""Images in a batch where the fitting number is not known yet."""


def rows_at_once(settings: RunSettings) -> int:
    """Images in a batch, before the fitting number is known; see :meth:`nemo_bench.benchmark.runner.Runner.rows`."""
    return settings.batch_size if isinstance(settings.batch_size, int) else ROWS


def typed(content: Mapping[str, Any], schema: type[Settings], prefix: str = "") -> Settings:
    """Checks plain data against the annotations of a dataclass and of those nested in it, whose keys have a prefix.

    An unknown key, or a value that is missing, of the wrong type or out of range, is a ConfigError.
    """
    hints = _hints(schema)
    values = dict(content)
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise unknown_key(key, key.count("."), hints)
        if is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}={value}: expected settings by name")
            values[name] = typed(value, hints[name], f"{key}.")
        elif value != MISSING:
            values[name] = check_value(key, value, hints[name])
    settings = schema(**values)
    for name in hints:
        if getattr(settings, name) == MISSING:
            raise ConfigError(f"{prefix}{name} has no default; give {prefix}{name}=VALUE")
    return settings


def type_of(key: str, schema: Any = RunSettings) -> Any:
    """The type of a setting, Any where there is no such setting."""
    hint = schema
    for part in key.split("."):
        hint = _plain_hints(hint).get(part, Any) if is_dataclass(hint) else Any
    return hint


_plain_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)
_hints: Callable[[Any], dict[str, Any]] = cache(partial(get_type_hints, include_extras=True))


def is_within(key: str, keys: Iterable[str]) -> bool:
    """Whether a key is one of some keys, or inside one of them."""
    return any(f"{key}.".startswith(f"{other}.") for other in keys)


def words_within(words: Iterable[str], keys: Collection[str]) -> list[str]:
    """Those ``key=value`` words whose key is one of some keys, or inside one of them."""
    return [word for word in words if is_within(word.lstrip("~+").partition("=")[0], keys)]


def unknown_key(key: str, depth: int, known: Iterable[Any]) -> ConfigError:
    """The error about a key whose part at an index is none of the known names."""
    parts = key.split(".")
    missing = f": there is no '{parts[depth]}' in '{'.'.join(parts[:depth])}'" if depth else ""
    return ConfigError(f"unknown key '{key}'{missing}. {did_you_mean(parts[depth], map(str, known))}")


def check_values(settings: RunSettings) -> None:
    """Checks values against one another."""
    name = settings.name
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) or not name.strip("."):
        msg = f"name={shortened(name, 40)}: expected letters, digits, '.', '_' and '-' only, at most 200"
        raise ConfigError(f"{msg}; it names a folder")
    if unlisted := [file for file in settings.prompts.memorized if file not in settings.prompts.files]:
        raise ConfigError(f"prompts.memorized: {unlisted[0]} is none of prompts.files={settings.prompts.files}")


def targets_of(settings: RunSettings) -> dict[str, Any]:
    """The nodes that describe method, detector, localizers and metrics, by key."""
    optional = {key: getattr(settings, key) for key in ("detector", "localizer", "region")}
    nodes = {"method": settings.method, **{key: node for key, node in optional.items() if node is not None}}
    return nodes | {f"metrics.{name}": node for name, node in settings.metrics.items()}


def overridden(overrides: Sequence[str], schema: type[Settings]) -> Settings:
    """A dataclass, with a default for every field, and some of them overridden by ``key=value`` words.

    Raises:
        ConfigError: A key is unknown, or a value of the wrong type or out of range.
    """
    hints = get_type_hints(schema)
    values: dict[str, Any] = {}
    for word in overrides:
        key, separator, text = word.partition("=")
        if not separator or key not in hints:
            raise ConfigError(f"unknown setting '{word}'; write key=value. {did_you_mean(key, hints)}")
        if hints[key] is Path:
            values[key] = Path(text)
        elif is_text(hints[key]) and not (text == "null" and NoneType in get_args(hints[key])):
            values[key] = text
        else:
            try:
                (values[key],) = OmegaConf.to_container(OmegaConf.from_dotlist([word])).values()  # type: ignore[union-attr]
            except yaml.YAMLError as error:
                raise ConfigError(f"can't read {word}: {' '.join(str(error).split())}") from error
    return typed(values, schema)
