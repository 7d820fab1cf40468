"""Gradient descent on embeddings and starting noise, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from nemo_bench.errors import ModelError

Loss = Callable[[Sequence[int], Tensor], Tensor]
"""Losses of some rows, given their numbers and values (rows, ...): (rows, alternatives)."""


@dataclass(frozen=True)
class Descent:
    """Where a descent ended.

    Attributes:
        values: The rows, float32, (N, ...), each as it was when it reached the target, or after its last step.
        losses: Their losses when last looked at, before that step, (N, alternatives).
        steps: Steps that each row took.
        reached: Whether each row reached the target.
    """

    values: Tensor
    losses: Tensor
    steps: tuple[int, ...]
    reached: tuple[bool, ...]


def descend(
    start: Tensor, loss: Loss, *, target: float, steps: int, rate: float, optimizer: type[Optimizer] = AdamW
) -> Descent:
    """Follows the gradient of each row's losses until one of them is at most the target.

    Rows have nothing to do with one another: each is a parameter of its own in float32, and is left alone once it is
    there. The target is looked at before a step, so that a row that starts there stays as it is, and what the last step
    reaches is not looked at, as in the public scripts of Wen et al. (2024), Jeon et al. (2025) and Han et al. (2025).

    Args:
        start: Rows to start from, (N, ...); works in inference mode as well.
        loss: Losses of rows that are not there yet; the gradient is that of their sum.
        target: At most so much is enough.
        steps: Steps at most.
        rate: Learning rate.
        optimizer: With torch's defaults in all else.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [row.detach().clone().float().requires_grad_() for row in start]
        optimize = optimizer(leaves, lr=rate)  # type: ignore[call-arg] # every optimizer has a rate
        taken, last, open_rows = [0] * len(leaves), [Tensor()] * len(leaves), list(range(len(leaves)))
        for _ in range(steps):
            losses = loss(open_rows, torch.stack([leaves[row] for row in open_rows]))
            for row, value in zip(open_rows, losses.detach(), strict=True):
                last[row] = value
            above = (~(losses.detach().amin(1) <= target)).tolist()  # not a number is not there
            open_rows = [row for row, still in zip(open_rows, above, strict=True) if still]
            if not open_rows:
                break
            # Rows without a gradient are passed over by the optimizer.
            optimize.zero_grad()
            gradients = torch.autograd.grad(losses[above].sum(), [leaves[row] for row in open_rows])
            for row, gradient in zip(open_rows, gradients, strict=True):
                leaves[row].grad = gradient
                taken[row] += 1
            optimize.step()
        reached = tuple(row not in open_rows for row in range(len(leaves)))
        return Descent(torch.stack(leaves).detach(), torch.stack(last), tuple(taken), reached)


def check_precision(title: str, dtype: str | torch.dtype) -> None:
    """Raises ModelError where gradients would vanish in half precision.

    Args:
        title: What follows them.
        dtype: The model's, such as ``"float16"``.
    """
    if str(dtype).removeprefix("torch.") == "float16":
        raise ModelError(
            f"{title} follows gradients, which vanish in float16; generate with model.dtype=bfloat16 or float32"
        )
