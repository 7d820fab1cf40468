"""Numbers of a table: by hand, and what has to hold of any scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.aggregate import aggregate, bootstrap_interval
from nemo_bench.types import Kind, Prompt, Record

SCORES = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5)


def line(prompt: str, **scores: float) -> Record:
    return {"prompt": prompt, "scores": scores}


def test_mean_median_and_deviation_by_hand() -> None:
    prompts = [Prompt(i, "", "VM") for i in "abc"]
    records = [line("a", s=0.0), line("b", s=3.0), line("b", s=5.0), line("b", s=13.0), line("c", s=2.0)]
    row = aggregate(records, prompts)["VM"]["s"]
    # Means 0, 7, 2 and medians 0, 5, 2, of which the deviations from 2 are 2, 3, 0.
    assert row["mean"] == 3
    assert row["median"] == 2
    assert row["mad"] == 2
    assert row["prompts"] == 3
    assert set(row) == {"mean", "low", "high", "median", "mad", "prompts"}


def test_a_prompt_counts_once_however_many_images_it_has() -> None:
    prompts = [Prompt("many", ""), Prompt("one", "")]
    row = aggregate([line("many", s=1.0)] * 99 + [line("one", s=0.0)], prompts)["all"]["s"]
    assert row["mean"] == row["median"] == 0.5
    assert row["prompts"] == 2


def test_groups_are_by_kind_and_all() -> None:
    kinds: dict[str, Kind | None] = {"v": "VM", "w": "VM", "t": "TM", "g": None, "unscored": None}
    prompts = [Prompt(i, "", kind) for i, kind in kinds.items()]
    records = [line("v", s=1.0), line("w", s=3.0), line("t", s=5.0), line("g", s=7.0), line("stranger", s=99.0)]
    table = aggregate(records, prompts)
    assert {group: (row["s"]["mean"], row["s"]["prompts"]) for group, row in table.items()} == {
        "VM": (2, 2),
        "TM": (5, 1),
        "general": (7, 1),
        "all": (4, 4),
    }
    assert list(table) == ["VM", "TM", "general", "all"]
    assert set(aggregate(records[2:3], prompts)) == {"TM", "all"}


def test_a_metric_is_missing_where_no_prompt_has_it() -> None:
    prompts = [Prompt("v", "", "VM"), Prompt("g", "")]
    table = aggregate([line("v", ssim=0.5, align=0.1), line("g", align=0.3), line("g")], prompts)
    assert {group: set(row) for group, row in table.items()} == {
        "VM": {"ssim", "align"},
        "general": {"align"},
        "all": {"ssim", "align"},
    }
    assert table["all"]["ssim"]["prompts"] == 1
    assert aggregate([], prompts) == {}


def test_the_interval_of_many_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)
    narrow = bootstrap_interval(values, 0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_interval_is_over_prompts_and_not_images() -> None:
    prompts = [Prompt(str(i), "") for i in range(10)]
    once = [line(p.id, s=float(int(p.id) % 2)) for p in prompts]
    assert aggregate(once * 20, prompts) == aggregate(once, prompts)


@given(SCORES.filter(lambda values: len(set(values)) > 1))
def test_the_interval_shrinks_with_prompts(values: list[float]) -> None:
    widths = [np.ptp(bootstrap_interval(np.array(values * times))) for times in (1, 16)]
    assert widths[1] < widths[0] / 2


@given(SCORES)
def test_the_interval_contains_the_mean_and_is_always_the_same(values: list[float]) -> None:
    array = np.array(values, np.float64)
    low, high = bootstrap_interval(array)
    assert min(values) - 1e-12 <= low <= array.mean() + 1e-12
    assert array.mean() - 1e-12 <= high <= max(values) + 1e-12
    assert bootstrap_interval(array.copy()) == (low, high)


@given(st.lists(st.tuples(st.sampled_from(["VM", "TM", None]), SCORES), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_any_scores_are_summed_up(drawn: list[tuple[Kind | None, list[float]]]) -> None:
    prompts = [Prompt(f"p{number}", "", kind) for number, (kind, _) in enumerate(drawn)]
    records = [line(p.id, s=v) for p, (_, values) in zip(prompts, drawn, strict=True) for v in values]
    table = aggregate(iter(records), prompts)
    assert sum(row["s"]["prompts"] for group, row in table.items() if group != "all") == len(prompts)
    for group, row in table.items():
        members = [values for kind, values in drawn if group in ("all", kind or "general")]
        means, medians = [np.mean(v) for v in members], [np.median(v) for v in members]
        found = row["s"]
        assert found["prompts"] == len(members)
        assert found["mean"] == pytest.approx(np.mean(means), abs=1e-12)
        assert found["median"] == pytest.approx(np.median(medians), abs=1e-12)
        assert found["mad"] == pytest.approx(np.median(np.abs(np.array(medians) - np.median(medians))), abs=1e-12)
        assert found["low"] - 1e-12 <= found["mean"] <= found["high"] + 1e-12
        assert min(means) - 1e-12 <= found["low"]
        assert found["high"] <= max(means) + 1e-12
