"""Guidance that starts late: static and dynamic transition points, and opposite guidance before them.

Published with 50 steps of DPM-Solver; here with the model's own DDIM steps. Negative scales before the
transition are opposite guidance; Han et al. (2025) try -1 to -9.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from nemo_bench.diffusion import Diffusion, Step, guided_from
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.records.citations import cite

_CITATION = cite("jain2025classifier")


class StaticTransition(Method):
    """Guides from a fixed timestep on (Jain et al. 2025).

    Where guidance has to start so that it no longer leads to the training image depends on the model: in the embedded
    one so late that other images have lost their prompt as well.

    Args:
        timestep: Guidance starts where the timestep is at most this, 0 to 1000. Published: 500, 600 or 700 without, 650
            with opposite guidance, on fine-tuned models. (Where a timestep is equal to it, the public script goes on
            with a schedule of 200 steps; here nothing of the kind happens.)
        before: Guidance scale until then: 0 is unconditional (the paper), 1 the plain prompt, below 0 opposite guidance
            (-2 in the paper). The scale after it is the model's own.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "Static transition point"
    summary = "no guidance before a fixed timestep"
    touches = "guidance"
    sourcing = "public code; paper second hand"
    citation = _CITATION
    needs = frozenset({"guidance"})

    def __init__(self, timestep: int = 500, before: float = 0.0) -> None:
        if not (0 <= timestep <= 1000 and isfinite(before)):
            msg = f"given timestep={timestep}, before={before}"
            raise ConfigError(f"static_transition needs a timestep from 0 to 1000 and a finite scale before it, {msg}")
        self.timestep, self.before = timestep, before

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        yield replace(batch, rule=guided_from(self.timestep, self.before))


class DynamicTransition(Method):
    """Guides each image from the first local minimum of its own magnitude on (Jain et al. 2025).

    The magnitude is the norm of what the prompt adds to the noise, one an image; the public script takes one norm over
    the batch, so that images switch together. A minimum shows one step late: where the magnitude rises after it fell.

    Args:
        before: Guidance scale until then: 0 is unconditional (the paper), 1 the plain prompt (the public script), below
            0 opposite guidance (-7.5 in the public script). It is ours to do that in one pass and by the magnitude: the
            public script first makes a whole pass and takes the minimum of 1 minus the cosine between successive
            latents, or the second one where the first is at step 1, or step 5 where there is none.

    Raises:
        ConfigError: The scale is not finite.
    """

    title = "Dynamic transition point"
    summary = "no guidance before the first local minimum of the text-conditional noise"
    touches = "guidance"
    sourcing = "public code; paper second hand"
    citation = _CITATION
    needs = frozenset({"guidance"})

    def __init__(self, before: float = 0.0) -> None:
        if not isfinite(before):
            raise ConfigError(f"dynamic_transition needs a finite scale before the transition, given before={before}")
        self.before = before

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        curve: list[Tensor] = []
        switched = torch.zeros(len(batch.prompts), dtype=torch.bool, device=batch.latents.device)

        def rule(step: Step) -> Tensor:
            nonlocal curve, switched
            if step.number == 0:
                curve, switched = [], torch.zeros_like(switched)
            curve.append(step.magnitude)
            if len(curve) > 2:
                switched = switched | ((curve[-1] > curve[-2]) & (curve[-3] > curve[-2]))
            return step.guided(torch.where(switched, step.scale, self.before))

        yield replace(batch, rule=rule)
