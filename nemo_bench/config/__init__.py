"""Settings: YAML files composed by Hydra into typed dataclasses, and checked before anything is loaded.

No other package imports hydra.
"""

from nemo_bench.config.composition import (
    DEFAULT_METHODS,
    SCORING,
    CellConfig,
    detector_grid,
    grid,
    localizer_grid,
    logger_settings,
    region_grid,
    similarity_settings,
)
from nemo_bench.config.groups import GROUPS, options
from nemo_bench.config.listing import describe_options
from nemo_bench.config.schema import (
    LauncherSettings,
    LoggerSettings,
    ModelSettings,
    PromptSettings,
    PublishedSettings,
    RunSettings,
    SimilaritySettings,
    TrainerSettings,
    overridden,
)
from nemo_bench.config.targets import build, resolve

__all__ = [
    "DEFAULT_METHODS",
    "GROUPS",
    "SCORING",
    "CellConfig",
    "LauncherSettings",
    "LoggerSettings",
    "ModelSettings",
    "PromptSettings",
    "PublishedSettings",
    "RunSettings",
    "SimilaritySettings",
    "TrainerSettings",
    "build",
    "describe_options",
    "detector_grid",
    "grid",
    "localizer_grid",
    "logger_settings",
    "options",
    "overridden",
    "region_grid",
    "resolve",
    "similarity_settings",
]
