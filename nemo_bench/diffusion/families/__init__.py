"""Model families: what the UNet takes, how latents are decoded, and how the pipeline is loaded, in one file each."""

from nemo_bench.diffusion.families.base import Conditioning, Family
from nemo_bench.diffusion.families.stable_diffusion import StableDiffusion
from nemo_bench.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from nemo_bench.errors import ModelError

FAMILIES: dict[str, Family] = {family.pipeline_class: family for family in (StableDiffusion(), StableDiffusionXL())}
"""By the name of the pipeline class, as in ``model_index.json``."""


def family_of(pipeline_class: str) -> Family:
    """The family of a pipeline class, given by name.

    Raises:
        ModelError: The class is none of :data:`FAMILIES`.
    """
    if pipeline_class not in FAMILIES:
        raise ModelError(f"pipelines of class {pipeline_class} are not supported; give one of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline_class]


__all__ = ["FAMILIES", "Conditioning", "Family", "StableDiffusion", "StableDiffusionXL", "family_of"]
