"""Curves of methods from mild to strong, and the settings that are chosen."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_results import write_fake_results
from nemo_bench.records.results import CellResults, Outcome, Results, load_results
from nemo_bench.records.schema import Leaderboard, MetricInfo, Strength, StrengthCurve
from nemo_bench.report import write_report
from nemo_bench.report.strengths import Choice, area, choose, chooses, strengths_of
from nemo_bench.report.tables import leaderboard, strengths_note
from tags import Tags

NAMES = [f"p-{i}" for i in range(40)]
CHOOSING = [name for name in NAMES if chooses(name)][:2]
REPORTED = [name for name in NAMES if not chooses(name)][:2]
RATE = MetricInfo(title="Memorized", role="memorization_rate", family="memorization", higher_is_better=False)
STRENGTH = Strength(setting="scale", values=[1, 2, 4])
PAIR = tuple[float, float]
BEFORE: tuple[PAIR, PAIR] = ((0.9, 0.30), (0.8, 0.40))
"""Memorized share and alignment without mitigation: of the prompts to choose by, and of those that are reported."""
LEAST = 0.20
"""Alignment of its images with the text of other prompts."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A run of five cells: nothing mitigated, a method at three strengths, from strong to mild, and one without any."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "picture.png").write_bytes(b"")
    methods = {"none": "No mitigation", "four": "Noise", "two": "Noise", "one": "Noise", "fix": "Padding fix"}
    prompts = [(name, f"the words of {name}", "VM") for name in (*CHOOSING, *REPORTED)]
    results = load_results(
        write_fake_results(folder / "run", prompts=prompts, methods=methods, pictures=[folder / "picture.png"])  # type: ignore[arg-type]
    )
    scales = {"four": 4, "two": 2, "one": 1}
    cells = []
    for cell in results.cells:
        scale = scales.get(cell.method)
        method = {"_target_": "noise" if scale else cell.method, **({"scale": scale} if scale else {})}
        spec = cell.spec.model_copy(update={"settings": {**cell.spec.settings, "method": method}})
        if scale:
            spec = spec.model_copy(update={"method": "noise"})
        label = f"Noise · scale {scale}" if scale else spec.title
        summary = cell.summary.model_copy(update={"metrics": {"memorized": RATE, **cell.summary.metrics}})
        cells.append(replace(cell, spec=spec, label=label, short=label, summary=summary))
    strengths = {cell.name: STRENGTH for cell in cells if cell.spec.method == "noise"}
    run = results.run.model_copy(update={"strengths": strengths})
    return Results(results.folder, run, tuple(cells), {})


def with_scores(base: Results, numbers: dict[str, tuple[PAIR, PAIR]]) -> Results:
    """The run with scores by method or scale: of each prompt to choose by, and of each that is reported."""

    def outcome(prompt: str, old: Outcome, pairs: tuple[PAIR, PAIR], shuffled: dict[str, float]) -> Outcome:
        share, alignment = pairs[prompt in REPORTED]
        scores = {seed: {"memorized": share, "alignment": alignment} for seed in old.seeds}
        return replace(old, scores=scores, shuffled=shuffled)

    def changed(cell: CellResults) -> CellResults:
        key = str(cell.spec.settings["method"].get("scale", cell.method))
        own, shuffled = numbers.get(key, BEFORE), {"alignment": LEAST} if cell.method == "none" else {}
        return replace(cell, outcomes={name: outcome(name, old, own, shuffled) for name, old in cell.outcomes.items()})

    return replace(base, cells=tuple(map(changed, base.cells)))


def curves_of(results: Results) -> dict[str, StrengthCurve]:
    strengths = strengths_of(results)
    assert strengths is not None
    return {curve.label: curve for curve in strengths.curves}


NUMBERS: dict[str, tuple[PAIR, PAIR]] = {
    "1": ((0.5, 0.29), (0.4, 0.40)),
    "2": ((0.1, 0.27), (0.2, 0.30)),
    "4": ((0.0, 0.20), (0.0, 0.10)),
    "fix": ((0.3, 0.31), (0.4, 0.36)),
}


def test_curves_choice_front_and_area_are_those_computed_by_hand(base: Results) -> None:
    curves = curves_of(with_scores(base, NUMBERS))
    noise = curves["Noise"]
    assert (noise.setting, [point.value for point in noise.points]) == ("scale", [1, 2, 4])
    of_prompts = [(p.choosing_memorized, p.choosing_alignment) for p in noise.points]
    of_others = [(p.memorized and p.memorized.mean, p.alignment and p.alignment.mean) for p in noise.points]
    for key, own, other in zip("124", of_prompts, of_others, strict=True):
        assert (own, other) == (pytest.approx(NUMBERS[key][0]), pytest.approx(NUMBERS[key][1]))
    # The second has the better alignment of the two that memorize at most 10%.
    assert (noise.chosen, noise.is_within) == (noise.points[1].cell, True)
    # Of the share 0.5, 0.25 and 0 is left, of alignment all, half and nothing: 0.40, 0.30 and 0.10 from 0.40 to 0.20.
    assert [p.score for p in noise.points] == pytest.approx([0.5, 0.75 * 0.5, 0.0])
    assert noise.score == pytest.approx(0.375)
    # Strips from the second to the mildest.
    assert noise.area == pytest.approx(0.75 * 0.5 + 0.5 * 0.5)
    fix = curves["Padding fix"]
    assert (fix.setting, [point.value for point in fix.points]) == (None, [None])
    assert (fix.chosen, fix.is_within) == (fix.points[0].cell, False)
    assert fix.area == fix.score == pytest.approx(0.5 * 0.8)
    assert [p.is_on_front for p in (*noise.points, *fix.points)] == [True, True, True, False]
    assert curves["No mitigation"].chosen is None
    assert (noise.choosing_prompts, noise.prompts_reported) == (2, 2)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=4, max_size=4))
def test_nothing_is_chosen_by_what_is_reported(base: Results, reported: list[PAIR]) -> None:
    others = {key: (own, other) for (key, (own, _)), other in zip(NUMBERS.items(), reported, strict=True)}
    expected, found = (curves_of(with_scores(base, numbers)) for numbers in (NUMBERS, others))
    for label, curve in found.items():
        assert (curve.chosen, curve.is_within) == (expected[label].chosen, expected[label].is_within)
        assert [p.choosing_memorized for p in curve.points] == [p.choosing_memorized for p in expected[label].points]


def test_a_setting_with_a_failed_image_is_not_chosen_and_not_on_the_front(base: Results) -> None:
    results = with_scores(base, NUMBERS)

    def failing(prompt: str) -> StrengthCurve:
        def changed(cell: CellResults) -> CellResults:
            if cell.spec.settings["method"].get("scale") != 2:
                return cell
            old = cell.outcomes[prompt]
            first, *others = old.images
            images = {seed: old.images[seed] for seed in others}
            broken = replace(old, images=images, failed={first: "not finite"})
            return replace(cell, outcomes={**cell.outcomes, prompt: broken})

        return curves_of(replace(results, cells=tuple(map(changed, results.cells))))["Noise"]

    to_choose, reported = failing(CHOOSING[0]), failing(REPORTED[0])
    assert to_choose.chosen == to_choose.points[2].cell
    assert to_choose.points[1].choosing_memorized is None
    assert reported.chosen == reported.points[1].cell
    assert (reported.points[1].memorized, reported.points[1].is_on_front) == (None, False)
    assert (reported.points[1].score, reported.score) == (None, None)
    assert reported.area == pytest.approx(0.5)


def test_without_alignment_with_other_prompts_there_is_no_score(base: Results) -> None:
    results = with_scores(base, NUMBERS)
    bare = [
        replace(cell, outcomes={name: replace(old, shuffled={}) for name, old in cell.outcomes.items()})
        for cell in results.cells
    ]
    strengths = strengths_of(replace(results, cells=tuple(bare)))
    assert strengths is not None
    assert {(curve.score, curve.area) for curve in strengths.curves} == {(None, None)}
    assert [c.chosen for c in strengths.curves] == [c.chosen for c in curves_of(results).values()]
    assert "No score and no area" in strengths_note(results, strengths)


def test_best_marks_and_examples_are_of_chosen_settings_on_reported_prompts(base: Results) -> None:
    # The strongest is the best of all by its share, and the padding fix the best on the prompts to choose by.
    numbers = {**NUMBERS, "fix": ((0.11, 0.45), (0.4, 0.36))}
    results = with_scores(base, numbers)
    rows = {row.label: row for row in leaderboard(results) if row.group == "VM"}
    best = {key: [label for label, row in rows.items() if key in row.best] for key in ("memorized", "alignment")}
    assert best == {"memorized": ["Noise · scale 2"], "alignment": ["No mitigation"]}
    section = write_report(results).read_text(encoding="utf-8")
    section = section[section.index('<section id="examples"') :]
    text = Tags(section[: section.index("</section>")]).text
    words = "Noise · scale 2, the best mitigation by Memorized of those at their chosen settings"
    assert words in " ".join(text.split())
    assert all(name in text for name in REPORTED)
    assert not any(f"{name}:" in text for name in CHOOSING)
    without = replace(results, run=results.run.model_copy(update={"strengths": {}}))
    rows = {row.label: row for row in leaderboard(without) if row.group == "VM"}
    assert not any("memorized" in rows[name].best for name in ("Noise · scale 2", "Padding fix"))


def test_other_runs_have_no_strengths(base: Results, page: str) -> None:
    run = base.run.model_copy(update={"strengths": {}})
    assert strengths_of(replace(base, run=run)) is None
    without_rate = [replace(c, summary=c.summary.model_copy(update={"metrics": {}})) for c in base.cells]
    assert strengths_of(replace(base, cells=tuple(without_rate))) is None
    assert 'id="strengths"' not in page


def test_all_files_of_a_report_have_the_chosen_settings(base: Results) -> None:
    results = with_scores(base, NUMBERS)
    page = write_report(results).read_text(encoding="utf-8")
    section = page[page.index('<section id="strengths"') : page.index('<section id="tradeoffs"')]
    words = " ".join(Tags(section).text.split())
    assert "Noisescale 20.1000.2700.3750.200 [0.200, 0.200]0.300 [0.300, 0.300]0.625yes" in words
    assert "Padding fixabove the limit0.3000.3100.4000.400" in words
    assert "at most 10% on the prompts to choose by" in words
    assert "here 2 of them) or is reported (here 2)" in words
    (chosen, every) = re.findall(r"<tbody>.*?</tbody>", section, re.DOTALL)
    assert (chosen.count("<tr>"), every.count("<tr>")) == (3, 5)
    assert "No mitigation–0.9000.3000.0000.800" in words
    assert set(re.findall(r">(Noise|Padding fix|No mitigation)</text>", section)) == {
        "Noise",
        "Padding fix",
        "No mitigation",
    }
    text = (results.folder / "leaderboard.md").read_text()
    assert "## Chosen settings" in text
    assert (
        "| Noise | scale 2 | 0.100 | 0.270 | 0.375 | 0.200 [0.200, 0.200] | 0.300 [0.300, 0.300] | 0.625 | yes |"
        in text
    )
    assert r"Noise & scale 2 & 0.100 & 0.270" in (results.folder / "leaderboard.tex").read_text()
    board = Leaderboard.model_validate_json((results.folder / "leaderboard.json").read_text())
    assert board.strengths == strengths_of(results)
    assert json.loads((results.folder / "leaderboard.json").read_text())["strengths"]["limit"] == 0.1
    with (results.folder / "leaderboard.csv").open(encoding="utf-8") as file:
        rows = {row["cell"]: row for row in csv.DictReader(file) if row["group"] == "VM"}
    assert [row["strength_value"] for row in rows.values()] == ["", "4", "2", "1", ""]
    assert [row["strength_chosen"] for row in rows.values()] == ["False", "False", "True", "False", "True"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([(0.8, 0.9), (0.1, 0.5), (0.05, 0.6), (0.0, 0.1)], Choice(2, is_within=True)),
        ([(0.8, 0.9), (0.3, 0.1), (0.2, 0.0)], Choice(2, is_within=False)),  # none within: the least share
        ([(0.1, 0.5), (0.0, 0.5), (0.0, 0.5)], Choice(1, is_within=True)),  # ties: the least share, then the milder
        ([(0.3, 0.1), (0.3, 0.2), (0.3, 0.2)], Choice(1, is_within=False)),
        ([None, (0.5, 0.1)], Choice(1, is_within=False)),
        ([None, None], None),
    ],
)
def test_the_rule_chooses_the_setting_that_it_says(settings: list[PAIR | None], expected: Choice | None) -> None:
    assert choose(settings) == expected


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6))
def test_the_area_is_the_part_of_the_square_that_is_bettered(points: list[tuple[int, int]]) -> None:
    bettered = sum(any(x <= i and y <= j for x, y in points) for i in range(6) for j in range(6))
    assert area([(x / 6, y / 6) for x, y in points]) == pytest.approx(bettered / 36)


@given(st.text(min_size=1))
def test_about_half_of_any_prompts_are_to_choose_by(prefix: str) -> None:
    sides = [chooses(f"{prefix}-{i}") for i in range(400)]
    assert 140 <= sum(sides) <= 260
    assert sides[::-1] == [chooses(f"{prefix}-{i}") for i in reversed(range(400))]
