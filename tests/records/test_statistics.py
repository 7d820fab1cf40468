"""Numbers of a table: by hand, and what has to hold of any scores."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plain_statistics as plain
from nemo_bench.records import statistics
from nemo_bench.records.data import Kind, Prompt
from nemo_bench.records.schema import MetricInfo, Paired, ScoreRecord
from nemo_bench.records.statistics import (
    RESAMPLES,
    TOGETHER,
    aggregate,
    bootstrap_interval,
    bootstrap_intervals,
    gap_closed,
    holm,
    paired,
    paired_tests,
    presets,
)

SCORES = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5)


def line(prompt: str, **scores: float) -> ScoreRecord:
    return seeded(prompt, None, **scores)


def seeded(prompt: str, seed: int | None, **scores: float) -> ScoreRecord:
    return ScoreRecord(id=f"{prompt} {seed}", prompt=prompt, seed=seed, scores=scores)


def test_mean_median_and_deviation_by_hand() -> None:
    prompts = [Prompt(i, "", "VM") for i in "abc"]
    records = [line("a", s=0.0), line("b", s=3.0), line("b", s=5.0), line("b", s=13.0), line("c", s=2.0)]
    row = aggregate(records, prompts)["VM"]["s"]
    # Means 0, 7, 2 and medians 0, 5, 2, of which the deviations from 2 are 2, 3, 0.
    assert row.mean == 3
    assert row.median == 2
    assert row.mad == 2
    assert row.prompts == 3
    assert set(row.model_dump(exclude_none=True)) == {"mean", "low", "high", "median", "mad", "prompts"}


def test_a_prompt_counts_once_however_many_images_it_has() -> None:
    prompts = [Prompt("many", ""), Prompt("one", "")]
    row = aggregate([line("many", s=1.0)] * 99 + [line("one", s=0.0)], prompts)["all"]["s"]
    assert row.mean == row.median == 0.5
    assert row.prompts == 2


def test_groups_are_by_kind_and_all() -> None:
    kinds: dict[str, Kind | None] = {"v": "VM", "w": "VM", "t": "TM", "g": None, "unscored": None}
    prompts = [Prompt(i, "", kind) for i, kind in kinds.items()]
    records = [line("v", s=1.0), line("w", s=3.0), line("t", s=5.0), line("g", s=7.0), line("stranger", s=99.0)]
    table = aggregate(records, prompts)
    assert {group: (row["s"].mean, row["s"].prompts) for group, row in table.items()} == {
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
    assert table["all"]["ssim"].prompts == 1
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
    assert sum(row["s"].prompts for group, row in table.items() if group != "all") == len(prompts)
    for group, row in table.items():
        members = [values for kind, values in drawn if group in ("all", kind or "general")]
        means, medians = [np.mean(v) for v in members], [np.median(v) for v in members]
        found = row["s"]
        assert found.prompts == len(members)
        assert found.mean == pytest.approx(np.mean(means), abs=1e-12)
        assert found.median == pytest.approx(np.median(medians), abs=1e-12)
        assert found.mad == pytest.approx(np.median(np.abs(np.array(medians) - np.median(medians))), abs=1e-12)
        assert found.low - 1e-12 <= found.mean <= found.high + 1e-12
        assert min(means) - 1e-12 <= found.low
        assert found.high <= max(means) + 1e-12


def test_pairs_are_of_the_same_prompt_and_seed() -> None:
    prompts = [Prompt("a", "", "VM"), Prompt("b", "", "VM"), Prompt("alone", "", "VM")]
    none = [seeded("a", 0, s=1.0), seeded("a", 1, s=5.0), seeded("b", 0, s=2.0), seeded("a", None, d=3.0)]
    ours = [
        seeded("a", 1, s=4.0),
        seeded("a", 0, s=2.0),
        seeded("b", 0, s=0.0),
        seeded("b", 7, s=99.0),
        seeded("alone", 0, s=9.0),
        seeded("a", None, d=2.0, other=1.0),
    ]
    row = aggregate(ours, prompts, none)["VM"]
    # Prompt a: +1 and -1, mean 0; prompt b: -2.
    change = row["s"].paired
    assert change is not None
    assert change.difference == -1
    assert change.prompts == 2
    assert row["d"].paired == Paired(difference=-1, low=-1, high=-1, p=1, prompts=1)
    assert row["other"].paired is None
    assert aggregate(ours, prompts)["VM"]["s"].paired is None


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
def test_the_permutation_test_counts_sign_patterns(values: list[int]) -> None:
    found = paired(np.array(values, np.float64))
    patterns = [
        sum(s * v for s, v in zip(signs, values, strict=True)) for signs in product((1, -1), repeat=len(values))
    ]
    assert found.p == np.mean([abs(total) >= abs(sum(values)) for total in patterns])
    assert found.difference == pytest.approx(np.mean(values))
    assert found.low - 1e-9 <= found.difference <= found.high + 1e-9


def test_many_sign_patterns_are_drawn() -> None:
    numbers = np.random.default_rng(0)
    nothing, something = numbers.normal(0, 1, 60), numbers.normal(0.5, 1, 60)
    assert paired(nothing).p > 0.05
    assert 1 / 10001 <= paired(something).p < 0.01
    # A normal approximation of the same test.
    z = abs(nothing.sum()) / np.sqrt((nothing**2).sum())
    assert paired(nothing).p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    assert paired(nothing) == paired(nothing.copy())
    assert paired(np.full(60, 0.1)).p == 1 / 10001
    assert paired(np.zeros(60)).p == 1


def similarity(measure: str = "TrainingImage", family: str = "memorization", *, is_higher: bool = False) -> MetricInfo:
    return MetricInfo(title=measure, measure=measure, family=family, per="image", higher_is_better=is_higher)


METRICS = {
    "sscd": similarity(),
    "far": similarity(is_higher=True),
    "rate": similarity("MemorizationRate"),
    "nearest": similarity("NearestTrainingImage"),
    "clip": similarity("Alignment", "alignment"),
    "change": similarity("Change", "change"),
    "neurons": MetricInfo(title="Neurons", measure="NeuronCount", family="localization", per="prompt"),
}


def preset_records() -> list[ScoreRecord]:
    images = {"a": [0.9, 0.8, 0.1, 0.4], "b": [0.6, 0.2], "c": [0.3, 0.3]}
    lines = [
        seeded(prompt, seed, sscd=value, far=-value, rate=value > 0.5, nearest=value, clip=value / 2, change=1 - value)
        for prompt, values in images.items()
        for seed, value in enumerate(values)
    ]
    return [*lines, *(seeded(prompt, None, neurons=number) for number, prompt in enumerate(images))]


PRESET_PROMPTS = [Prompt("a", "", "VM"), Prompt("b", "", "VM"), Prompt("c", "", "TM")]


def test_the_presets_by_hand() -> None:
    found = presets(preset_records(), PRESET_PROMPTS, METRICS)
    assert list(found) == ["nemo", "membench", "wen"]
    for preset in found.values():
        assert all(preset.model_dump().values())
        entries = [entry for row in preset.rows.values() for entry in row.values()]
        assert all(entry.low - 1e-12 <= entry.value <= entry.high + 1e-12 for entry in entries)
    # Medians over images 0.6 and 0.4, of which the median is 0.5 and either is 0.1 away.
    nemo = found["nemo"].rows
    assert set(nemo) == {"VM", "TM"}
    assert set(nemo["VM"]) == {"sscd", "far", "clip", "change", "neurons"}
    assert (nemo["VM"]["sscd"].value, nemo["VM"]["sscd"].spread) == pytest.approx((0.5, 0.1))
    assert nemo["VM"]["neurons"].value == 0.5
    membench = found["membench"].rows
    assert {key: round(entry.value, 6) for key, entry in membench["VM"].items()} == {
        "sscd, max": 0.75,  # 0.9 and 0.6
        "sscd, top 3": 0.55,  # 0.7 and 0.4
        "sscd, above 0.5": 0.5,  # both a half
    }
    assert membench["all"]["sscd, above 0.5"].value == pytest.approx(1 / 3)
    wen = found["wen"].rows
    assert set(wen["VM"]) == {"sscd", "far", "clip"}
    means = wen["VM"]["sscd"]
    assert (means.value, means.spread, means.prompts) == (pytest.approx(0.475), None, 2)


def test_a_preset_without_its_metrics_is_left_out() -> None:
    lines = [record for record in preset_records() if record.seed is None]
    assert list(presets(lines, PRESET_PROMPTS, METRICS)) == ["nemo"]
    assert presets([], PRESET_PROMPTS, METRICS) == {}


def test_the_interval_of_a_median_is_over_prompts() -> None:
    values = np.random.default_rng(2).normal(3, 2, 400)
    low, high = bootstrap_interval(values, of_median=True)
    error = 1.96 * 1.2533 * values.std() / 20
    assert (low, high) == pytest.approx((np.median(values) - error, np.median(values) + error), abs=0.1)


def test_holm_agrees_with_a_case_worked_out_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


UNEVEN = st.lists(
    st.tuples(st.sampled_from(["VM", "TM", None]), st.lists(st.floats(-3, 3), min_size=1, max_size=12)),
    min_size=1,
    max_size=40,
)


@given(UNEVEN, st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_shared_draws_give_the_tables_of_the_plain_way(drawn: list[tuple[Kind | None, list[float]]], seed: int) -> None:
    random = np.random.default_rng(seed)
    prompts = [Prompt(f"p{number}", "", kind) for number, (kind, _) in enumerate(drawn)]
    lines, others = [], []
    for prompt, (_, values) in zip(prompts, drawn, strict=True):
        for number, value in enumerate(values):
            other = seeded(prompt.id, number, sscd=float(random.normal()), clip=0.25)
            # Some metrics have values of some images or prompts only.
            scores = {"sscd": value, "clip": value / 3} if random.random() < 0.8 else {"sscd": value}
            lines.append(seeded(prompt.id, number, **scores))
            others += [other] if random.random() < 0.8 else []
        lines.append(seeded(prompt.id, None, neurons=len(values)))
    assert aggregate(lines, prompts, others) == plain.aggregate(lines, prompts, others)
    aligned = ["clip"] if any("clip" in record.scores for record in lines) else []
    found = presets(lines, prompts, METRICS)
    assert {name: preset.rows for name, preset in found.items()} == plain.presets(lines, prompts, ["sscd"], aligned)


def test_many_prompts_are_drawn_in_parts() -> None:
    values = np.random.default_rng(3).normal(size=1500)
    columns = {"a": values, "few": values[:800], "whole": values.round()}
    assert TOGETHER // RESAMPLES < 800
    assert bootstrap_intervals(columns) == {key: plain.interval(column) for key, column in columns.items()}
    medians = bootstrap_intervals(columns, of_median=True)
    assert medians == {key: plain.interval(column, np.median) for key, column in columns.items()}
    assert paired_tests(columns) == {key: plain.test_of(column) for key, column in columns.items()}


def test_medians_far_from_the_middle_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=301)
    expected = bootstrap_interval(values, of_median=True)
    monkeypatch.setattr(statistics, "DEVIATIONS", 0)
    assert bootstrap_interval(values, of_median=True) == expected


def test_the_gap_that_is_closed_by_hand() -> None:
    on, off = {"a": 0.1, "b": 0.3}, {"a": 0.2, "b": 0.6, "c": 9.0}
    closed = gap_closed(on, off, {"x": 0.5, "y": 0.7})
    assert closed
    assert closed.mean == pytest.approx((0.4 - 0.2) / (0.6 - 0.2))
    assert closed.prompts == 2
    assert closed.low is not None
    assert closed.high is not None
    assert closed.low <= closed.mean <= closed.high
    # Of the same prompts only those count that all have.
    same = gap_closed(on, off, {"a": 0.3, "b": 0.5, "c": 4.0})
    assert same
    assert same.mean == pytest.approx(1.0)
    # By prompt (0.2 - 0.1) / 0.2 and (0.6 - 0.3) / 0.2: resamples of one prompt alone are the ends.
    assert (same.low, same.high) == pytest.approx((0.5, 1.5))


def test_where_there_is_no_gap_no_part_of_it_is_closed() -> None:
    on = {"a": 0.4, "b": 0.6}
    assert gap_closed(on, on, {"x": 0.5, "y": 0.5}) is None
    assert gap_closed(on, {}, {"x": 0.9}) is None
    assert gap_closed(on, on, {}) is None
    unclear = gap_closed(on, on, {"x": 0.55, "y": 0.56})
    assert unclear
    assert (unclear.mean, unclear.low, unclear.high) == (0, None, None)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 1)), min_size=1, max_size=6))
def test_a_gap_is_closed_from_one_end_to_the_other(drawn: list[tuple[float, float]]) -> None:
    on = {str(i): low for i, (low, _) in enumerate(drawn)}
    held_out = {str(i): low + gap for i, (low, gap) in enumerate(drawn)}
    for off, expected in ((on, 0.0), (held_out, 1.0)):
        closed = gap_closed(on, off, held_out)
        assert closed
        assert (closed.mean, closed.low, closed.high) == pytest.approx((expected, expected, expected))
