"""The page: all results of a run in one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean, median
from typing import Any, NamedTuple

from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.results import CellResults, Outcome, Results, short_layers
from nemo_bench.records.schema import Aggregate, LeaderboardRow, Statistic, Thumbnail
from nemo_bench.records.statistics import GROUPS
from nemo_bench.report.audit import audits_of
from nemo_bench.report.plots import MEMORIZED, plots
from nemo_bench.report.svg import looks
from nemo_bench.report.tables import BEST, FAILED, SEARCHES, SIGNIFICANCE, fewer, number
from nemo_bench.report.templates import FOLDER, render
from nemo_bench.report.thumbnails import Thumbnails

_MANY = 8  # columns that fit a window; of more only the first of every family is shown at first
_SCORES = 5
_EXAMPLES = 3  # prompts of either end of the order
_CHANCE = 0.05
"""A difference that is more probable than this by chance is called neither better nor worse."""
_FIGURES = (
    ("tradeoffs", "Trade-offs", "What less memorization costs: each mark is a row of the leaderboard."),
    ("distributions", "Distributions", "A mean hides prompts on which a method fails."),
    ("neurons", "Neurons", "How many neurons were blocked, and where."),
    ("detection", "Detection", "How well detectors separate memorized prompts from others."),
)
_NO_SSCD = "Not comparable with the paper: its similarities are of SSCD, and SSCD is not among the metrics of this run."
_COSTS = {
    "localize_seconds_per_prompt": "Localizing and measuring, s per prompt",
    "once_seconds_per_prompt": "Once, s per prompt",
    "once_row_passes_per_prompt": "Once, UNet passes per prompt",
    "generate_seconds_per_image": "Generating, s per image",
    "row_passes_per_image": "UNet passes per image",
    "peak_memory_mb": "Peak memory, MB",
    "images": "Images",
    "prompts": "Prompts",
    "failed_images": "Images failed",
    "failed_localizations": "Localizations failed",
    "failed_scores": "Scores failed",
    "without_images": "Prompts without image",
    "resized": "Images of another size",
    "truncated": "Captions truncated",
    "without_reference": "Without training image",
    "dead_references": "Dead links",
    "damaged_references": "Damaged training images",
}
_GAPS = {
    "lost_images": "Images that are gone or cut since they were scored; the command of the run makes them again",
    "without_images": "Prompts without an image, which have no part in any number",
    "resized": "Images of another size than most, brought to that for metrics of pixels",
    "truncated": "Captions longer than the text encoder takes, and so truncated",
    "without_reference": "Memorized prompts without a training image on disk",
    "dead_references": "Links to training images that are dead",
    "damaged_references": "Files of training images that can't be decoded, and so left out",
}


class Size(NamedTuple):
    """How large images are embedded.

    Attributes:
        strips: Largest number of strips (prompts times cells) of a page for it.
        side: Longest side of an image in pixels.
        seeds: Images of a strip.
        noise: Side of a noise difference in pixels.
    """

    strips: float
    side: int
    seeds: int
    noise: int


SIZES = (Size(150, 160, 8, 48), Size(1000, 112, 4, 32), Size(float("inf"), 56, 3, 20))
"""A page of a few prompts shows more than one of 500 prompts and 10 methods, which takes some 40 MB."""


def page(results: Results, rows: Sequence[LeaderboardRow]) -> str:
    """The whole page as HTML; prompts and all other texts of the run are escaped.

    The strips of a prompt are in a ``noscript`` element: the browser keeps them as text until the script asks for
    them, which is what keeps large pages quick, and shows them by itself where scripts are off.

    Args:
        results: The run.
        rows: Its leaderboard.
    """
    script = (FOLDER / "script.js").read_text(encoding="utf-8")
    figures = plots(results)
    by_section = {name: [plot for plot in figures if plot.section == name] for name, _, _ in _FIGURES}
    thumbnails = {cell.name: Thumbnails(cell.folder) for cell in results.cells}
    examples = _examples(results, thumbnails)
    cards = _cards(results, thumbnails)
    for of_cell in thumbnails.values():
        of_cell.save()
    parts = {
        "examples": examples,
        "audit": audits_of(results),
        "models": _models(results, rows),
        "presets": _presets(results),
        "detection": _detection(results),
    }
    families = list(dict.fromkeys(info.family for info in results.metrics.values()))
    many = len(results.metrics) > _MANY
    numbers = [(cell, {**cell.summary.cost, **cell.counts}) for cell in results.cells]
    costs = [key for key in _COSTS if any(key in of_cell for _, of_cell in numbers)]
    kinds = [g for g in GROUPS if any(p.group == g for cell in results.cells for p in cell.prompts)]
    return render(
        "page.html.jinja",
        results=results,
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        looks=looks(results),
        facts=_facts(results),
        gaps=_gaps(results),
        sections=_sections({**by_section, **{name: part or by_section.get(name) for name, part in parts.items()}}),
        has_detection_page=(results.folder / "detection.html").is_file(),
        **parts,
        audit_citation=cite("kowalczuk2026finding"),
        figure_sections=_FIGURES,
        plots=by_section,
        own_groups=results.own_groups,
        many=_MANY,
        groups=[(group, group, f"{results.heading(group)}: {results.meaning(group)}") for group in results.groups],
        model_options=[(model, model, "") for model in results.models],
        column_options=[(name, name, "") for name in ("main", *families, "all")] if many else [],
        main=set(results.leading.values()),
        columns=results.metrics,
        rows=_rows(results, rows),
        significance=SIGNIFICANCE if any(row.is_tested for row in rows) else "",
        some_failed=any(row.failed.total for row in rows),
        failed_note=FAILED,
        searched=SEARCHES if any(cell.summary.localization for cell in results.cells) else "",
        best=BEST.format(clear="“Best”", unclear="“Best?”") if any(row.best for row in rows) else "",
        score_titles=[results.metrics[key].title for key in _scores(results)],
        order_title=_order_title(results),
        cards=cards,
        kinds=[(group, group, "") for group in kinds],
        costs=[_COSTS[key] for key in costs],
        cost_rows=[(cell, [_cost(of_cell.get(key)) for key in costs]) for cell, of_cell in numbers],
        commands=list(dict.fromkeys(start.command for cell in results.cells for start in cell.starts)),
        citations=list(dict.fromkeys(text for cell in results.cells for text in cell.spec.citations.values())),
        pretty=lambda content: json.dumps(content, indent=2, ensure_ascii=False, default=str),
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """Facts about the run, for the head of the page."""
    prompts = {(cell.spec.prompts, prompt.id) for cell in results.cells for prompt in cell.prompts}
    seeds = {seed for cell in results.cells for outcome in cell.outcomes.values() for seed in outcome.seeds}
    last = max((start for cell in results.cells for start in cell.starts), key=lambda start: start.time)
    versions = [v for name, v in last.versions.items() if name.replace("-", "_") == "nemo_bench"]
    return [
        ("Model" + "s" * (len(results.models) > 1), ", ".join(results.models)),
        ("Methods", "; ".join(dict.fromkeys(cell.spec.title for cell in results.cells))),
        ("Prompts", f"{len(prompts)} ({', '.join(results.prompt_lists)})"),
        ("Images", f"{len(seeds)} of each prompt"),
        ("Run", last.time[:10]),
        *(("Version", version) for version in versions),
    ]


def _gaps(results: Results) -> list[str]:
    """Missing data, once for each prompt list and model."""
    gaps: dict[str, None] = {}
    for cell in results.cells:
        of = f" ({cell.spec.prompts})" if len(results.prompt_lists) > 1 else ""
        for key, words in _GAPS.items():
            if count := cell.counts.get(key):
                gaps[f"{words}{of}: {count}"] = None
    return [*gaps, *(f"Not finite, and so without a value: {words}" for words in _failures(results))]


def _failures(results: Results) -> list[str]:
    """Failures of every cell, with the most frequent reason of images."""
    lines = []
    for cell in results.cells:
        if words := str(cell.failures("all")):
            reasons = Counter(reason for outcome in cell.outcomes.values() for reason in outcome.failed.values())
            why = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
            lines.append(f"{cell.label}: {words}{why}")
    return lines


def _sections(contents: Mapping[str, object]) -> dict[str, str]:
    """Title of every section that has content, by its anchor: pictures first, long tables last."""
    titles = {
        "examples": "Worst and best",
        "leaderboard": "Leaderboard",
        **{name: title for name, title, _ in _FIGURES},
        "audit": "Audit",
        "prompts": "Prompts",
        "models": "Models",
        "presets": "As other papers",
        "reproduce": "Reproduce",
    }
    always = ("leaderboard", "prompts", "reproduce")
    return {name: title for name, title in titles.items() if name in always or contents[name]}


def _examples(results: Results, thumbnails: Mapping[str, Thumbnails]) -> list[dict[str, Any]]:
    """The memorized prompts that the best mitigation of each model serves worst and best, with their first images."""
    key = results.leading.get("memorization")
    if key is None or results.metrics[key].per == "set":
        return []
    sign = -1 if results.metrics[key].higher_is_better else 1
    cells = {cell.name: cell for cell in results.cells}
    examples = []
    for model in results.models:
        means = {
            cell.name: cell.prompt_means(key, MEMORIZED)
            for cell in results.cells
            if cell.model == model and cell.summary.unmitigated in cells
        }
        means = {name: values for name, values in means.items() if values}
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
        compared = (cells[cell.summary.unmitigated or ""], cell)
        shown = [
            {
                "word": word,
                "prompt": prompts[name],
                "address": _address(results, cell, prompts[name]),
                "mean": _number(results, key, own[name]),
                "pictures": _triple(compared, prompts[name], thumbnails),
            }
            for name, word in words.items()
        ]
        examples.append({"cell": cell, "metric": results.metrics[key].title, "prompts": shown})
    return examples


def _triple(
    cells: tuple[CellResults, CellResults], prompt: Prompt, thumbnails: Mapping[str, Thumbnails]
) -> list[tuple[str, Thumbnail | None]]:
    """The training image of a prompt, and the first image without and with mitigation, each with its caption."""
    box = (SIZES[0].side, SIZES[0].side)
    pictures = [("Training image", thumbnails[cells[1].name](path, box)) for path in prompt.references[:1]]
    for cell in cells:
        make = thumbnails[cell.name]
        pictures += [(cell.short, make(path, box)) for path in list(cell.outcomes[prompt.id].images.values())[:1]]
    return pictures


def _address(results: Results, cell: CellResults, prompt: Prompt) -> str:
    """Name of a prompt in the page's address: its id, with the list's name where there are several lists."""
    return f"{cell.spec.prompts}/{prompt.id}" if len(results.prompt_lists) > 1 else prompt.id


def _number(results: Results, key: str, value: float, sign: str = "") -> str:
    return number(results, key, value, sign).replace("-", "−")


def _interval(results: Results, key: str, low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_number(results, key, low)} to {_number(results, key, high)}"


def _rows(results: Results, rows: Sequence[LeaderboardRow]) -> list[dict[str, Any]]:
    """Rows of the leaderboard with every number as it is shown, and each interval as percent of its column's span."""
    cells = {cell.name: cell for cell in results.cells}
    spans = {}
    for key in results.metrics:
        values = [row.metrics[key] for row in rows if key in row.metrics]
        ends = [end for value in values for end in (value.low, value.high, value.mean) if end is not None]
        spans[key] = (min(ends), (max(ends) - min(ends)) or 1.0) if ends else (0.0, 1.0)
    return [
        {
            "cell": cells[row.cell],
            "group": row.group,
            "values": {key: _cell(results, row, key, *spans[key]) for key in results.metrics if key in row.metrics},
            "searches": row.searches,
            "failed": str(row.failed),
            "failed_count": row.failed.total,
        }
        for row in rows
    ]


def _cell(results: Results, row: LeaderboardRow, key: str, left: float, span: float) -> dict[str, Any]:
    value = row.metrics[key]
    low = value.mean if value.low is None else value.low
    high = value.mean if value.high is None else value.high
    interval = _interval(results, key, value.low, value.high)
    few = fewer(row, value)
    return {
        **_shown(results, row, key),
        "sort": repr(value.mean),
        "interval": ", ".join(words for words in (interval or "no interval", few) if words),
        "median": _median(results, key, value),
        "change": change(results, row, key),
        "test": _test(value),
        "start": f"{100 * (low - left) / span:.2f}",
        "width": f"{100 * (high - low) / span:.2f}" if interval else "",
        "at": f"{100 * (value.mean - left) / span:.2f}",
    }


def _shown(results: Results, row: LeaderboardRow, key: str) -> dict[str, Any]:
    best = ("best" if row.is_clear(key) else "best?") if key in row.best else ""
    against = f"p = {row.best[key]:.2g} against the runner-up" if best else ""
    mean = _number(results, key, row.metrics[key].mean)
    return {"mean": mean, "stars": row.stars(key), "best": best, "against": against}


def _median(results: Results, key: str, value: Aggregate) -> str:
    if value.median is None or value.mad is None:
        return ""
    return f"median {_number(results, key, value.median)} ± {number(results, key, value.mad)}"


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


def _test(value: Aggregate) -> str:
    test = value.paired
    return f"p = {test.p:.2g}, Holm-corrected {test.p_holm:.2g}, {test.prompts} prompts" if test else ""


def _models(results: Results, rows: Sequence[LeaderboardRow]) -> dict[str, Any]:
    """The leading metrics, models beside each other, a method and group a row; nothing for a single model."""
    if len(results.models) == 1:
        return {}
    keys = list(results.leading.values())
    cells = {cell.name: cell for cell in results.cells}
    by_model: dict[tuple[str, str, str], dict[str, LeaderboardRow]] = {}
    for row in rows:
        by_model.setdefault((row.group, cells[row.cell].short, row.prompts), {})[row.model] = row
    lines = []
    for (group, short, prompts), of in by_model.items():
        values = [
            _shown(results, of[model], key) if model in of and key in of[model].metrics else None
            for key in keys
            for model in results.models
        ]
        name = f"{short} · {prompts}" if len(results.prompt_lists) > 1 else short
        lines.append({"group": group, "name": name, "cell": cells[next(iter(of.values())).cell], "values": values})
    return {"columns": keys, "rows": lines}


def _presets(results: Results) -> list[dict[str, Any]]:
    """A table for each preset: value ± spread and interval by cell and group."""
    tables = []
    for name in dict.fromkeys(name for cell in results.cells for name in cell.summary.presets):
        presets = [(cell, cell.summary.presets[name]) for cell in results.cells if name in cell.summary.presets]
        keys = list(dict.fromkeys(key for _, preset in presets for row in preset.rows.values() for key in row))
        rows = []
        for group in GROUPS:
            for cell, preset in presets:
                if statistics := preset.rows.get(group):
                    values = [_statistic(results, key, statistics[key]) if key in statistics else None for key in keys]
                    rows.append({"group": group, "cell": cell, "values": values})
        titles = [_column(results, key) for key in keys]
        warning = "" if any("sscd" in title.lower() for title in titles) else _NO_SSCD
        tables.append({"about": presets[0][1], "columns": titles, "rows": rows, "warning": warning})
    return tables


def _column(results: Results, key: str) -> str:
    """Title of a column such as ``ssim`` or ``ssim, max``."""
    metric, comma, statistic = key.partition(", ")
    return (results.metrics[metric].title if metric in results.metrics else metric) + comma + statistic


def _statistic(results: Results, key: str, value: Statistic) -> dict[str, str]:
    spread = "" if value.spread is None else f" ± {number(results, key, value.spread)}"
    return {
        "text": f"{_number(results, key, value.value)}{spread}",
        "interval": _interval(results, key, value.low, value.high),
    }


def _detection(results: Results) -> list[dict[str, Any]]:
    rows = []
    for cell in results.cells:
        for roc in cell.summary.detection.values():
            rates = (
                roc.average_precision, roc.tpr_at_1_fpr_below, roc.tpr_at_1_fpr_nearest, roc.tpr_at_1_fpr_first,
                roc.best_accuracy,
            )  # fmt: skip
            numbers = [(f"{roc.auc:.3f}", _interval(results, "", roc.auc_low, roc.auc_high))]
            numbers += [(f"{rate:.3f}", "") for rate in rates]
            numbers += [(str(count), "") for count in (roc.memorized, roc.other)]
            rows.append({"cell": cell, "title": roc.title, "numbers": numbers})
    return rows


def _cards(results: Results, thumbnails: Mapping[str, Thumbnails]) -> list[dict[str, Any]]:
    """The gallery: one card a prompt, one strip a cell. Cards are made side by side, since images take the time."""
    by_prompt: dict[tuple[str, str], list[tuple[CellResults, Prompt]]] = {}
    for cell in results.cells:
        for prompt in cell.prompts:
            by_prompt.setdefault((cell.spec.prompts, prompt.id), []).append((cell, prompt))
    strips = sum(len(cells) for cells in by_prompt.values())
    size = next(size for size in SIZES if strips <= size.strips)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda own: _card(results, own, size, thumbnails), by_prompt.values()))


def _card(
    results: Results, own: Sequence[tuple[CellResults, Prompt]], size: Size, thumbnails: Mapping[str, Thumbnails]
) -> dict[str, Any]:
    first, prompt = own[0]
    outcomes = {cell.name: cell.outcomes[prompt.id] for cell, _ in own}
    seeds = sorted({seed for outcome in outcomes.values() for seed in outcome.seeds})
    key = results.leading.get("memorization", "")
    sign = -1 if key and results.metrics[key].higher_is_better else 1
    order = [outcomes[cell.name].values(key) if cell.name in outcomes else [] for cell in results.cells]
    reference = [thumbnails[first.name](path, (size.side, size.side)) for path in prompt.references[:1]]
    return {
        "prompt": prompt,
        "address": _address(results, first, prompt),
        "reference": reference[0] if reference else None,
        "seeds": len(seeds),
        "shown": min(size.seeds, len(seeds)),
        "order": [f"{sign * fmean(values):.4f}" if values else "" for values in order],
        "strips": [
            _strip(results, cell, outcomes[cell.name], seeds[: size.seeds], size, thumbnails[cell.name])
            for cell, _ in own
        ],
    }


def _strip(
    results: Results, cell: CellResults, outcome: Outcome, seeds: Sequence[int], size: Size, make: Thumbnails
) -> dict[str, Any]:
    scores = []
    for key in _scores(results):
        values = outcome.values(key)
        scores.append((results.metrics[key].title, _number(results, key, median(values)) if values else "–"))
    short = short_layers(cell.layers)
    return {
        "cell": cell,
        "images": [_image(results, cell, outcome, seed, size, make) for seed in seeds],
        "has_noise": outcome.noise is not None,
        "noise": make(outcome.noise, (16 * size.noise, size.noise), lossless=False) if outcome.noise else None,
        "scores": scores,
        "neurons": outcome.neurons.count,
        "layers": [(short[layer], outcome.neurons[layer]) for layer in cell.layers if layer in outcome.neurons],
    }


def _image(
    results: Results, cell: CellResults, outcome: Outcome, seed: int, size: Size, make: Thumbnails
) -> tuple[str, str, Thumbnail | None]:
    """Name of an image, its scores, and the image."""
    if seed not in outcome.images:
        why = f"failed: {outcome.failed[seed]}" if seed in outcome.failed else "not generated"
        return f"{cell.label}, seed {seed}: {why}", "", None
    own = outcome.scores.get(seed, {})
    scores = [f"{info.title} {_number(results, key, own[key])}" for key, info in results.metrics.items() if key in own]
    return f"{cell.label}, seed {seed}", "\n".join(scores), make(outcome.images[seed], (size.side, size.side))


def _scores(results: Results) -> list[str]:
    """Metrics beside a strip: the first of every family, then those of prompts, as many as there is room.

    Numbers of neurons have a column of their own.
    """
    of_prompts = (key for key, info in results.metrics.items() if info.per == "prompt")
    wanted = {key: results.metrics[key] for key in (*results.leading.values(), *of_prompts)}
    return [key for key, info in wanted.items() if info.per != "set" and info.role != "neuron_count"][:_SCORES]


def _order_title(results: Results) -> str:
    """Title of the metric by which prompts can be ordered."""
    key = results.leading.get("memorization")
    return results.metrics[key].title if key and results.metrics[key].per != "set" else ""


def _cost(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
