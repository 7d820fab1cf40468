"""Batches that processes take as they get free."""

from __future__ import annotations

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from nemo_bench.prompts.data import Counters, PromptDataModule, SharedBatches


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=4), max_size=9), st.data())
def test_every_batch_goes_to_one_process_in_any_order_of_their_asking(
    batches: list[list[int]], data: st.DataObject
) -> None:
    counters = Counters()
    processes = [
        iter(SharedBatches(batches, lambda: counters.add("stage", 1))) for _ in range(data.draw(st.integers(1, 4)))
    ]
    taken = []
    while processes:
        number = data.draw(st.integers(0, len(processes) - 1))
        try:
            taken.append(next(processes[number]))
        except StopIteration:
            del processes[number]
    assert taken == batches


def test_batches_are_read_ahead_by_workers_in_their_order() -> None:
    numbers = count(1)
    data = PromptDataModule(SharedBatches([[1, 2], [3], [4, 5]], lambda: next(numbers), read=sum, workers=2))
    assert list(data.predict_dataloader()) == [3, 3, 9]
    assert len(data.predict_dataloader()) == 3


def test_batches_that_another_run_has_done_meanwhile_are_left_out_and_counted() -> None:
    numbers = count(1)
    done: set[int] = set()
    skipped: list[int] = []
    shared = SharedBatches(
        [[1], [2, 3], [4]], lambda: next(numbers), is_pending=lambda batch: batch[0] not in done, skip=skipped.append
    )
    batches = iter(shared)
    assert next(batches) == [1]
    done.add(2)
    assert list(batches) == [[4]]
    assert skipped == [2]


def test_counters_begin_with_zero_and_are_told_apart_by_name() -> None:
    counters = Counters()
    assert [counters.add("a", 2), counters.add("b", 1), counters.add("a", 3)] == [2, 1, 5]
