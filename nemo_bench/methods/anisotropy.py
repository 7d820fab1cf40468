"""Optimization of the encoded prompt by the anisotropy of the log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.diffusion.noise import LATE, mean_cosine, norms
from nemo_bench.methods.embedding_optimization import Measure, OptimizedEmbedding, noises_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


@dataclass(eq=False)
class AnisotropyOptimization(OptimizedEmbedding):
    """Optimizes the embedding by magnitude and angle of the text-conditional noise (Asthana and Belagiannis 2026).

    The value is norm_weight N + angle_weight K, on the starting noise: N is the norm of the noise that the prompt adds
    at the first timestep; K, at a late timestep and without denoising, the cosine over channels between unconditional
    and added noise, averaged over positions. Gradients go through both passes. The paper's mitigation is the loop of
    Wen et al. (2024) with this value; its settings and code are not published, so settings are those of
    :class:`EmbeddingOptimization`. The target is ours: take one above the values of prompts that are not memorized.
    For flow matching N is the norm of velocities, and K compares noises that follow from them.
    """

    title = "Anisotropy optimization"
    summary = "the encoded prompt, optimized by norm and angle of the text-conditional noise"
    sourcing = "public code of the score; the mitigation's settings were not published"
    citation = cite("asthana2026detecting")

    norm_weight: float = 1.0  #: Weight of N.
    angle_weight: float = 2.0  #: Weight of K.
    #: K compares predicted noise, or the network's own prediction, which may be velocity, as in the public code of the
    #: score.
    angle_of: Literal["noise", "prediction"] = "noise"

    @override
    def measure(self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Measure:
        end = model.timestep(LATE)
        first = noises_of(model, text, latents, model.timestep())
        late = noises_of(model, text, latents, end)
        convert = model.prediction if self.angle_of == "prediction" else model.schedule.noise_of

        def value(images: Sequence[int], embeddings: Tensor) -> Tensor:
            unconditional, added = late(images, embeddings)
            unconditional, added = convert(unconditional, end, latents[list(images)]), convert(added, end)
            norm = norms(first(images, embeddings)[1])
            return self.norm_weight * norm + self.angle_weight * mean_cosine(unconditional, added)

        return value
