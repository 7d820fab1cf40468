"""No mitigation: the model as it is, the baseline of all comparisons."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, Diffusion
from nemo_bench.methods.base import Batch, Method


class NoMitigation(Method):
    """Generates with nothing changed."""

    title = "No mitigation"
    families = frozenset(FAMILIES)
    summary = "the model as it is"
    touches = "nothing"
    sourcing = "a control"
    auditable = True

    @override
    def apply(self, model: Diffusion, batch: Batch) -> AbstractContextManager[Batch]:
        return nullcontext(batch)
