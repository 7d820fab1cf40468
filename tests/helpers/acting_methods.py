"""Methods with settings under which they act on any model, and under which they leave it alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench import Diffusion, Prompt, resolve
from nemo_bench.methods import (
    AMG,
    GUARD,
    PRSS,
    SAIL,
    AdjustedNoise,
    AnisotropyOptimization,
    AttentionAttenuation,
    AttentionRescaling,
    BrightEndingOptimization,
    DimensionOptimization,
    DynamicTransition,
    EmbeddingNoise,
    EmbeddingOptimization,
    Method,
    OptimizedNoise,
    PaddingFix,
    RandomNumbers,
    RandomTokens,
    RepeatedWords,
    Setup,
    StaticTransition,
    UpdateNorms,
    Wanda,
)

GENERAL = resolve("package:planted/prompts/controls.jsonl")
"""General prompts, whose words the tiny models spell."""
METHODS: dict[str, Callable[[], Method]] = {
    "adjusted_noise": AdjustedNoise,
    "amg": lambda: AMG(threshold=-1.0),
    "anisotropy_optimization": lambda: AnisotropyOptimization(-9.0, steps=3, images=2),
    "attention_attenuation": lambda: AttentionAttenuation(factor=0.0),
    "attention_rescaling": lambda: AttentionRescaling(2.0),
    "bright_ending_optimization": lambda: BrightEndingOptimization(0.0, steps=3),
    "dimension_optimization": lambda: DimensionOptimization(steps=2),
    "dynamic_transition": lambda: DynamicTransition(-3.0),
    "embedding_noise": lambda: EmbeddingNoise(1.0),
    "embedding_optimization": lambda: EmbeddingOptimization(0.0, steps=3, images=2),
    "embedding_optimization of images": lambda: EmbeddingOptimization(0.0, steps=3, images=None),
    "guard": GUARD,
    "optimized_noise": lambda: OptimizedNoise(0.0, steps=3),
    "padding_fix": PaddingFix,
    "prss": lambda: PRSS(search_target=0.0, anchor_from=0.0, anchor_full=1e-3, steps=3),
    "random_numbers": RandomNumbers,
    "random_tokens": RandomTokens,
    "repeated_words": RepeatedWords,
    "sail": lambda: SAIL(0.0, steps=3, restarts=1),
    "static_transition": StaticTransition,
    "update_norms": lambda: UpdateNorms(GENERAL, 4, flag=1e-3, strong=1e-3, band=0.0),
    "wanda": lambda: Wanda(ratio=0.3),
}
"""Methods with settings under which they act on any model."""
IDLE: dict[str, Callable[[], Method]] = {
    "adjusted_noise": lambda: AdjustedNoise(0, timestep=1000),
    "adjusted_noise by nothing": lambda: AdjustedNoise(rate=0.0, timestep=1000),
    "amg": lambda: AMG(threshold=1.0),
    "anisotropy_optimization": lambda: AnisotropyOptimization(1e9),
    "attention_attenuation": lambda: AttentionAttenuation(factor=1.0),
    "attention_rescaling": lambda: AttentionRescaling(1.0, mask=False),
    "bright_ending_optimization": lambda: BrightEndingOptimization(1e9),
    "dimension_optimization": lambda: DimensionOptimization(1e9),
    "dimension_optimization without steps": lambda: DimensionOptimization(steps=0),
    "embedding_noise": lambda: EmbeddingNoise(0.0),
    "embedding_optimization": lambda: EmbeddingOptimization(1e9),
    "embedding_optimization of images": lambda: EmbeddingOptimization(1e9, images=None),
    "embedding_optimization without steps": lambda: EmbeddingOptimization(0.0, steps=0),
    "guard": lambda: GUARD(factor=1.0, repulsion=0.0),
    "optimized_noise": lambda: OptimizedNoise(1e9),
    "optimized_noise without steps": lambda: OptimizedNoise(0.0, steps=0),
    "prss": lambda: PRSS(search_target=1e9, anchor_from=0.0, anchor_full=1e-3),
    "random_numbers": lambda: RandomNumbers(0),
    "random_tokens": lambda: RandomTokens(0),
    "repeated_words": lambda: RepeatedWords(0),
    "sail": lambda: SAIL(1e9),
    "static_transition": lambda: StaticTransition(1000),
    "static_transition of the same scale": lambda: StaticTransition(0, before=3.0),
    "dynamic_transition of the same scale": lambda: DynamicTransition(before=3.0),
    "update_norms": lambda: UpdateNorms(GENERAL, 4, flag=1e9),
    "wanda": lambda: Wanda(ratio=0.0),
}
"""Methods without strength, or whose gate stays shut."""


def prepared(
    model: Diffusion, name: str, methods: dict[str, Callable[[], Method]] = METHODS, batch_size: int = 32
) -> Method:
    method = methods[name]()
    if type(model.pipeline).__name__ not in method.families:
        pytest.skip("made for other families")
    references = tuple(Path(resolve("package:planted/references")).glob("vm-0*.png"))
    a, b, c = Prompt("a", "red sun map", "VM", references), Prompt("b", "fox big hat", "TM"), Prompt("c", "cup dog")
    method.setup(model, Setup(prompts=[a, b, c], batch_size=batch_size))
    return method
