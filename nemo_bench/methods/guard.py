"""GUARD: guidance towards the prompt with attenuated attention and away from the plain one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pydantic import FiniteFloat
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion, Step
from nemo_bench.methods.attention_attenuation import AttentionAttenuation, Attenuation
from nemo_bench.methods.base import Batch
from nemo_bench.records.ranges import NotNegative

ALIGNED = 0.9  # Cosine above which the attraction is projected; these three numbers are those of the public code.
LARGEST = 2.0  # Of the projection's coefficient, in absolute value.
TINY = 1e-8


@dataclass(eq=False)
class GUARD(AttentionAttenuation):
    """Guides to the prompt under attention attenuation, and away from the prompt without it (Zhao et al. 2026).

    With e+ the prediction for the prompt under :class:`AttentionAttenuation`, e- the plain one and e the unconditional
    one, step i of N removes e + w (e+ - e) - r cos(pi i / 2N) (e- - e), where w is the model's guidance scale. Schedule
    and r are those of the public command; its code has others by default, and a projection that its command seems to
    turn off, but does not. The public snapshot can't run that command as it stands.

    A factor of 1 is the control that a table needs: plain guidance at the scale w - r cos(pi i / 2N), which is lower.
    In the embedded model, whose guidance scale is 3, the published r leaves a scale of 1 in the first step, where
    guidance acts most.
    """

    title = "GUARD"
    summary = "guidance to the prompt with weakened attention, away from the prompt as it is"
    touches = "attention to text and guidance"
    makes_passes = True
    needs = frozenset({"guidance", "uncompiled"})

    threshold: FiniteFloat = 0.1
    repulsion: NotNegative = 2.0  #: r, in guidance scales; 0 leaves attenuation alone. Default of the public script: 3.
    #: Whether what attraction shares with repulsion is taken from it, where the cosine of the two is above 0.9; with a
    #: factor of 1, where they are the same, never.
    orthogonal: bool = False

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        attenuation = Attenuation(self, len(batch.prompts))

        def rule(step: Step) -> Tensor:
            attracted = repelled = step.difference
            if self.factor != 1:
                attenuation.active = False
                repelled = model.predict_noise(step.latents, step.timestep, batch.text) - step.unconditional
                attenuation.active = True
            if self.orthogonal and self.factor != 1:
                attracted = projected(attracted, repelled)
            weight = self.repulsion * math.cos(math.pi * step.number / (2 * model.steps))
            return step.unconditional + step.scale * attracted - weight * repelled

        with attenuation.applied(model):
            yield replace(batch, rule=rule, notes=attenuation.notes)


def projected(attracted: Tensor, repelled: Tensor) -> Tensor:
    """Takes from each row of one direction its part along the other, where the two are nearly parallel.

    Args:
        attracted: Directions a, (N, channels, height, width).
        repelled: Directions b, shaped alike.

    Returns:
        a - clip(<a, b> / (|b|^2 + 1e-8), -2, 2) b where the cosine of a and b is above 0.9, else a.
    """
    one, other = attracted.flatten(1), repelled.flatten(1)
    dot = (one * other).sum(1)
    cosine = dot / (one.norm(dim=1) * other.norm(dim=1) + TINY)
    along = (dot / (other.square().sum(1) + TINY)).clamp(-LARGEST, LARGEST)
    along = along * (cosine > ALIGNED)
    return attracted - along[:, None, None, None] * repelled
