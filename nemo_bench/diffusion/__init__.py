"""Diffusion models: diffusers pipelines with a sampling loop of our own and neuron masks for each row."""

from nemo_bench.diffusion.attention import (
    Edit,
    conditional_attention,
    conditional_rows,
    cross_attentions,
    value_layers,
)
from nemo_bench.diffusion.digests import folder_digest
from nemo_bench.diffusion.families import FAMILIES, UNETS, Conditioning, pipeline_class_of
from nemo_bench.diffusion.lora import Lora
from nemo_bench.diffusion.model import GRADIENT_MEMORY, Diffusion
from nemo_bench.diffusion.pictures import fitted_picture
from nemo_bench.diffusion.prefix import Prefix
from nemo_bench.diffusion.sampling import Generated, Rule, Sampling, Step, guided_from
from nemo_bench.diffusion.schedule import NO_SIGNAL, check_schedule
from nemo_bench.diffusion.similarity import MEASURES, Measure, Similarity
from nemo_bench.diffusion.source import Source, TokenizerFiles

__all__ = [
    "FAMILIES",
    "GRADIENT_MEMORY",
    "MEASURES",
    "NO_SIGNAL",
    "UNETS",
    "Conditioning",
    "Diffusion",
    "Edit",
    "Generated",
    "Lora",
    "Measure",
    "Prefix",
    "Rule",
    "Sampling",
    "Similarity",
    "Source",
    "Step",
    "TokenizerFiles",
    "check_schedule",
    "conditional_attention",
    "conditional_rows",
    "cross_attentions",
    "fitted_picture",
    "folder_digest",
    "guided_from",
    "pipeline_class_of",
    "value_layers",
]
