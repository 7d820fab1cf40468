"""Model families, one file each: what the network takes, how latents are decoded, how the pipeline is loaded."""

from nemo_bench.diffusion.families.base import Conditioning, Family, Layers
from nemo_bench.diffusion.families.unet import StableDiffusion, StableDiffusionXL
from nemo_bench.errors import ModelError

__all__ = ["FAMILIES", "Conditioning", "Family", "Layers", "family_of"]

FAMILIES: dict[str, Family] = {family.pipeline_class: family for family in (StableDiffusion(), StableDiffusionXL())}
"""By the name of the pipeline class, as in ``model_index.json``."""


def family_of(pipeline_class: str) -> Family:
    """The family of a pipeline class, given by name; raises ModelError if the class is none of :data:`FAMILIES`."""
    if pipeline_class not in FAMILIES:
        raise ModelError(f"pipelines of class {pipeline_class} are not supported; give one of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline_class]
