"""What a metric is: a torchmetrics Metric that says which fields it needs, in which space, and which way is better."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from nemo_bench.metrics.spaces import ImageSpace, Pixels

Family = Literal["memorization", "change", "alignment", "diversity", "quality", "localization"]
Per = Literal["image", "prompt", "set"]

FIELDS = frozenset({"images", "references", "pool", "unmitigated", "text", "localization", "real"})
"""What a metric can ask for; see :class:`BenchMetric`."""
_NUMBERS = itertools.count()


class BenchMetric(Metric):
    """Mean over samples of a score; the scores themselves go into the records.

    The fields of a prompt are pictures as the metric's ``space`` sees them, (N, 3, H, W) in [0, 1] for pixels and
    (N, D) for networks: ``images``, the S generated ones; ``references``, the prompt's training images; ``pool``,
    those of all prompts; ``unmitigated``, the S images of the same seeds without mitigation. ``text`` is the original
    prompt in the space, (D,); ``localization`` the prompt's localization record. A metric of a whole set of images has
    ``images`` of all its prompts and ``real``, the pictures it is compared with. No field is there without pictures.

    Args:
        space: What the metric looks at.
        options: Those of torchmetrics.

    Attributes:
        title: Name in tables.
        description: One sentence with protocol.
        citation: Where it comes from.
        family: What it tells something about.
        per: Whether a score belongs to an image, to a prompt or to a whole set of images.
        needs: Fields that :meth:`score` takes; where one is missing the metric has no value.
        higher_is_better: True, False, or None where neither way is better.
        lower: Lowest possible score, or None.
        upper: Highest possible score, or None.
    """

    title: str
    description: str
    citation: str = ""
    family: ClassVar[Family]
    per: ClassVar[Per] = "image"
    needs: ClassVar[frozenset[str]]
    lower: float | None = None
    upper: float | None = None
    higher_is_better: bool | None = None
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, space: ImageSpace | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.space = space or Pixels()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add_state(self, name: str, default: Any, *args: Any, **options: Any) -> None:
        """Adds a state; before the first, one that no other metric shares.

        A collection takes metrics for the same one, for good, where their states are equal after the first batch.
        """
        if not self._defaults:
            number = next(_NUMBERS)
            bits = torch.tensor([number >> bit & 1 for bit in range(32)])
            super().add_state("identity", bits, dist_reduce_fx="max")
        super().add_state(name, default, *args, **options)

    def check(self) -> None:
        """Makes sure that nothing is missing, before anything loads.

        Raises:
            NemoBenchError: Weights, pictures or a library are missing; the message says how to get them.
        """
        self.space.check()

    def fingerprint(self) -> Mapping[str, Any]:
        """What stands in the place of arguments that are paths or spaces, where it is asked what decides scores."""
        return {"space": self.space.fingerprint()}

    def describe(self) -> dict[str, Any]:
        """What a reader of scores must know of the metric; ``measure`` is its class."""
        fields = ("title", "description", "citation", "higher_is_better", "lower", "upper", "family", "per")
        return {"measure": type(self).__name__, **{field: getattr(self, field) for field in fields}}

    @abstractmethod
    def score(self, **fields: Any) -> Tensor:
        """Scores one prompt, or one set of images.

        Args:
            fields: Those named in :attr:`needs`.

        Returns:
            (S,) values for S images, or (1,) for the prompt or set; empty where the fields allow no value.
        """

    def update(self, **fields: Any) -> None:
        """Takes in one prompt: any fields, of which those in :attr:`needs` are used; without them nothing changes."""
        if not self.needs <= fields.keys():
            return
        values = self.score(**{field: fields[field] for field in self.needs})
        self.total += values.double().sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """Mean over all samples; nan before the first."""
        return self.total / self.count
