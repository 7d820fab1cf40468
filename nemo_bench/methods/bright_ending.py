"""Optimization of the encoded prompt where attention to the end of the prompt is bright."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Conditioning, Diffusion, conditional_attention
from nemo_bench.diffusion.noise import FIRST_BLOCK, end_attention, masked_magnitude
from nemo_bench.methods.embedding_optimization import Measure, OptimizedEmbedding, Target, noises_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class BrightEndingOptimization(OptimizedEmbedding):
    """Optimizes the embedding by the magnitude where memorization is local (Chen et al. 2025).

    Each image is generated once without mitigation; in its last step, the attention to the end token in the
    cross-attention of the UNet's first block, averaged over heads and layers, is a soft mask m. The value is
    |d m| / mean(m), where d is the noise that the prompt adds at the first timestep. It is larger than the magnitude of
    Wen et al. (2024) and needs targets of its own, above the values of most prompts that are not memorized. Every image
    has its own mask and embedding. The public code keeps the mask soft; the paper leaves this open. SDXL has no
    cross-attention in its first block, hence no mask.
    """

    title = "Bright-Ending optimization"
    summary = "the encoded prompt, optimized where attention to its end is bright"
    sourcing = "public code; paper second hand"
    citation = cite("chen2025exploring")
    families = frozenset({"StableDiffusionPipeline"})
    limits = "needs attention at the resolution of the latents, and an end token of CLIP"
    needs = frozenset({"gradients", "uncompiled"})

    target: Target = 1.0
    images: Count | None = field(default=None, init=False)

    @override
    def measure(self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Measure:
        masks = bright_ending(model, prompts, text, latents)
        noises = noises_of(model, text, latents, model.timestep())
        return lambda images, embeddings: masked_magnitude(noises(images, embeddings)[1], masks[list(images)])


def bright_ending(model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Tensor:
    """Attention of images generated without mitigation to the end of their prompts, in the last step.

    Returns:
        Attention probabilities, (N, height, width) of the latents.

    Raises:
        ModelError: There is no cross-attention in the first block, or the UNet is compiled.
    """
    maps: dict[str, Tensor] = {}

    def store(layer: str, logits: Tensor) -> Tensor:
        maps[layer] = conditional_attention(logits, len(prompts))  # later steps replace earlier ones
        return logits

    with model.edit_attention(store, FIRST_BLOCK):
        model.generate(text, latents)
    lengths = [len(model.tokens(prompt.text)) for prompt in prompts]
    return end_attention([*maps.values()], lengths, (latents.shape[2], latents.shape[3]))
