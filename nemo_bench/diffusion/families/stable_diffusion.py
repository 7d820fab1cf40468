"""Stable Diffusion 1.x and 2.x; their text encoders, widths and prediction types differ by configuration only."""

from __future__ import annotations

from typing import Any, ClassVar

from nemo_bench.diffusion.families.base import Family


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder, CLIP or OpenCLIP."""

    pipeline_class = "StableDiffusionPipeline"
    # The safety checker would blacken images.
    loading: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }
    networks = ("unet", "vae", "text_encoder")
