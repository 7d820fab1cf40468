"""Entropy of cross-attention over the tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import Diffusion, cross_attentions
from nemo_bench.errors import ModelError
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count, Index


@dataclass(eq=False)
class LayerEntropy(Detector):
    """Entropy of one layer's attention in the first step, LE (Ren et al. 2024; mode E of the public script).

    Probabilities of the conditional half are averaged over positions and heads first; the entropy is of that average.
    Memorized prompts draw attention away from the begin token, on which it gathers otherwise. Stable Diffusion 1.x and
    2.x alone: SDXL has no corresponding layer.
    """

    title = "Layer entropy (LE)"
    summary = "entropy of one cross-attention layer in the first step"
    sourcing = "public code; formulas second hand"
    citation = cite("ren2024unveiling")
    families: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})
    limits = "rests on CLIP's begin token as a sink and on padding that sums up a prompt"
    attends = True

    seeds: Count = 1
    #: Number of the cross-attention layer from 0: six down, one middle, nine up in Stable Diffusion. Published is 3,
    #: ``down_blocks[1].attentions[1]``.
    layer: Index = 3

    @override
    def check_model(self, model: Diffusion) -> None:
        count = len(cross_attentions(model.unet))
        if self.layer >= count:
            msg = f"detector.layer={self.layer}: this model has cross-attention layers 0 to {count - 1}"
            raise ModelError(f"{msg}; give one of those")

    @override
    def layers(self, model: Diffusion, number: int) -> Collection[str]:
        return [[*cross_attentions(model.unet)][self.layer]]

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        return {"entropy": entropy_terms(view, self.layers(view.model, view.number)).sum(1)}


@dataclass(eq=False)
class AttentionEntropy(Detector):
    """Entropy of all layers' attention in the last fifth of the steps, AE (Ren et al. 2024; mode D of the script).

    The score is ``entropy`` plus ``growth``, both in the details: how much the part of the summary tokens, end token
    and padding, grew since the first step. The paper uses the absolute value of the growth, the public script the
    signed difference, the default here. Stable Diffusion 1.x and 2.x alone: SDXL has another number of summary tokens.
    """

    title = "Attention entropy (AE)"
    summary = "entropy of all cross-attention in the last fifth of the steps"
    sourcing = LayerEntropy.sourcing
    citation = cite("ren2024unveiling")
    families = LayerEntropy.families
    limits = LayerEntropy.limits
    attends = True
    steps = None

    seeds: Count = 1
    absolute: bool = False  #: Whether the second term counts by its absolute value.

    @override
    def layers(self, model: Diffusion, number: int) -> Collection[str]:
        return cross_attentions(model.unet) if number == 0 or number >= model.steps - last_fifth(model) else ()

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        layers = self.layers(view.model, view.number)
        if not layers:
            return {}
        terms = entropy_terms(view, layers)
        lengths = torch.tensor(view.lengths, device=terms.device)[:, None]
        is_summary = torch.arange(terms.shape[1], device=terms.device) >= lengths - 1
        return {"entropy": terms.sum(1), "summary": (terms * is_summary).sum(1)}

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        last = observed[-last_fifth(model) :]
        entropy = torch.stack([step["entropy"] for step in last]).mean(0)
        growth = torch.stack([step["summary"] for step in last]).mean(0) - observed[0]["summary"]
        score = entropy + (growth.abs() if self.absolute else growth)
        return DetectorScore(float(score.mean()), {"entropy": float(entropy.mean()), "growth": float(growth.mean())})


def entropy_terms(view: View, layers: Collection[str]) -> Tensor:
    """Each token's term of the entropy in nats, (N, tokens), of attention averaged over positions, heads and layers."""
    shares = torch.stack([view.attention(layer).mean(1) for layer in layers]).mean(0)
    return -torch.xlogy(shares, shares)


def last_fifth(model: Diffusion) -> int:
    """Number of steps in the last fifth of a generation, at least 1."""
    return max(1, model.steps // 5)
