"""Benchmark of memorization and its mitigation in text-to-image diffusion models.

Example:
    >>> from nemo_bench import Diffusion, Neurons, resolve
    >>> model = Diffusion.load(resolve("package:planted/model/pipeline"), steps=20, guidance=3.0)
    >>> with model.block(Neurons({next(iter(model.value_layers)): [3]})):
    ...     images = model.generate(model.encode(["a caption"]), model.latents([0]))
"""

from importlib.metadata import version

from nemo_bench.config import resolve
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, ModelError, NemoBenchError, PromptError, StoreError
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
    "read_prompts",
    "resolve",
]
