"""The models: a thin wrapper over diffusers pipelines with per-row neuron masks."""

from nemo_bench.diffusion.attention import Edit, conditional_attention, conditional_rows, cross_attentions
from nemo_bench.diffusion.families import FAMILIES, Conditioning
from nemo_bench.diffusion.guidance import Rule, Step, guided_from
from nemo_bench.diffusion.model import GRADIENT_MEMORY, MEASURES, Diffusion, Measure, Similarity, value_layers
from nemo_bench.diffusion.prefix import Prefix
from nemo_bench.diffusion.source import Source, file_digest, folder_digest

__all__ = [
    "FAMILIES",
    "GRADIENT_MEMORY",
    "MEASURES",
    "Conditioning",
    "Diffusion",
    "Edit",
    "Measure",
    "Prefix",
    "Rule",
    "Similarity",
    "Source",
    "Step",
    "conditional_attention",
    "conditional_rows",
    "cross_attentions",
    "file_digest",
    "folder_digest",
    "guided_from",
    "value_layers",
]
