"""Mitigations, a file for each source, and their base class."""

from nemo_bench.methods.adversarial_fine_tuning import AdversarialFineTuning
from nemo_bench.methods.amg import AMG
from nemo_bench.methods.anisotropy import AnisotropyOptimization
from nemo_bench.methods.attention_attenuation import AttentionAttenuation
from nemo_bench.methods.attention_rescaling import AttentionRescaling
from nemo_bench.methods.base import Batch, Fit, FittedMethod, Method, Setup
from nemo_bench.methods.bright_ending import BrightEndingOptimization
from nemo_bench.methods.cluster_neurons import ClusterNeurons
from nemo_bench.methods.derived_neurons import OtherNeurons, RandomNeurons, SharedNeurons
from nemo_bench.methods.dimension import DimensionOptimization
from nemo_bench.methods.embedding_optimization import EmbeddingOptimization
from nemo_bench.methods.guard import GUARD
from nemo_bench.methods.initial_noise import AdjustedNoise, OptimizedNoise
from nemo_bench.methods.localized import Deletion, LocalizedNeurons
from nemo_bench.methods.nemo import BlockNeurons, NeMo
from nemo_bench.methods.no_mitigation import NoMitigation
from nemo_bench.methods.padding_fix import PaddingFix
from nemo_bench.methods.perturbed_prompts import EmbeddingNoise, RandomNumbers, RandomTokens, RepeatedWords
from nemo_bench.methods.prss import PRSS
from nemo_bench.methods.sail import SAIL
from nemo_bench.methods.saved import SavedNeurons
from nemo_bench.methods.sinks import Sinks
from nemo_bench.methods.transition_point import DynamicTransition, StaticTransition
from nemo_bench.methods.unlearning import Unlearning
from nemo_bench.methods.update_norms import UpdateNorms
from nemo_bench.methods.wanda import Wanda

__all__ = [
    "AMG",
    "GUARD",
    "PRSS",
    "SAIL",
    "AdjustedNoise",
    "AdversarialFineTuning",
    "AnisotropyOptimization",
    "AttentionAttenuation",
    "AttentionRescaling",
    "Batch",
    "BlockNeurons",
    "BrightEndingOptimization",
    "ClusterNeurons",
    "Deletion",
    "DimensionOptimization",
    "DynamicTransition",
    "EmbeddingNoise",
    "EmbeddingOptimization",
    "Fit",
    "FittedMethod",
    "LocalizedNeurons",
    "Method",
    "NeMo",
    "NoMitigation",
    "OptimizedNoise",
    "OtherNeurons",
    "PaddingFix",
    "RandomNeurons",
    "RandomNumbers",
    "RandomTokens",
    "RepeatedWords",
    "SavedNeurons",
    "Setup",
    "SharedNeurons",
    "Sinks",
    "StaticTransition",
    "Unlearning",
    "UpdateNorms",
    "Wanda",
]
