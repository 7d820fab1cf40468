"""Optimization of the encoded prompt by the anisotropy of the log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.diffusion.noise import LATE, mean_cosine, norms
from nemo_bench.methods.embedding_optimization import Measure, OptimizedEmbedding, noises_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


class AnisotropyOptimization(OptimizedEmbedding):
    """Optimizes the embedding by magnitude and angle of the text-conditional noise (Asthana and Belagiannis 2026).

    The value is norm_weight N + angle_weight K, both taken on the starting noise: N is the norm of what the prompt adds
    to the noise predicted at the first timestep; K, at a late timestep and without denoising, the cosine over the
    channels between the unconditional noise and what the prompt adds to it, averaged over positions. Gradients go
    through both passes. The paper's mitigation is the loop of Wen et al. (2024) with this value; its settings and its
    code were not published, so those of :class:`EmbeddingOptimization` are taken, and a target of our own. As there, it
    should be one that prompts that are not memorized stay below.

    Args:
        target: At most this value, averaged over images, is enough: ours, the 1.5 that Wen's target is for the norm.
        steps: AdamW steps at most.
        rate: Learning rate.
        images: See :class:`OptimizedEmbedding`.
        norm_weight: Of N.
        angle_weight: Of K.
        angle_of: Between what K is: the noise predicted, or what the network itself predicts, which may be velocity, as
            in the public code of the score.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "Anisotropy optimization"
    summary = "the encoded prompt, optimized by norm and angle of the text-conditional noise"
    touches = "encoded prompt"
    sourcing = "public code of the score; the mitigation's settings were not published"
    citation = cite("asthana2026detecting")

    def __init__(
        self,
        target: float = 1.5,
        steps: int = 10,
        rate: float = 0.05,
        images: int | None = 4,
        norm_weight: float = 1.0,
        angle_weight: float = 2.0,
        angle_of: Literal["noise", "prediction"] = "noise",
    ) -> None:
        super().__init__(target, steps, rate, images)
        self.norm_weight, self.angle_weight, self.angle_of = norm_weight, angle_weight, angle_of

    def measure(self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Measure:
        """See :meth:`OptimizedEmbedding.measure`."""
        end = model.timestep(LATE)
        first, late = (noises_of(model, text, latents, timestep) for timestep in (model.timestep(), end))

        def value(images: Sequence[int], embeddings: Tensor) -> Tensor:
            unconditional, added = late(images, embeddings)
            if self.angle_of == "prediction":
                unconditional = model.prediction(unconditional, end, latents[list(images)])
                added = model.prediction(added, end)
            norm = norms(first(images, embeddings)[1])
            return self.norm_weight * norm + self.angle_weight * mean_cosine(unconditional, added)

        return value
