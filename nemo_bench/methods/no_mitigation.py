"""No mitigation: the model as it is, against which everything is measured."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from nemo_bench.diffusion import Diffusion
from nemo_bench.methods.base import Batch, Method


class NoMitigation(Method):
    """Generates with nothing changed."""

    title = "No mitigation"
    summary = "the model as it is"
    touches = "nothing"
    sourcing = "a control"
    auditable = True

    def apply(self, model: Diffusion, batch: Batch) -> AbstractContextManager[Batch]:
        """See :meth:`Method.apply`."""
        return nullcontext(batch)
