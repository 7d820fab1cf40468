"""Gradient descent on embeddings and starting noise, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from nemo_bench.errors import ModelError

Loss = Callable[[Sequence[int], Tensor], Tensor]
"""Losses of n rows, given their numbers and values (n, ...): (n, alternatives)."""


@dataclass(frozen=True)
class Descent:
    """The end of a descent."""

    values: Tensor  #: The rows, float32, (N, ...), each when it reached the target, or after its last step.
    losses: Tensor  #: Their last losses, before the last step, (N, alternatives).
    steps: tuple[int, ...]  #: Number of steps of each row.
    reached: tuple[bool, ...]  #: Whether each row reached the target.

    @property
    def notes(self) -> tuple[dict[str, Any], ...]:
        """Steps and success of each row, for records."""
        return tuple({"steps": n, "reached": there} for n, there in zip(self.steps, self.reached, strict=True))


def descend(
    start: Tensor, loss: Loss, *, target: float, steps: int, rate: float, optimizer: type[Optimizer] = AdamW
) -> Descent:
    """Follows the gradient of each row's losses until one of them is at most the target.

    Rows are independent: each is a parameter of its own in float32, and stops once it reaches the target. The loss is
    compared before a step, so that a row that starts at the target stays as it is, and the result of the last step is
    not compared, as in the public scripts of Wen et al. (2024), Jeon et al. (2025) and Han et al. (2025).

    Args:
        start: Rows to start from, (N, ...); may come from inference mode.
        loss: Losses of rows that have not reached the target; the gradient is that of their sum.
        target: Largest loss that suffices.
        steps: Steps at most.
        rate: Learning rate.
        optimizer: Takes torch's defaults in all else.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [row.detach().clone().float().requires_grad_() for row in start]
        optimize = optimizer(leaves, lr=rate)  # type: ignore[call-arg] # every optimizer has a rate
        taken = [0] * len(leaves)
        last = [Tensor()] * len(leaves)
        moving = list(range(len(leaves)))
        for _ in range(steps):
            losses = loss(moving, torch.stack([leaves[row] for row in moving]))
            for row, value in zip(moving, losses.detach(), strict=True):
                last[row] = value
            above = (~(losses.detach().amin(1) <= target)).tolist()  # true for nan as well
            moving = [row for row, is_above in zip(moving, above, strict=True) if is_above]
            if not moving:
                break
            optimize.zero_grad()  # the optimizer skips rows without a gradient
            gradients = torch.autograd.grad(losses[above].sum(), [leaves[row] for row in moving])
            for row, gradient in zip(moving, gradients, strict=True):
                leaves[row].grad = gradient
                taken[row] += 1
            optimize.step()
        reached = tuple(row not in moving for row in range(len(leaves)))
        return Descent(torch.stack(leaves).detach(), torch.stack(last), tuple(taken), reached)


def check_precision(title: str, dtype: str | torch.dtype) -> None:
    """Raises ModelError for float16, in which gradients vanish.

    Args:
        title: Name of the method that follows gradients.
        dtype: The model's, such as ``"float16"``.
    """
    if str(dtype).removeprefix("torch.") == "float16":
        raise ModelError(
            f"{title} follows gradients, which vanish in float16; generate with model.dtype=bfloat16 or float32"
        )
