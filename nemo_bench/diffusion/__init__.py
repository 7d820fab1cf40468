"""The models: a thin wrapper over diffusers pipelines with per-row neuron masks."""

from nemo_bench.diffusion.model import Conditioning, Diffusion, Similarity, folder_digest, source_digest, value_layers

__all__ = ["Conditioning", "Diffusion", "Similarity", "folder_digest", "source_digest", "value_layers"]
