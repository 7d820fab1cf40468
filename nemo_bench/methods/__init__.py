"""Mitigations, one file each."""

from nemo_bench.methods.base import Batch, Method
from nemo_bench.methods.nemo import BlockNeurons, NeMo
from nemo_bench.methods.no_mitigation import NoMitigation
from nemo_bench.methods.random_neurons import RandomNeurons
from nemo_bench.methods.saved import SavedNeurons
from nemo_bench.methods.shared_neurons import SharedNeurons

__all__ = ["Batch", "BlockNeurons", "Method", "NeMo", "NoMitigation", "RandomNeurons", "SavedNeurons", "SharedNeurons"]
