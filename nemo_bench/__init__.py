"""Benchmark of memorization and its mitigation in text-to-image diffusion models.

Example:
    >>> from nemo_bench import Diffusion, NeMo, planted_model
    >>> model = planted_model()
    >>> with model.block(neurons):
    ...     images = model.generate(model.encode(["a caption"]), model.latents([0]))
"""

from importlib.metadata import version

from nemo_bench.config import resolve
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import NemoBenchError
from nemo_bench.localization import Calibration
from nemo_bench.methods import Method, NeMo
from nemo_bench.metrics import BenchMetric
from nemo_bench.prompts import read_prompts
from nemo_bench.types import Localization, Neurons, Prompt

__version__ = version("nemo-bench")

__all__ = [
    "BenchMetric",
    "Calibration",
    "Diffusion",
    "Localization",
    "Method",
    "NeMo",
    "NemoBenchError",
    "Neurons",
    "Prompt",
    "__version__",
    "read_prompts",
    "resolve",
]
