"""Rows of the leaderboard, and the same rows as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.mathtext import MathTextParser

from fake_results import METRICS, PROMPTS, change_file, write_fake_results
from nemo_bench.records.io import read_file
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Collateral, Failures, Leaderboard, LeaderboardRow, Spec, Summary
from nemo_bench.records.statistics import paired
from nemo_bench.report import html, write_report
from nemo_bench.report.tables import is_clear, latex, leaderboard, markdown, stars, tex
from nemo_bench.report.terminal import terminal_table
from tags import Tags


def test_leaderboards_hold_the_numbers_of_the_cells(run: Path, page: str) -> None:
    wide = {(row["cell"], row["group"]): row for row in csv.DictReader((run / "leaderboard.csv").open())}
    content = json.loads((run / "leaderboard.json").read_text())
    Leaderboard.model_validate_json((run / "leaderboard.json").read_text())
    rows = {(row["cell"], row["group"]): row for row in content["rows"]}
    assert len(wide) == len(rows) == 2 * 3 * 4
    assert content["metrics"]["ssim"]["higher_is_better"] is False
    for cell in json.loads((run / "run.json").read_text())["cells"]:
        metrics = json.loads((run / cell / "metrics.json").read_text())
        for group, scores in metrics["aggregates"].items():
            row, line = rows[cell, group], wide[cell, group]
            assert row["cost"] == metrics["cost"]
            assert row["counts"] == metrics["counts"]
            own = [p for p, _, kind in PROMPTS if group in ("all", kind or "general")]
            assert row["n_prompts"] == int(line["n_prompts"]) == len(own)
            assert list(row["metrics"]) == list(scores)
            for metric in METRICS:
                value = scores.get(metric, {})
                for name in ("mean", "low", "high", "median", "mad", "prompts"):
                    text = line[f"{metric}_{name}"]
                    assert (float(text) if text else None) == value.get(name)
                    assert row["metrics"].get(metric, {}).get(name) == value.get(name)
                for name in ("difference", "low", "high", "p", "prompts"):
                    text = line[f"{metric}_paired_{name}"]
                    assert (float(text) if text else None) == value.get("paired", {}).get(name)
                corrected = line[f"{metric}_paired_p_holm"]
                assert ("paired" in value) == bool(corrected)
                if corrected:
                    assert float(corrected) == row["metrics"][metric]["paired"]["p_holm"] >= value["paired"]["p"]


def test_no_two_columns_of_the_csv_share_a_name(run: Path, page: str) -> None:
    names = next(csv.reader((run / "leaderboard.csv").open()))
    assert len(set(names)) == len(names)


def test_best_is_marked_within_a_model_and_only_where_a_direction_exists(run: Path) -> None:
    rows = leaderboard(load_results(run))
    for model in ("planted", "sd14"):
        group = [row for row in rows if row.model == model and row.group == "VM"]
        for metric, info in METRICS.items():
            means = [row.metrics[metric].mean for row in group]
            marked = [row.metrics[metric].mean for row in group if metric in row.best]
            wanted = {True: max, False: min}.get(info.higher_is_better)
            assert marked == ([wanted(means)] if wanted else [])


def test_best_is_clear_only_where_prompts_tell_it_from_the_runner_up(tmp_path: Path) -> None:
    few = load_results(write_fake_results(tmp_path / "few"))
    # Two prompts have four patterns of signs: no p below a half.
    assert min(p for row in leaderboard(few) if row.group == "VM" for p in row.best.values()) >= 0.5
    assert not any(is_clear(row, key) for row in leaderboard(few) for key in METRICS)
    prompts = [(f"vm-{i:02d}", f"prompt {i}", "VM") for i in range(12)]
    many = load_results(write_fake_results(tmp_path / "many", prompts=prompts))
    rows = {row.method: row for row in leaderboard(many) if row.group == "VM"}
    cells = {cell.name: cell for cell in many.cells}
    # NeMo copies nothing, and the other two copy alike: one is the best in alignment by chance.
    assert is_clear(rows["nemo"], "ssim")
    for metric in ("ssim", "diversity"):
        row, second, _ = sorted(rows.values(), key=lambda row: row.metrics[metric].mean * (-1) ** (metric != "ssim"))
        own, its = (np.array(list(cells[r.cell].prompt_means(metric, ["VM"]).values())) for r in (row, second))
        assert row.best[metric] == paired(own - its).p
    assert not any(is_clear(row, "fid") for row in rows.values())
    page = Tags(html.page(many, leaderboard(many)))
    marks = {cell["data-key"]: cell["class"] for cell in page.all("td") if cell.get("class") in ("best", "unclear")}
    assert (marks["ssim"], marks["fid"]) == ("best", "unclear")
    text = markdown(many, leaderboard(many))
    assert f"| **{rows['nemo'].metrics['ssim'].mean:.3f}**" in text
    (best,) = (row for row in rows.values() if "fid" in row.best)
    assert f"| *{best.metrics['fid'].mean:.1f}* |" in text


def test_one_method_is_best_of_nothing(tmp_path: Path) -> None:
    results = load_results(write_fake_results(tmp_path / "one", methods={"none": "No mitigation"}))
    rows = leaderboard(results)
    assert not any(row.best for row in rows)
    assert "best" not in markdown(results, rows)
    page = Tags(html.page(results, rows))
    assert "“Best" not in page.text
    assert not [cell for cell in page.all("td") if cell.get("class") in ("best", "unclear")]


def test_counts_have_no_needless_decimals(tmp_path: Path) -> None:
    results = load_results(write_fake_results(tmp_path / "default"))
    rows = leaderboard(results)
    assert results.counted == {"neurons"}
    text = markdown(results, rows)
    for row in rows:
        if row.group != "all":
            mean = row.metrics["neurons"].mean
            shown = f"{mean:.0f}" if mean == int(mean) else f"{mean:.1f}"
            assert re.search(rf"\| {shown}(\\\*)* \[", text)
    assert "| 0 [0, 0] |" in text


def test_a_value_of_fewer_prompts_than_its_group_says_so(tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "default")
    path = next(run.glob("*__nemo__*/metrics.json"))
    aggregates = read_file(path, Summary).aggregates
    aggregates["VM"]["ssim"] = aggregates["VM"]["ssim"].model_copy(update={"prompts": 1})
    change_file(path, Summary, aggregates=aggregates)
    results = load_results(run)
    rows = leaderboard(results)
    assert markdown(results, rows).count("], 1 prompt |") == 1
    assert latex(results, rows).count(r"],\,\mathrm{1~prompt}}") == 1
    assert Tags(html.page(results, rows)).text.count(", 1 prompt") == 1


def test_markdown_has_a_table_for_each_group(run: Path) -> None:
    results = load_results(run)
    text = markdown(results, leaderboard(results))
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "VM, 2 prompts (verbatim)", "TM, 2 prompts (template)", "general, 2 prompts (not memorized)"
    ]  # fmt: skip
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {len(METRICS) + 3}
    value = results.cells[2].summary.aggregates["VM"]["ssim"]
    (row,) = (row for row in leaderboard(results) if row.cell == results.cells[2].name and row.group == "VM")
    starred = r"\*" * len(stars(row, "ssim"))
    assert starred
    assert f"*{value.mean:.3f}*{starred} [{value.low:.3f}, {value.high:.3f}]" in text
    assert "| No mitigation · sd14 | – | – |" in text


def test_stars_are_of_the_corrected_p_over_the_rows_of_a_group(run: Path) -> None:
    rows = leaderboard(load_results(run))
    seen = set()
    for row in rows:
        for metric in METRICS:
            family = [r.metrics[metric].paired.p for r in rows if r.group == row.group and has_test(r, metric)]
            if has_test(row, metric):
                own = row.metrics[metric].paired.p
                smaller = [p for p in family if p <= own]
                bound = max(min(1.0, p * (len(family) - sorted(family).index(p))) for p in smaller)
                assert row.metrics[metric].paired.p_holm == pytest.approx(bound)
            p = row.metrics[metric].paired.p_holm if has_test(row, metric) else 1
            assert stars(row, metric) == ("***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else "")
            seen.add(stars(row, metric))
    assert {"", "***"} <= seen


def has_test(row: LeaderboardRow, metric: str) -> bool:
    return metric in row.metrics and row.metrics[metric].paired is not None


def test_latex_has_a_table_for_each_group_with_the_best_marked(run: Path) -> None:
    results = load_results(run)
    text = latex(results, leaderboard(results))
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\toprule") == 3
    assert re.findall(r"caption\{two, (\w+, 2 prompts)", text) == [
        "VM, 2 prompts",
        "TM, 2 prompts",
        "general, 2 prompts",
    ]
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    bodies = re.findall(r"\\begin\{tabular\}\{(l(r+))\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert [len(columns) for columns, _, _ in bodies] == [1 + len(METRICS)] * 3
    for columns, _, body in bodies:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) == 7
        assert {line.count("&") for line in lines} == {len(columns) - 1}
        for part in re.findall(r"\$[^$]*\$", body):
            MathTextParser("path").parse(part)
    value = results.cells[2].summary.aggregates["VM"]["ssim"]
    bold = rf"\mathit{{{value.mean:.3f}}}^{{***}}_{{[{value.low:.3f},\,{value.high:.3f}]}}"
    assert f"${bold}$" in text
    fid = results.cells[0].summary.aggregates["VM"]["fid"].mean
    assert re.search(rf"\$(\\mathit{{)?{fid:.1f}}}?\$", text)
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == len(labels) == len(bodies)


def test_latex_shows_any_text() -> None:
    assert tex("a_b & 50% {x} #1 $2 ~ ^ \\ \n<|>") == (
        r"a\_b \& 50\% \{x\} \#1 \$2 \textasciitilde{} \textasciicircum{} \textbackslash{} "
        r"\textless{}\textbar{}\textgreater{}"
    )


def best(default: Path) -> dict[str, set[str]]:
    return {r.method: set(r.best) for r in leaderboard(load_results(default)) if r.group == "VM"}


def test_a_mean_that_lacks_values_is_neither_best_nor_starred(default: Path) -> None:
    assert "ssim" in best(default)["nemo"]
    assert any(stars(r, "ssim") for r in leaderboard(load_results(default)) if (r.method, r.group) == ("nemo", "VM"))
    lost = Failures(images=4, metrics={"ssim": 4})
    change_file(next(default.glob("*__nemo__*/metrics.json")), Summary, failed={"VM": lost, "all": lost})
    found = best(default)
    assert "ssim" not in found["nemo"]
    assert "ssim" in found["none"] | found["random"]  # the better one of those that lack nothing
    (row,) = (r for r in leaderboard(load_results(default)) if (r.method, r.group) == ("nemo", "VM"))
    assert (stars(row, "ssim"), str(row.failed)) == ("", "4 images")
    assert row.metrics["ssim"].paired.p_holm < 0.05  # the test itself is shown, with the prompts that it rests on


def test_a_method_fitted_on_training_images_is_neither_best_nor_runner_up(default: Path) -> None:
    before = {(row.method, row.group): row for row in leaderboard(load_results(default))}
    assert "ssim" in before["nemo", "VM"].best
    change_file(next(default.glob("*__nemo__*/spec.json")), Spec, fitted="../../fitted/nemo")
    results = load_results(default)
    rows = {(row.method, row.group): row for row in leaderboard(results)}
    assert not any(rows["nemo", group].best for group in results.groups)
    assert rows["nemo", "VM"].metrics == before["nemo", "VM"].metrics
    cells = {cell.method: cell.prompt_means("ssim", ["VM"]) for cell in results.cells}
    (winner,) = (name for name in ("none", "random") if "ssim" in rows[name, "VM"].best)
    other = {"none": "random", "random": "none"}[winner]
    differences = np.array([cells[winner][prompt] - cells[other][prompt] for prompt in cells[other]])
    assert rows[winner, "VM"].best["ssim"] == paired(differences).p
    assert "fitted on training images are left out" in markdown(results, [*rows.values()])


def test_a_method_all_of_whose_images_failed_is_still_in_every_table(default: Path) -> None:
    groups = ("VM", "TM", "general", "all")
    lost = Failures(images=6, localizations=2, scores=1, metrics={"ssim": 6})
    path = next(default.glob("*__nemo__*/metrics.json"))
    change_file(path, Summary, aggregates={g: {} for g in groups}, presets={}, failed=dict.fromkeys(groups, lost))
    write_report(load_results(default))
    for file in ("report.html", "leaderboard.md", "leaderboard.tex"):
        assert "6 images, 2 localizations, 1 score" in (default / file).read_text(encoding="utf-8")
    table = terminal_table(load_results(default))
    assert any("failed: 6 images" in str(text) for text in table.columns[0].cells)


def test_collateral_is_what_edits_for_memorized_prompts_cost_others(tmp_path: Path) -> None:
    methods = {"none": "No mitigation", "nemo": "NeMo", "random": "Another prompt's", "tokens": "All"}
    folder = write_fake_results(tmp_path / "run", methods=methods)
    nemo = read_file(next(folder.glob("*__nemo__*/spec.json")), Spec).settings["method"]
    for name, method in {"random": {"_target_": "x.OtherNeurons"}, "tokens": {"_target_": "x.SharedNeurons"}}.items():
        file = next(folder.glob(f"*__{name}__*/spec.json"))
        settings = read_file(file, Spec).settings
        change_file(file, Spec, settings={**settings, "method": {**method, "source": nemo}})
    rows = {(row.method, row.group): row for row in leaderboard(load_results(folder))}
    changes = {name: rows[name, "general"].metrics["alignment"].paired.difference for name in ("random", "tokens")}
    assert rows["nemo", "general"].collateral == Collateral(one=changes["random"], all=changes["tokens"])
    assert [key for key, row in rows.items() if row.collateral] == [("nemo", "general")]

    shown = str(rows["nemo", "general"].collateral)
    assert shown == f"{changes['random']:+.3f} / {changes['tokens']:+.3f}".replace("-", "−")
    write_report(load_results(folder))
    for file in ("report.html", "leaderboard.md"):
        assert shown in (folder / file).read_text(encoding="utf-8")
    with (folder / "leaderboard.csv").open() as opened:
        (line,) = (line for line in csv.DictReader(opened) if (line["method"], line["group"]) == ("nemo", "general"))
    assert float(line["collateral_all"]) == changes["tokens"]
    assert any(f"collateral {shown}" in str(text) for text in terminal_table(load_results(folder)).columns[0].cells)


def test_an_edit_by_another_method_is_no_collateral(tmp_path: Path) -> None:
    folder = write_fake_results(tmp_path / "run")
    file = next(folder.glob("*__random__*/spec.json"))
    method = {"_target_": "x.OtherNeurons", "source": {"name": "another"}}
    change_file(file, Spec, settings={**read_file(file, Spec).settings, "method": method})
    assert not any(row.collateral for row in leaderboard(load_results(folder)))
