"""Optimization of the encoded prompt where attention to the end of the prompt is bright."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nemo_bench.diffusion import Conditioning, Diffusion, conditional_attention
from nemo_bench.diffusion.noise import FIRST_BLOCK, end_attention, masked_magnitude
from nemo_bench.methods.embedding_optimization import Measure, OptimizedEmbedding, noises_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


class BrightEndingOptimization(OptimizedEmbedding):
    """Optimizes the embedding by the magnitude where memorization is local (Chen et al. 2025).

    Each image is generated once without mitigation; in its last step, the attention to the end token in the
    cross-attention of the UNet's first block, averaged over heads and layers, is a soft mask m. The value is
    |d m| / mean(m), d being what the prompt adds to the noise predicted at the first timestep; it is larger than the
    magnitude of Wen et al. (2024), and has targets of its own. Every image has a mask and an embedding of its own. The
    published code keeps the mask soft; whether the paper makes it hard is unclear. The target should be one that most
    prompts that are not memorized stay below.

    SDXL has no cross-attention in its first block, hence no such mask.

    Args:
        target: At most this value is enough.
        steps: AdamW steps at most.
        rate: Learning rate.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "Bright-Ending optimization"
    summary = "the encoded prompt, optimized where attention to its end is bright"
    touches = "encoded prompt"
    sourcing = "public code; paper second hand"
    citation = cite("chen2025exploring")
    families = frozenset({"StableDiffusionPipeline"})
    needs = frozenset({"gradients", "uncompiled"})

    def __init__(self, target: float = 1.0, steps: int = 10, rate: float = 0.05) -> None:
        super().__init__(target, steps, rate, images=None)

    def measure(self, model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Measure:
        """See :meth:`OptimizedEmbedding.measure`.

        Raises:
            ModelError: There is no cross-attention in the first block, or the UNet is compiled.
        """
        masks = bright_ending(model, prompts, text, latents)
        noises = noises_of(model, text, latents, model.timestep())
        return lambda images, embeddings: masked_magnitude(noises(images, embeddings)[1], masks[list(images)])


def bright_ending(model: Diffusion, prompts: Sequence[Prompt], text: Conditioning, latents: Tensor) -> Tensor:
    """Where images generated without mitigation attend to the end of their prompts in the last step.

    Args:
        model: The model.
        prompts: Prompts of N images.
        text: Their conditioning.
        latents: Their starting noise.

    Returns:
        Attention probabilities, (N, height, width) of the latents.

    Raises:
        ModelError: There is no cross-attention in the first block, or the UNet is compiled.
    """
    maps: dict[str, Tensor] = {}

    def look(layer: str, logits: Tensor) -> Tensor:
        # Later steps take the place of earlier ones.
        maps[layer] = conditional_attention(logits, len(prompts))
        return logits

    with model.edit_attention(look, FIRST_BLOCK):
        model.generate(text, latents)
    lengths = [len(model.tokens(prompt.text)) for prompt in prompts]
    return end_attention([*maps.values()], lengths, (latents.shape[2], latents.shape[3]))
