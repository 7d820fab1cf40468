"""How widely cross-attention is spread over the tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from nemo_bench.detectors.base import Detector, Finding, View, check_counts
from nemo_bench.diffusion import Diffusion, cross_attentions
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


def token_shares(view: View, layers: Collection[str]) -> Tensor:
    """Attention that each token gets, averaged over positions, heads and layers, (N, tokens); rows sum to 1."""
    return torch.stack([view.attention(layer).mean(1) for layer in layers]).mean(0)


def entropy_terms(shares: Tensor) -> Tensor:
    """What each token adds to the entropy in nats, (N, tokens)."""
    return -torch.xlogy(shares, shares)


class _Entropy(Detector):
    """Stable Diffusion 1.x and 2.x alone: SDXL has no layer that corresponds, and other numbers of them."""

    sourcing = "public code; formulas second hand"
    citation = cite("ren2024unveiling")
    families: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})
    attends = True


class LayerEntropy(_Entropy):
    """Entropy of one layer's attention in the first step, LE (Ren et al. 2024; mode E of the public script).

    Probabilities of the conditional half are averaged over positions and heads first, the entropy is of that average.
    Memorized prompts draw attention away from the begin token, on which it gathers otherwise.

    Args:
        seeds: Images a prompt.
        layer: Number of the cross-attention layer from 0: six down, one middle, nine up in Stable Diffusion.
            Published is 3, ``down_blocks[1].attentions[1]``.

    Raises:
        ConfigError: There are no seeds, or the number is below 0.
        ModelError: Once the model is known, it has no such layer.
    """

    title = "Layer entropy (LE)"
    summary = "entropy of one cross-attention layer in the first step"

    def __init__(self, seeds: int = 1, layer: int = 3) -> None:
        check_counts(self.title, seeds)
        if layer < 0:
            raise ConfigError(f"{self.title} numbers layers from 0, given detector.layer={layer}; published is 3")
        self.seeds, self.layer = seeds, layer

    def fits(self, model: Diffusion) -> None:
        """See :meth:`Detector.fits`."""
        count = len(cross_attentions(model.unet))
        if self.layer >= count:
            msg = f"detector.layer={self.layer}: this model has cross-attention layers 0 to {count - 1}"
            raise ModelError(f"{msg}; give one of those")

    def layers(self, model: Diffusion, number: int) -> Collection[str]:
        """See :meth:`Detector.layers`."""
        return [[*cross_attentions(model.unet)][self.layer]]

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        return {"entropy": entropy_terms(token_shares(view, self.layers(view.model, view.number))).sum(1)}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`."""
        return Finding(float(seen[0]["entropy"].mean()))


class AttentionEntropy(_Entropy):
    """Entropy of all layers' attention in the last fifth of the steps, AE (Ren et al. 2024; mode D of the script).

    To it is added by how much the part of the summary tokens, end token and padding, grew since the first step. The
    paper writes the absolute value of that, the public script the signed difference, which is the default here.

    Args:
        seeds: Images a prompt.
        absolute: Whether the second term counts by its absolute value.

    Raises:
        ConfigError: There are no seeds.
    """

    title = "Attention entropy (AE)"
    summary = "entropy of all cross-attention in the last fifth of the steps"
    steps = None

    def __init__(self, seeds: int = 1, absolute: bool = False) -> None:
        check_counts(self.title, seeds)
        self.seeds, self.absolute = seeds, absolute

    def layers(self, model: Diffusion, number: int) -> Collection[str]:
        """See :meth:`Detector.layers`."""
        return cross_attentions(model.unet) if number == 0 or number >= model.steps - last_fifth(model) else ()

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        layers = self.layers(view.model, view.number)
        if not layers:
            return {}
        terms = entropy_terms(token_shares(view, layers))
        lengths = torch.tensor(view.lengths, device=terms.device)[:, None]
        is_summary = torch.arange(terms.shape[1], device=terms.device) >= lengths - 1
        return {"entropy": terms.sum(1), "summary": (terms * is_summary).sum(1)}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`; ``entropy`` and ``growth`` are its two terms."""
        last = seen[-last_fifth(model) :]
        entropy = torch.stack([step["entropy"] for step in last]).mean(0)
        growth = torch.stack([step["summary"] for step in last]).mean(0) - seen[0]["summary"]
        score = entropy + (growth.abs() if self.absolute else growth)
        return Finding(float(score.mean()), {"entropy": float(entropy.mean()), "growth": float(growth.mean())})


def last_fifth(model: Diffusion) -> int:
    """Number of steps that make the last fifth of a generation, at least 1."""
    return max(1, model.steps // 5)
