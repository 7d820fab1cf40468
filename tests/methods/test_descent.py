from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, Adam, AdamW

from nemo_bench import ModelError
from nemo_bench.methods.descent import check_precision, descend


def squares(rows: object, values: torch.Tensor) -> torch.Tensor:
    return values.square().sum(1, keepdim=True)


def test_steps_end_at_the_target() -> None:
    # Each step of 0.25 along the gradient 2x halves x: the squares fall by four, 16, 4, 1, 0.25.
    end = descend(torch.tensor([[4.0], [1.0], [0.5]]), squares, target=1.0, steps=3, rate=0.25, optimizer=SGD)
    torch.testing.assert_close(end.values, torch.tensor([[1.0], [1.0], [0.5]]))
    assert end.steps == (2, 0, 0)
    assert end.reached == (True, True, True)
    torch.testing.assert_close(end.losses, torch.tensor([[1.0], [1.0], [0.25]]))


def test_result_of_the_last_step_is_not_compared() -> None:
    end = descend(torch.tensor([[4.0]]), squares, target=1.0, steps=2, rate=0.25, optimizer=SGD)
    assert (end.values.tolist(), end.steps, end.reached) == ([[1.0]], (2,), (False,))


def test_one_of_several_alternatives_is_enough() -> None:
    def each(rows: object, values: torch.Tensor) -> torch.Tensor:
        return values.square()

    end = descend(torch.tensor([[4.0, 2.0], [4.0, 4.0]]), each, target=1.0, steps=9, rate=0.25, optimizer=SGD)
    torch.testing.assert_close(end.values, torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    assert end.steps == (1, 2)


@pytest.mark.parametrize("optimizer", [AdamW, Adam])
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_rows_take_the_steps_of_torch_alone(optimizer: type[AdamW], start: list[float]) -> None:
    end = descend(torch.tensor(start)[:, None], squares, target=0.3, steps=7, rate=0.1, optimizer=optimizer)
    for row, value in enumerate(start):
        leaf = torch.tensor([value], requires_grad=True)
        optimize = optimizer([leaf], lr=0.1)
        for _ in range(7):
            loss = leaf.square().sum()
            if loss <= 0.3:
                break
            optimize.zero_grad()
            loss.backward()
            optimize.step()
        assert torch.equal(end.values[row], leaf.detach())


def test_descent_in_inference_mode_has_single_precision() -> None:
    with torch.inference_mode():
        end = descend(torch.ones(2, 1).bfloat16(), squares, target=0.5, steps=9, rate=0.001)
    assert end.values.dtype == torch.float32
    assert 0.99 < float(end.values[0]) < 1  # steps that bfloat16 would round away


def test_no_steps_change_nothing() -> None:
    start = torch.randn(2, 3)
    assert torch.equal(descend(start, squares, target=0.0, steps=0, rate=0.1).values, start)


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_half_precision_is_an_error(dtype: str | torch.dtype) -> None:
    for other in ("bfloat16", torch.float32):
        check_precision("SAIL", other)
    with pytest.raises(ModelError, match="SAIL follows gradients, which vanish in float16; generate with"):
        check_precision("SAIL", dtype)


def test_nan_does_not_reach_the_target() -> None:
    end = descend(torch.ones(1, 1), lambda rows, values: values * torch.nan, target=1.0, steps=2, rate=0.1)
    assert end.reached == (False,)
