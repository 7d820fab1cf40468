"""Settings: YAML files composed by Hydra into typed dataclasses, and checked before anything is loaded.

No other package imports hydra.
"""

from nemo_bench.config.composition import (
    DEFAULT_METHODS,
    SCORING,
    CellConfig,
    detector_grid,
    grid,
    logger_settings,
    name_of_files,
    one,
    rescore,
)
from nemo_bench.config.families import FamilySettings
from nemo_bench.config.groups import GROUPS, named_classes, options
from nemo_bench.config.listing import about_method, describe_options, explain_option, overview, short
from nemo_bench.config.overrides import quoted, shell_word
from nemo_bench.config.schema import (
    LoggerSettings,
    ModelSettings,
    PromptSettings,
    RunSettings,
    SimilaritySettings,
    TrainerSettings,
    overridden,
    rows_at_once,
)
from nemo_bench.config.targets import build, check_stored, resolve

__all__ = [
    "DEFAULT_METHODS",
    "GROUPS",
    "SCORING",
    "CellConfig",
    "FamilySettings",
    "LoggerSettings",
    "ModelSettings",
    "PromptSettings",
    "RunSettings",
    "SimilaritySettings",
    "TrainerSettings",
    "about_method",
    "build",
    "check_stored",
    "describe_options",
    "detector_grid",
    "explain_option",
    "grid",
    "logger_settings",
    "name_of_files",
    "named_classes",
    "one",
    "options",
    "overridden",
    "overview",
    "quoted",
    "rescore",
    "resolve",
    "rows_at_once",
    "shell_word",
    "short",
]
