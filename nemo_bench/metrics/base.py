"""What a metric is: a torchmetrics Metric that says which fields it needs and which way is better."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


class BenchMetric(Metric):
    """Mean over samples of a score; the scores themselves go into the records.

    The fields of a prompt with S images are ``images`` (S, 3, H, W) and ``references`` (R, 3, H, W) and ``pool``
    (P, 3, H, W), all in [0, 1]; ``embeddings`` (S, D) and ``text_embedding`` (D,), of length one;
    ``localization``, the prompt's localization record.

    Attributes:
        title: Name in tables.
        description: One sentence with protocol.
        citation: Where it comes from.
        needs: Fields that :meth:`score` takes; where one is missing the metric has no value.
        per_image: Whether a score belongs to an image, else to a prompt.
        higher_is_better: True, False, or None where neither way is better.
        lower: Lowest possible score, or None.
        upper: Highest possible score, or None.
    """

    title: ClassVar[str]
    description: ClassVar[str]
    citation: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]]
    per_image: ClassVar[bool] = True
    lower: ClassVar[float | None] = None
    upper: ClassVar[float | None] = None
    higher_is_better: bool | None = None
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def check(self) -> None:
        """Makes sure that nothing is missing, before anything loads.

        Raises:
            NemoBenchError: Weights, pictures or a library are missing; the message says how to get them.
        """

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """What a reader of scores must know of the metric."""
        fields = ("title", "higher_is_better", "lower", "upper", "citation", "description")
        return {field: getattr(cls, field) for field in fields}

    @abstractmethod
    def score(self, **fields: Any) -> Tensor:
        """Scores one prompt.

        Args:
            fields: Those named in :attr:`needs`.

        Returns:
            (S,) values for S images, or (1,) for the prompt; empty where the fields allow no value.
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
