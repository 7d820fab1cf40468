"""Benchmark of memorization and its mitigation in text-to-image diffusion models.

Example:
    >>> from nemo_bench import NeMo, load, load_prompts
    >>> model, (prompts, general) = load("planted"), load_prompts("planted")
    >>> found = NeMo().calibrate(model, general).localize(model, prompts[0])
    >>> with model.block(found.neurons):
    ...     images = model.generate(prompts[0].text, range(4))
"""

from importlib.metadata import version

from nemo_bench.config import resolve
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, ModelError, NemoBenchError, PromptError, StoreError
from nemo_bench.library import benchmark, load, load_prompts, read_scores
from nemo_bench.localization import Calibration
from nemo_bench.methods import Method, NeMo
from nemo_bench.metrics import BenchMetric
from nemo_bench.prompts import read_prompts
from nemo_bench.types import Localization, Neurons, Prompt

__version__ = version("nemo-bench")

__all__ = [
    "BenchMetric",
    "Calibration",
    "ConfigError",
    "Diffusion",
    "Localization",
    "Method",
    "ModelError",
    "NeMo",
    "NemoBenchError",
    "Neurons",
    "Prompt",
    "PromptError",
    "StoreError",
    "__version__",
    "benchmark",
    "load",
    "load_prompts",
    "read_prompts",
    "read_scores",
    "resolve",
]
