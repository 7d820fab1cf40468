"""Settings: YAML composed by Hydra, turned at once into typed, checked dataclasses.

Everything that can be wrong with settings is found here, before anything is loaded. Nothing else imports hydra.
"""

from nemo_bench.config.composition import (
    DEFAULT_METHODS,
    DETECTING,
    OWN_METRICS,
    SCORING,
    Choice,
    detector_grid,
    grid,
    logger_settings,
    one,
    rescore,
)
from nemo_bench.config.groups import GROUPS, options, targets
from nemo_bench.config.listing import about_method, describe_options, explain_option
from nemo_bench.config.schema import (
    LoggerSettings,
    ModelSettings,
    PromptSettings,
    RunSettings,
    SimilaritySettings,
    TrainerSettings,
    overridden,
)
from nemo_bench.config.targets import build, check_stored, resolve

__all__ = [
    "DEFAULT_METHODS",
    "DETECTING",
    "GROUPS",
    "OWN_METRICS",
    "SCORING",
    "Choice",
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
    "one",
    "options",
    "overridden",
    "rescore",
    "resolve",
    "targets",
]
