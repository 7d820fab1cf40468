"""Optimization of the encoded prompt, so that images have more dimensions around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Conditioning, Diffusion, Sampling
from nemo_bench.diffusion.dimension import intrinsic_dimension, noise_along, probes
from nemo_bench.diffusion.schedule import NOISE_STEPS
from nemo_bench.methods.embedding_optimization import Measure, OptimizedEmbedding, Target
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count, Index


@dataclass(eq=False)
class DimensionOptimization(OptimizedEmbedding):
    """Optimizes the embedding of each image until its latents have more intrinsic dimensions (Ross et al. 2025).

    Memorized images have few. Each image is sampled with its prompt up to a late step; there the value is the negative
    dimension of :class:`nemo_bench.detectors.IntrinsicDimension`, at the same latents for all embeddings. The image is
    then sampled anew, from the same noise with the last embedding. The dimension's trace is differentiated once more by
    the embedding, which makes this the most expensive of the methods that optimize embeddings. The public code has no
    value that suffices, and changes prompts that are not memorized as well. In the embedded model, by this estimate,
    memorized images have no fewer dimensions than others, so it can't show what is selective. For flow matching noise
    is what follows from the velocity.
    """

    title = "Intrinsic-dimension optimization"
    summary = "the encoded prompt, optimized for more dimensions around the image"
    sourcing = "public code and abstracts"
    citation = cite("ross2025geometric")
    needs = frozenset({"guidance", "gradients", "uncompiled"})

    #: Negative dimension that suffices; None: all steps are taken.
    target: Target | None = None
    steps: Index = 20
    step: Annotated[int, Field(ge=0, lt=NOISE_STEPS)] = 40  #: Where, in 50 steps of sampling, from 0.
    legacy_trace: bool = False  #: Whether the trace is that of the public code, without the unconditional noise.
    images: Count | None = field(default=None, init=False)

    @override
    def measure(self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Measure:
        sampling = Sampling(model, text, latents)
        for _ in range(self.step * model.steps // NOISE_STEPS):
            sampling.predict()
            sampling.advance()
        timestep, scale = sampling.timestep, model.guidance
        deviation = model.schedule.mixture(timestep)[1]
        # Derivatives can't be taken of tensors that were made in inference mode, but of copies.
        with torch.inference_mode(False), torch.no_grad():
            (direction,) = probes(model, 1)
            reached = sampling.latents.clone()
            unconditional = model.unconditional(len(reached)).clone()
            empty, empty_slope = noise_along(model, reached, timestep, unconditional, direction)

        def negative_dimensions(images: Sequence[int], embeddings: Tensor) -> Tensor:
            rows = list(images)
            own = replace(text.rows(rows), text=embeddings.to(text.text.dtype))
            noise, slope = noise_along(model, reached[rows], timestep, own, direction)
            guided = empty[rows] + scale * (noise - empty[rows])
            guided_slope = scale * (slope - empty_slope[rows]) + (0 if self.legacy_trace else empty_slope[rows])
            return -intrinsic_dimension(guided, guided_slope, direction, deviation)

        return negative_dimensions
