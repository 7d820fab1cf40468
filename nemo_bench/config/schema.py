"""Settings as typed dataclasses, and what their values may be."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bench.config.targets import build, first_line
from nemo_bench.errors import ConfigError, did_you_mean, shortened


@dataclass
class SimilaritySettings:
    """Window and scales, see :class:`nemo_bench.diffusion.Similarity`; the measure is a setting of the method."""

    sigma: float = 1.5
    betas: list[float] = field(default_factory=lambda: [0.33, 0.33, 0.33])


@dataclass
class ModelSettings:
    """A model and how it is used.

    Attributes:
        source: Pipeline folder, hub id or ``.safetensors`` file; ``package:`` stands for the folder of this package.
        revision: Commit, tag or branch of a hub id.
        config: For a file, folder or hub id of a pipeline like it; a file holds weights alone.
        local_files_only: Never ask the hub.
        variant: Form of the weights, such as ``fp16`` for ``*.fp16.safetensors``; null takes what is there.
        lora: LoRA that is added to the weights: ``.safetensors`` file, folder, hub id or ``user/name/FILE``.
        lora_scale: What it is multiplied by, 1 as it was trained.
        dtype: float32, float16 or bfloat16.
        compiled: Compile the UNet with torch.compile; changes results by rounding only.
        layers: Value layers that can be blocked, ``down+mid`` or ``all``.
        steps: DDIM steps.
        guidance: Scale of classifier-free guidance, 1 for none.
        similarity: How noise differences are compared.
        family: Models that share published settings of methods and detectors, such as ``sd1``, ``sd2`` and ``sdxl``;
            None where it is none of those.
        statistics: File of published activation statistics, in place of measured ones.
        clip: open_clip model that judges alignment and diversity; weights of OpenAI need one of ``-quickgelu``.
        clip_pretrained: Its weights: tag or file.
        summary: One line for ``nemo-bench ls``.
        citation: Source.
    """

    source: str = MISSING
    revision: Optional[str] = None  # noqa: UP045 - OmegaConf reads the old form only
    config: Optional[str] = None  # noqa: UP045
    local_files_only: bool = False
    variant: Optional[str] = None  # noqa: UP045
    lora: Optional[str] = None  # noqa: UP045
    lora_scale: float = 1.0
    dtype: str = "float32"
    compiled: bool = False
    layers: str = "down+mid"
    steps: int = 50
    guidance: float = 7.0
    similarity: SimilaritySettings = field(default_factory=SimilaritySettings)
    family: Optional[str] = None  # noqa: UP045
    statistics: Optional[str] = None  # noqa: UP045
    clip: str = "ViT-B-32-quickgelu"
    clip_pretrained: Optional[str] = "openai"  # noqa: UP045
    summary: str = ""
    citation: str = ""


@dataclass
class PromptSettings:
    """Which prompts are benchmarked.

    Attributes:
        files: Prompt files, csv, jsonl, txt or parquet.
        memorized: Those of the files whose prompts are memorized where no kind is annotated.
        references: Folder of reference images: of those that a file names by relative paths, and of those that
            ``nemo-bench references`` fetched; by default each file's own folder.
        calibration: General prompts for statistics and threshold.
        controls: Prompts with reference images that the model has not been trained on, for audits.
        shared_from: Prompt files whose neurons methods such as ``shared`` switch off for all prompts; none for the
            memorized prompts of ``files``.
        obtain: Where to get the files, for who does not have them.
        limit: Take so many prompts of each file, and of each in ``shared_from``.
        calibration_limit: Take so many general prompts.
        summary: One line for ``nemo-bench ls``.
        citation: Source.
    """

    files: list[str] = MISSING
    memorized: list[str] = field(default_factory=list)
    references: Optional[str] = None  # noqa: UP045
    calibration: Optional[str] = None  # noqa: UP045
    controls: Optional[str] = None  # noqa: UP045
    shared_from: list[str] = field(default_factory=list)
    limit: Optional[int] = None  # noqa: UP045
    calibration_limit: Optional[int] = None  # noqa: UP045
    obtain: str = ""
    summary: str = ""
    citation: str = ""


@dataclass
class TrainerSettings:
    """Lightning's trainer.

    Attributes:
        accelerator: ``auto``, ``cpu``, ``gpu`` and so on.
        devices: Processes a node; null for as many as torchrun started, or else one.
        num_nodes: Nodes.
        strategy: ``auto``, ``ddp`` and so on.
    """

    accelerator: str = "auto"
    devices: Optional[int] = None  # noqa: UP045
    num_nodes: int = 1
    strategy: str = "auto"


@dataclass
class LoggerSettings:
    """Experiment tracking.

    Attributes:
        wandb: Whether cells become Weights & Biases runs.
        csv: Whether Lightning's CSV logger is told of every cell.
        tensorboard: Whether Lightning's TensorBoard logger is told of every cell.
        project: W&B project.
        entity: W&B user or team.
        mode: ``online``, ``offline``, or None: what wandb's settings say, else online only where it finds a key.
        timeout: Seconds that W&B may take to begin a run, and again to end it.
        thumbnails: Prompts shown with pictures.
    """

    wandb: bool = False
    csv: bool = False
    tensorboard: bool = False
    project: str = "nemo-bench"
    entity: Optional[str] = None  # noqa: UP045
    mode: Optional[str] = None  # noqa: UP045
    timeout: float = 120
    thumbnails: int = 64


@dataclass
class RunSettings:
    """One cell: a model, a method and prompts, and how they are run.

    Attributes:
        name: Folder of the run under ``root``.
        root: Folder of all results.
        model: The model.
        method: ``_target_`` and arguments of the mitigation.
        detector: ``_target_`` and arguments of the detector, for ``nemo-bench detect`` alone.
        prompts: The prompts.
        metrics: ``_target_`` and arguments of each metric by name.
        weights: Folder of the weights that metrics need, each file under the name it is published by.
        real_images: Folder of real pictures that whole sets of images are compared with.
        seeds: Images a prompt.
        localize_seeds: Seeds a prompt for noise differences, at least 2.
        batch_size: Images in a batch, or ``auto`` for as many as fit on the GPU (32 on a CPU); changes results by
            rounding only.
        workers: Processes that read images ahead while others are scored.
        summary: What an experiment shows, for its file alone: one line for ``nemo-bench ls``.
        grid: What an experiment consists of, for its file alone: lines of overrides, each read as on the command line.
        trainer: Lightning's trainer.
        logger: Experiment tracking.
    """

    name: str = "default"
    root: str = "results"
    model: ModelSettings = field(default_factory=ModelSettings)
    method: Any = MISSING
    detector: Any = None
    prompts: PromptSettings = field(default_factory=PromptSettings)
    metrics: dict[str, Any] = field(default_factory=dict)
    weights: str = "weights"
    real_images: Optional[str] = None  # noqa: UP045
    seeds: int = 4
    localize_seeds: int = 10
    batch_size: Union[int, str] = 32  # noqa: UP007
    workers: int = 0
    summary: str = ""
    grid: list[str] = field(default_factory=list)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)


ROWS = 32
"""Images in a batch where nothing is known of what fits."""


def rows_at_once(settings: RunSettings) -> int:
    """Images in a batch, before it is known what fits; see :meth:`nemo_bench.benchmark.runner.Runner.rows`."""
    return settings.batch_size if isinstance(settings.batch_size, int) else ROWS


ConfigStore.instance().store(name="run_schema", node=RunSettings)
_CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "float16", "bfloat16"),
    "model.layers": ("down+mid", "all"),
    "logger.mode": ("online", "offline"),
}
_LEAST: dict[str, float] = {
    "model.steps": 1,
    "model.guidance": 0,
    "model.similarity.sigma": 0.15,
    "prompts.limit": 1,
    "prompts.calibration_limit": 2,
    "seeds": 1,
    "localize_seeds": 2,
    "workers": 0,
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "logger.timeout": 1,
    "logger.thumbnails": 0,
}
MOST = 2**31 - 1
"""Largest number that a setting may be: what counts steps, seeds or processes is handed to libraries as 32 bits."""
LONGEST_NAME = 200


def check_values(settings: RunSettings) -> None:
    """Checks values against one another and their ranges, and that what they describe can be made.

    Raises:
        ConfigError: Something is wrong.
    """

    def value_of(key: str) -> Any:
        value: Any = settings
        for part in key.split("."):
            value = getattr(value, part)
        return value

    for key, choices in _CHOICES.items():
        value = value_of(key)
        if value is not None and value not in choices:
            raise ConfigError(f"{key}={value}: unknown value. {did_you_mean(str(value), choices)}")
    for key, least in _LEAST.items():
        value = value_of(key)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{key}={shortened(str(value), 40)}: expected at least {least:g}")
        if value is not None and value > MOST:
            raise ConfigError(f"{key}: expected at most {MOST:,}, given {shortened(str(value), 40)}")
    size = settings.batch_size
    if size != "auto" and not (isinstance(size, int) and 1 <= size <= MOST):
        given = shortened(str(size), 40)
        raise ConfigError(f"batch_size={given}: expected a whole number from 1 to {MOST:,}, or auto")
    if len(settings.name) > LONGEST_NAME:
        raise ConfigError(f"name: {len(settings.name):,} characters; it names a folder, so at most {LONGEST_NAME}")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", settings.name) or not settings.name.strip("."):
        raise ConfigError(f"name={settings.name}: expected letters, digits, '.', '_' and '-' only; it names a folder")
    if unlisted := [file for file in settings.prompts.memorized if file not in settings.prompts.files]:
        raise ConfigError(f"prompts.memorized: {unlisted[0]} is none of prompts.files={settings.prompts.files}")
    build(settings.method, "method")
    if settings.detector is not None:
        build(settings.detector, "detector")
    for name, node in settings.metrics.items():
        build(node, f"metrics.{name}")


def overridden(overrides: Sequence[str], schema: type[Any]) -> Any:
    """A dataclass with some fields overridden.

    Args:
        overrides: ``key=value`` words.
        schema: The dataclass.

    Returns:
        An instance.

    Raises:
        ConfigError: A key is unknown or a value of the wrong type.
    """
    known = list(schema.__dataclass_fields__)
    for word in overrides:
        key, separator, _ = word.partition("=")
        if not separator or key not in known:
            raise ConfigError(f"unknown setting '{word}'; write key=value. {did_you_mean(key, known)}")
    hints = get_type_hints(schema)
    values: dict[str, Any] = {}
    for word in overrides:
        key, _, value = word.partition("=")
        values[key] = value if hints[key] in (str, Path) else OmegaConf.from_dotlist([word])[key]
    try:
        found = OmegaConf.structured(schema)
        for key, value in values.items():
            found[key] = value
        return OmegaConf.to_object(found)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
