"""The page: all results of a run in one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean, median
from typing import Any, NamedTuple

from nemo_bench.records.data import Prompt
from nemo_bench.records.results import CellResults, Outcome, Results, short_layers
from nemo_bench.records.schema import LeaderboardRow
from nemo_bench.records.statistics import GROUPS
from nemo_bench.report import tables
from nemo_bench.report.audit import audits_of
from nemo_bench.report.localizers import localized
from nemo_bench.report.memsinks import has_sinks
from nemo_bench.report.models import model_rows
from nemo_bench.report.plots import axis_figures, plots, strength_curves
from nemo_bench.report.selection import MEMORIZED, drawn
from nemo_bench.report.strengths import Compared, compared, strengths_of
from nemo_bench.report.svg import looks
from nemo_bench.report.templates import render
from nemo_bench.report.texts import FOLDER, TEXTS
from nemo_bench.report.thumbnails import Thumbnails

_MANY = 8  # columns that fit a window; of more only the first of every family is shown at first
_SCORES = 5
_EXAMPLES = 3  # prompts of either end of the order
_CHANCE = 0.05
"""A difference that is more probable than this by chance is called neither better nor worse."""


class Size(NamedTuple):
    """How large images of a page are; sides are in pixels."""

    strips: float  # prompts times cells of a page, at most
    side: int
    seeds: int  # images of a strip
    noise: int


SIZES = (Size(150, 160, 8, 48), Size(1000, 112, 4, 32), Size(float("inf"), 56, 3, 20))
"""A page of a few prompts shows more than one of 500 prompts and 10 methods, which takes some 40 MB."""


def page(results: Results, rows: Sequence[LeaderboardRow]) -> str:
    """The whole page as HTML; prompts and all other texts of the run are escaped.

    The strips of a prompt are in a ``noscript`` element: the browser keeps them as text until the script asks for
    them, which is what keeps large pages quick, and shows them by itself where scripts are off.
    """
    script = (FOLDER / "script.js").read_text(encoding="utf-8")
    shown = drawn(results)
    strengths = strengths_of(results)
    axes = tables.axis_tables(results)
    figures = [*(strength_curves(results, strengths) if strengths else ()), *axis_figures(shown), *plots(shown)]
    thumbnails = {cell.name: Thumbnails(cell.folder) for cell in results.cells}
    audits = audits_of(results)
    parts = {
        "examples": _examples(results, thumbnails),
        "audit": audits,
        "models": _models(results, rows),
        "presets": _presets(results),
        "axes": axes,
    }
    by_section = {name: [plot for plot in figures if plot.section == name] for name in TEXTS["leads"]}
    has_detectors = any(cell.summary.detection for cell in results.cells)
    filled = {**by_section, **parts, "detection": by_section["detection"] or has_detectors}
    cards = _cards(results, shown.cells, thumbnails)
    for of_cell in thumbnails.values():
        of_cell.save()
    families = list(dict.fromkeys(info.family for info in results.metrics.values()))
    last = max((start for cell in results.cells for start in cell.starts), key=lambda start: start.time)
    costs = {cell.name: {**cell.summary.cost, **cell.counts} for cell in results.cells}
    return render(
        "page.html.jinja",
        results=results,
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        looks=looks([*shown.cells, *results.cells]),
        versions=[v for name, v in last.versions.items() if name.replace("-", "_") == "nemo_bench"],
        last=last,
        prompt_count=len({(cell.spec.prompts, prompt.id) for cell in results.cells for prompt in cell.prompts}),
        seed_count=len({seed for cell in results.cells for own in cell.outcomes.values() for seed in own.seeds}),
        gaps=_gaps(results),
        sections={name: title for name, title in TEXTS["sections"].items() if filled.get(name, True)},
        has_detection_page=(results.folder / "detection.html").is_file(),
        has_localizers=bool(localized(results)),
        has_sinks=has_sinks(results),
        has_detectors=has_detectors,
        strengths=strengths,
        **parts,
        model_rows=model_rows(results),
        rates=results.keys_of("memorization_rate")[:1],
        audit_citations=list(dict.fromkeys(shown.citation for shown in audits)),
        plots=by_section,
        shown=shown.cells,
        many=_MANY,
        groups=[(group, group, f"{results.heading(group)}: {results.meaning(group)}") for group in results.groups],
        column_options=("main", *families, "all") if len(results.metrics) > _MANY else (),
        rows=rows,
        cells={cell.name: cell for cell in results.cells},
        spans={key: _span(rows, key) for key in results.metrics},
        number=partial(_number, results),
        interval=partial(_interval, results),
        change=partial(change, results),
        cost=_cost,
        tables=tables,
        notes=tables.notes(results, rows, "“Best”", "“Best?”"),
        scored=_scored(results),
        median=median,
        scores_of=partial(_scores_of, results),
        order=_order(results)[0],
        cards=cards,
        all_groups=GROUPS,
        kinds=[group for group in GROUPS if any(p.group == group for cell in results.cells for p in cell.prompts)],
        costs={key: title for key, title in TEXTS["costs"].items() if any(key in own for own in costs.values())},
        cell_costs=costs,
        commands=list(dict.fromkeys(start.command for cell in results.cells for start in cell.starts)),
        citations=list(dict.fromkeys(text for cell in results.cells for text in cell.spec.citations.values())),
        pretty=partial(json.dumps, indent=2, ensure_ascii=False, default=str),
    )


def _gaps(results: Results) -> list[str]:
    """Missing data, once for each prompt list and model; then failures of every cell, with the most frequent reason."""
    gaps: dict[str, None] = {}
    for cell in results.cells:
        of = f" ({cell.spec.prompts})" if len(results.prompt_lists) > 1 else ""
        for key, words in TEXTS["gaps"].items():
            if count := cell.counts.get(key):
                gaps[f"{words}{of}: {count}"] = None
    for cell in results.cells:
        if words := str(cell.failures("all")):
            reasons = Counter(reason for outcome in cell.outcomes.values() for reason in outcome.failed.values())
            why = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
            gaps[f"Not finite, and so without a value: {cell.label}: {words}{why}"] = None
    return list(gaps)


def _examples(results: Results, thumbnails: Mapping[str, Thumbnails]) -> list[dict[str, Any]]:
    """The memorized prompts that the best mitigation of each model serves worst and best, with their first images."""
    key, sign = _order(results)
    if not key:
        return []
    cells = {cell.name: cell for cell in results.cells}
    box = (SIZES[0].side, SIZES[0].side)
    examples = []
    side_by_side = compared(results)
    for model in results.models:
        mitigated = [c for c in results.cells if c.model == model and c.summary.unmitigated in cells]
        if side_by_side:
            mitigated = [c for c in mitigated if c.name in side_by_side.cells]
        mitigated = [c for c in mitigated if c.spec.fitted is None] or mitigated
        means = {c.name: values for c in mitigated if (values := _of_prompts(c, key, side_by_side))}
        # What failed may be what would have been bad.
        complete = {name: v for name, v in means.items() if all(cells[name].is_complete(g, key) for g in MEMORIZED)}
        means = complete or means
        if not means:
            continue
        cell = cells[min(means, key=lambda name: sign * fmean(means[name].values()))]
        own = means[cell.name]
        order = sorted(own, key=lambda prompt: -sign * own[prompt])
        count = min(_EXAMPLES, max(1, len(order) // 2))
        words = {**dict.fromkeys(order[:count], "Worst"), **dict.fromkeys(order[count:][::-1][:count], "Best")}
        prompts = {prompt.id: prompt for prompt in cell.prompts}
        shown = []
        for name, word in words.items():
            prompt = prompts[name]
            files = [("Training image", cell, path) for path in prompt.references[:1]]
            for shown_cell in (cells[cell.summary.unmitigated or ""], cell):
                first = [*shown_cell.outcomes[name].images.values()][:1]
                files += [(shown_cell.short, shown_cell, path) for path in first]
            pictures = [(caption, thumbnails[of.name](path, box)) for caption, of, path in files]
            address = _address(results, cell, prompt)
            shown.append({"word": word, "prompt": prompt, "address": address, "mean": own[name], "pictures": pictures})
        examples.append({"cell": cell, "metric": key, "prompts": shown})
    return examples


def _of_prompts(cell: CellResults, key: str, side_by_side: Compared | None) -> dict[str, float]:
    """A metric of the memorized prompts of a cell, at several strengths of those that no setting was chosen by."""
    means = cell.prompt_means(key, MEMORIZED)
    return {name: value for name, value in means.items() if side_by_side is None or name in side_by_side.prompts}


def _address(results: Results, cell: CellResults, prompt: Prompt) -> str:
    """Name of a prompt in the page's address: its id, with the list's name where there are several lists."""
    return f"{cell.spec.prompts}/{prompt.id}" if len(results.prompt_lists) > 1 else prompt.id


def _number(results: Results, key: str, value: float, sign: str = "") -> str:
    return tables.number(results, key, value, sign).replace("-", "−")


def _interval(results: Results, key: str, low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_number(results, key, low)} to {_number(results, key, high)}"


def _span(rows: Sequence[LeaderboardRow], key: str) -> tuple[float, float]:
    """The smallest number of a column, means and ends of intervals, and how far it is to the largest."""
    values = [row.metrics[key] for row in rows if key in row.metrics]
    ends = [end for value in values for end in (value.low, value.high, value.mean) if end is not None]
    return (min(ends), (max(ends) - min(ends)) or 1.0) if ends else (0.0, 1.0)


def change(results: Results, row: LeaderboardRow, key: str) -> str:
    """The difference of a metric to no mitigation, and whether it is better or worse; empty without a test."""
    test = row.metrics[key].paired
    if not test:
        return ""
    words = f"{_number(results, key, test.difference, '+')} ({_interval(results, key, test.low, test.high)})"
    better = results.metrics[key].higher_is_better
    if better is None or test.p >= _CHANCE or row.failed.metrics.get(key):
        return words
    return f"{words} {'better' if (test.difference > 0) == better else 'worse'}"


def _models(results: Results, rows: Sequence[LeaderboardRow]) -> dict[tuple[str, str], dict[str, LeaderboardRow]]:
    """Rows by model for every group and name of a method; nothing for a single model."""
    by_model: dict[tuple[str, str], dict[str, LeaderboardRow]] = {}
    short = {cell.name: cell.short for cell in results.cells}
    for row in rows if len(results.models) > 1 else ():
        name = f"{short[row.cell]} · {row.prompts}" if len(results.prompt_lists) > 1 else short[row.cell]
        by_model.setdefault((row.group, name), {})[row.model] = row
    return by_model


def _presets(results: Results) -> list[dict[str, Any]]:
    """Every preset of any cell: the cells that have it, and titles of its columns."""
    presets = []
    for name in dict.fromkeys(name for cell in results.cells for name in cell.summary.presets):
        own = [(cell, cell.summary.presets[name]) for cell in results.cells if name in cell.summary.presets]
        columns = dict.fromkeys(key for _, preset in own for row in preset.rows.values() for key in row)
        presets.append({"about": own[0][1], "cells": own, "columns": {key: _column(results, key) for key in columns}})
    return presets


def _column(results: Results, key: str) -> str:
    """Title of a column such as ``ssim`` or ``ssim, max``."""
    metric, comma, statistic = key.partition(", ")
    return (results.metrics[metric].title if metric in results.metrics else metric) + comma + statistic


def _cards(
    results: Results, cells: Sequence[CellResults], thumbnails: Mapping[str, Thumbnails]
) -> list[dict[str, Any]]:
    """The gallery of some cells: one card a prompt, one strip a cell. Cards are made side by side: images take time."""
    by_prompt: dict[tuple[str, str], list[tuple[CellResults, Prompt]]] = {}
    for cell in cells:
        for prompt in cell.prompts:
            by_prompt.setdefault((cell.spec.prompts, prompt.id), []).append((cell, prompt))
    strips = sum(len(own) for own in by_prompt.values())
    size = next(size for size in SIZES if strips <= size.strips)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda own: _card(results, cells, own, size, thumbnails), by_prompt.values()))


def _card(
    results: Results,
    cells: Sequence[CellResults],
    own: Sequence[tuple[CellResults, Prompt]],
    size: Size,
    thumbnails: Mapping[str, Thumbnails],
) -> dict[str, Any]:
    """The card of a prompt, given all cells of the gallery, and those that have it."""
    first, prompt = own[0]
    outcomes = {cell.name: cell.outcomes[prompt.id] for cell, _ in own}
    seeds = sorted({seed for outcome in outcomes.values() for seed in outcome.seeds})
    key, sign = _order(results)
    order = [outcomes[cell.name].values(key) if cell.name in outcomes else [] for cell in cells]
    reference = [thumbnails[first.name](path, (size.side, size.side)) for path in prompt.references[:1]]
    return {
        "prompt": prompt,
        "address": _address(results, first, prompt),
        "reference": reference[0] if reference else None,
        "seeds": len(seeds),
        "shown": min(size.seeds, len(seeds)),
        "order": [f"{sign * fmean(values):.4f}" if values else "" for values in order],
        "strips": [
            _strip(cell, outcomes[cell.name], seeds[: size.seeds], size, thumbnails[cell.name]) for cell, _ in own
        ],
    }


def _strip(cell: CellResults, outcome: Outcome, seeds: Sequence[int], size: Size, make: Thumbnails) -> dict[str, Any]:
    """A cell's images of a prompt, each with its seed and how it is shown."""
    images = [(seed, outcome.images.get(seed)) for seed in seeds]
    short = short_layers(cell.layers)
    return {
        "cell": cell,
        "outcome": outcome,
        "images": [(seed, path, path and make(path, (size.side, size.side))) for seed, path in images],
        "noise": make(outcome.noise, (16 * size.noise, size.noise), lossless=False) if outcome.noise else None,
        "layers": {short[layer]: outcome.neurons[layer] for layer in cell.layers if layer in outcome.neurons},
    }


def _scores_of(results: Results, outcome: Outcome, seed: int) -> str:
    """All scores of an image, a line each."""
    scores = outcome.scores.get(seed, {})
    own = {key: info.title for key, info in results.metrics.items() if key in scores}
    return "\n".join(f"{title} {_number(results, key, scores[key])}" for key, title in own.items())


def _scored(results: Results) -> list[str]:
    """Metrics beside a strip: the first of every family, then those of prompts, as many as there is room.

    Numbers of neurons have a column of their own.
    """
    of_prompts = (key for key, info in results.metrics.items() if info.per == "prompt")
    wanted = {key: results.metrics[key] for key in (*results.leading.values(), *of_prompts)}
    return [key for key, info in wanted.items() if info.per != "set" and info.role != "neuron_count"][:_SCORES]


def _order(results: Results) -> tuple[str, int]:
    """The metric by which prompts are ordered, empty where there is none, and -1 where its small values are bad."""
    key = results.leading.get("memorization")
    if key is None or results.metrics[key].per == "set":
        return "", 1
    return key, -1 if results.metrics[key].higher_is_better else 1


def _cost(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
