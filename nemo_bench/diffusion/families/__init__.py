"""Model families, one file each: what the network takes, how latents are decoded, how the pipeline is loaded."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nemo_bench.diffusion.families.base import Conditioning, Family, Layers, Segment
from nemo_bench.diffusion.families.flux import Flux
from nemo_bench.diffusion.families.pixart import PixArtAlpha, PixArtSigma
from nemo_bench.diffusion.families.sana import Sana
from nemo_bench.diffusion.families.sd3 import StableDiffusion3
from nemo_bench.diffusion.families.unet import StableDiffusion, StableDiffusionXL
from nemo_bench.errors import ModelError

__all__ = ["FAMILIES", "UNETS", "Conditioning", "Family", "Layers", "Segment", "family_of", "pipeline_class_of"]

FAMILIES: dict[str, type[Family]] = {
    family.pipeline_class: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, PixArtAlpha, PixArtSigma, Flux, Sana)
}
"""By the name of the pipeline class, as in ``model_index.json``."""
UNETS = frozenset({StableDiffusion.pipeline_class, StableDiffusionXL.pipeline_class})
"""Families with a UNet, for which nearly all methods and detectors were published."""


def pipeline_class_of(name: str | None) -> str | None:
    """The first pipeline class whose models have this ``model.family``, or None."""
    return next((pipeline_class for pipeline_class, family in FAMILIES.items() if name in family.names), None)


def family_of(pipeline_class: str, **settings: Any) -> Family:
    """The family of a pipeline class, given by name, with those of the settings that are not None.

    Raises:
        ModelError: The class is none of :data:`FAMILIES`, or has no such setting.
    """
    if pipeline_class not in FAMILIES:
        raise ModelError(f"pipelines of class {pipeline_class} are not supported; give one of {', '.join(FAMILIES)}")
    family = FAMILIES[pipeline_class]
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given.keys() - {field.name for field in fields(family)}:
        raise ModelError(f"model.{name}={given[name]}: {pipeline_class} has no such setting; leave it out")
    return family(**given)
