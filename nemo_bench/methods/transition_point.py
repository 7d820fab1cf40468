"""Guidance that starts late: static and dynamic transition points, and opposite guidance before them.

Published with 50 steps of DPM-Solver; here with the model's own DDIM steps. Negative scales before the transition are
opposite guidance; Han et al. (2025) try -1 to -9.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, Diffusion, Step, guided_from
from nemo_bench.methods.base import Batch, Method
from nemo_bench.records.citations import cite


@dataclass(eq=False)
class StaticTransition(Method):
    """Guides from a fixed timestep on (Jain et al. 2025).

    The timestep at which guidance no longer leads to the training image depends on the model: in the embedded one it is
    so late that other images lose their prompt as well.
    """

    title = "Static transition point"
    summary = "no guidance before a fixed timestep"
    touches = "guidance"
    sourcing = "public code; paper second hand"
    citation = cite("jain2025classifier")
    families = frozenset(FAMILIES)
    needs = frozenset({"guidance"})

    #: Guidance starts where the timestep is at most this, one of Stable Diffusion; other families start at the same
    #: ratio of signal to noise. Published: 500, 600 or 700 without, 650 with opposite
    #: guidance, on fine-tuned models. (At a timestep equal to it, the public script continues with a schedule of 200
    #: steps; we do not.)
    timestep: Annotated[int, Field(ge=0, le=1000)] = 500
    #: Guidance scale until then: 0 is unconditional (the paper), 1 the plain prompt, below 0 opposite guidance (-2 in
    #: the paper). The scale after it is the model's own.
    before: FiniteFloat = 0.0

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        yield replace(batch, rule=guided_from(model.schedule.like(self.timestep), self.before))


@dataclass(eq=False)
class DynamicTransition(Method):
    """Guides each image from the first local minimum of its own magnitude on (Jain et al. 2025).

    The magnitude is the norm of the noise that the prompt adds, one per image; the public script takes one norm over
    the batch, so that images switch together. A minimum shows one step late: where the magnitude rises after it fell.
    """

    title = "Dynamic transition point"
    summary = "no guidance before the first local minimum of the text-conditional noise"
    touches = "guidance"
    sourcing = "public code; paper second hand"
    citation = cite("jain2025classifier")
    families = frozenset(FAMILIES)
    needs = frozenset({"guidance"})

    #: Guidance scale until then: 0 is unconditional (the paper), 1 the plain prompt (the public script), below 0
    #: opposite guidance (-7.5 in the public script, which first makes a whole pass and takes the minimum of 1 minus the
    #: cosine between successive latents, or the second one where the first is at step 1, or step 5 where there is none;
    #: ours is one pass, by the magnitude).
    before: FiniteFloat = 0.0

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        magnitudes: list[Tensor] = []
        switched = torch.zeros(len(batch.prompts), dtype=torch.bool, device=batch.latents.device)

        def rule(step: Step) -> Tensor:
            if step.number == 0:
                magnitudes.clear()
                switched.zero_()
            magnitudes.append(step.magnitude)
            if len(magnitudes) > 2:
                before, lowest, now = magnitudes[-3:]
                switched.logical_or_((now > lowest) & (before > lowest))
            return step.guided(torch.where(switched, step.scale, self.before))

        yield replace(batch, rule=rule)
