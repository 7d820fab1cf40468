from __future__ import annotations

from nemo_bench.records.io import batched


def test_batches_cover_all_items_in_order() -> None:
    assert [[*part] for part in batched(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert not [*batched([], 2)]
