"""Settings: YAML composed by Hydra, turned at once into typed, checked dataclasses.

Everything that can be wrong with settings is found here, before anything is loaded. Nothing else imports hydra.
"""

from nemo_bench.config.composition import (
    DEFAULT_METHODS,
    DETECTING,
    OWN_METRICS,
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
from nemo_bench.config.text import quoted, shell_word

__all__ = [
    "DEFAULT_METHODS",
    "DETECTING",
    "GROUPS",
    "OWN_METRICS",
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
