"""Any metric of the package as a torchmetrics ``Metric``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.wrappers.abstract import WrapperMetric
from typing_extensions import override

from nemo_bench.metrics.base import BenchMetric


class MeanScore(WrapperMetric):
    """Mean of a metric's scores over all samples, nan before the first one.

    The fields of the metric are arguments of ``update``, by name; other arguments are ignored, and an update that lacks
    a field changes nothing.

    Example:
        >>> import torch
        >>> from nemo_bench.metrics import SSIM, TrainingImage
        >>> mean = MeanScore(TrainingImage(SSIM()))
        >>> images = torch.rand(2, 3, 16, 16)
        >>> mean.update(images=images, references=images)
        >>> round(mean.compute().item(), 4)
        1.0
    """

    # The sum is the state of a MeanMetric inside. A MetricCollection merges metrics whose own states are equal after
    # the first batch; this one has none, so it is never merged with another.

    def __init__(self, metric: BenchMetric) -> None:
        super().__init__()
        self.metric = metric
        self.mean = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)

    def _scores(self, fields: dict[str, Any]) -> Tensor:
        if not self.metric.needs <= fields.keys():
            return torch.empty(0)
        return self.metric.score(**{field: fields[field] for field in self.metric.needs})

    @override
    def update(self, **fields: Any) -> None:
        self.mean.update(self._scores(fields))

    @override
    def compute(self) -> Tensor:
        return self.mean.compute()

    @override
    def forward(self, **fields: Any) -> Tensor:
        return self.mean(self._scores(fields))

    @override
    def reset(self) -> None:
        super().reset()
        self.mean.reset()

    @override
    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        self.mean.merge_state(incoming_state.mean if isinstance(incoming_state, MeanScore) else incoming_state)
