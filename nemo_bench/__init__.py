"""Benchmark of memorization and its mitigation in text-to-image diffusion models.

Example:
    >>> from nemo_bench import NeMo, load, load_prompts
    >>> model, (prompts, general) = load("planted"), load_prompts("planted")
    >>> found = NeMo().calibrate(model, general).localize(model, prompts[0])
    >>> with model.block(found.neurons):
    ...     images = model.generate(prompts[0].text, range(4))
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_bench.api import load, load_prompts, read_scores, run
    from nemo_bench.config import resolve
    from nemo_bench.diffusion import Diffusion
    from nemo_bench.errors import ConfigError, ModelError, NemoBenchError, PromptError, StoreError
    from nemo_bench.localization import Calibration
    from nemo_bench.methods import Method, NeMo
    from nemo_bench.metrics import BenchMetric
    from nemo_bench.monitor import MemorizationMonitor
    from nemo_bench.prompts import read_prompts
    from nemo_bench.records.data import Localization, Neurons, Prompt

__version__ = version("nemo-bench")

__all__ = [
    "BenchMetric",
    "Calibration",
    "ConfigError",
    "Diffusion",
    "Localization",
    "MemorizationMonitor",
    "Method",
    "ModelError",
    "NeMo",
    "NemoBenchError",
    "Neurons",
    "Prompt",
    "PromptError",
    "StoreError",
    "__version__",
    "load",
    "load_prompts",
    "read_prompts",
    "read_scores",
    "resolve",
    "run",
]

_MODULES = (
    "records.data", "errors", "config", "prompts", "diffusion", "localization", "methods", "metrics", "monitor", "api",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Finds a public name at its first use: torch and diffusers take seconds to import, a help text needs neither."""
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"nemo_bench.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module 'nemo_bench' has no attribute '{name}'")
