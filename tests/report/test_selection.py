"""Which cells of many a report draws."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_results import PROMPTS, write_fake_results
from nemo_bench.records.results import CellResults, Results, load_results
from nemo_bench.report import write_report
from nemo_bench.report.selection import drawn, front

SCORES = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("results") / "small"
    return load_results(write_fake_results(folder, prompts=PROMPTS[:1], methods={"none": "None", "nemo": "NeMo"}))


def scored(results: Results, scores: list[tuple[int, int]], models: int = 1) -> Results:
    """A run of a cell without mitigation that scores worst, and of mitigated ones with these scores; all cost alike."""

    def cells() -> Iterator[CellResults]:
        plain, mitigated = results.cells
        for number, (similarity, alignment) in enumerate([(100, 0), *scores] * models):
            of = mitigated if number % (len(scores) + 1) else plain
            model = f"m{number // (len(scores) + 1)}"
            values = {0: {"ssim": similarity / 100, "alignment": alignment / 100}}
            outcomes = {name: replace(own, scores=values) for name, own in of.outcomes.items()}
            spec = of.spec.model_copy(update={"model": model})
            yield replace(of, folder=Path(str(number)), outcomes=outcomes, spec=spec, short=f"cell {number}")

    return replace(results, cells=tuple(cells()))


@given(SCORES)
@settings(deadline=None)
def test_at_most_30_cells_are_drawn_among_them_the_one_without_mitigation_and_the_front(
    results: Results, scores: list[tuple[int, int]]
) -> None:
    run = scored(results, scores)
    chosen = drawn(run).cells
    assert len(chosen) == min(30, len(run.cells))
    assert [cell for cell in run.cells if cell in chosen] == list(chosen)
    assert run.cells[0] in chosen
    best = [run.cells[i + 1] for i in front([(x, -y) for x, y in scores])]
    left_out = [cell for cell in best if cell not in chosen]
    assert not left_out or len(best) > 28


def test_models_share_what_is_drawn_evenly(results: Results) -> None:
    run = scored(results, [(i, i) for i in range(29)], models=8)
    chosen = drawn(run).cells
    assert {model: sum(cell.model == model for cell in chosen) for model in run.models} == dict.fromkeys(run.models, 15)


def test_a_page_says_how_many_cells_it_leaves_out_of_figures_and_keeps_all_in_tables(tmp_path: Path) -> None:
    methods = {"none": "No mitigation", **{f"m{i}": f"Method {i}" for i in range(33)}}
    (tmp_path / "picture.png").write_bytes(b"")
    folder = write_fake_results(
        tmp_path / "many", prompts=PROMPTS[:2], methods=methods, pictures=[tmp_path / "picture.png"]
    )
    results = load_results(folder)
    page = write_report(results).read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)".*?</section>', page, re.DOTALL)
    for section in ("tradeoffs", "distributions", "neurons", "prompts"):
        text = page[page.index(f'<section id="{section}"') :]
        assert section in sections
        assert "30 of 34 cells are shown here" in text[: text.index("</section>")]
    assert len(json.loads((folder / "leaderboard.json").read_text())["rows"]) == 2 * 34
    assert len(re.findall(r'<tr data-group="VM" data-model="planted" data-cell=', page)) == 34
    best = min(results.cells, key=lambda cell: fmean(cell.prompt_means("ssim", ["VM"]).values()))
    assert f">{best.short}</text>" in page[page.index('<figure id="distribution-ssim-0"') :]
    gallery = page[page.index('<section id="prompts"') : page.index('<section id="presets"')]
    assert len(re.findall(r'<tr data-model="planted" data-text', gallery)) == 2 * 30


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_betters(points: list[tuple[int, int]]) -> None:
    found = front(points)
    assert [points[i] for i in found] == sorted(points[i] for i in found)
    for i, (x, y) in enumerate(points):
        bettered = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        assert (i in found) == (not bettered)
