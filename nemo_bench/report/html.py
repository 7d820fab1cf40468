"""The page: everything a run found, in one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean, median
from typing import Any, NamedTuple

from markupsafe import Markup

from nemo_bench.records.data import Prompt
from nemo_bench.records.statistics import GROUPS
from nemo_bench.report.data import Aggregate, Cell, Failures, GeneratedImage, Results, Statistic, short_layers
from nemo_bench.report.plots import MEMORIZED, Plot, plots
from nemo_bench.report.svg import looks
from nemo_bench.report.tables import BEST, FAILED, SEARCHES, SIGNIFICANCE, Row, fewer, number
from nemo_bench.report.templates import FOLDER, render
from nemo_bench.report.thumbnails import Thumbnail, Thumbnails

_MANY = 8  # columns that fit a window; of more only the first of every family is shown at first
_SCORES = 5
_EXAMPLES = 3  # prompts of each end of the order
_CHANCE = 0.05
"""A difference that is more probable than this by chance is called neither better nor worse."""
_FIGURES = (
    ("tradeoffs", "Trade-offs", "What less memorization costs: each mark is a row of the leaderboard."),
    ("distributions", "Distributions", "A mean hides prompts on which a method fails."),
    ("neurons", "Neurons", "How many neurons were blocked, and where."),
    ("detection", "Detection", "How well memorized prompts are told from others."),
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


def page(results: Results, rows: Sequence[Row], audit: str = "") -> str:
    """The whole page as HTML; prompts and all other texts of the run are escaped.

    The strips of a prompt are in a ``noscript`` element: the browser keeps them as text until the script asks for
    them, which is what keeps large pages quick, and shows them by itself where scripts are off.

    Args:
        results: The run.
        rows: Its leaderboard.
        audit: A section on audits; see :func:`nemo_bench.report.audit.audit_section`.
    """
    script = (FOLDER / "script.js").read_text(encoding="utf-8")
    figures = plots(results)
    found = {section: [plot for plot in figures if plot.section == section] for section, _, _ in _FIGURES}
    presets, models, detection = _presets(results), _models(results, rows), _detection(results)
    kept = {cell.name: Thumbnails(results.folder / cell.name) for cell in results.cells}
    examples, cards = _examples(results, kept), _cards(results, kept)
    for thumbnails in kept.values():
        thumbnails.keep()
    used = list(dict.fromkeys(info.family for info in results.metrics.values()))
    many = len(results.metrics) > _MANY
    costs = [key for key in _COSTS if any(key in cell.cost or key in cell.counts for cell in results.cells)]
    return render(
        "page.html.jinja",
        results=results,
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        looks=looks(results),
        facts=_facts(results),
        gaps=_gaps(results),
        sections=_sections(found, bool(examples), bool(models), bool(presets), bool(detection), bool(audit)),
        has_detection_page=(results.folder / "detection.html").is_file(),
        examples=examples,
        audit=Markup(audit),
        figure_sections=_FIGURES,
        plots=found,
        own_groups=results.own_groups,
        many=_MANY,
        groups=[(group, group, f"{results.heading(group)}: {results.meaning(group)}") for group in results.groups],
        model_options=[(model, model, "") for model in results.models],
        column_options=[(name, name, "") for name in ("main", *used, "all")] if many else [],
        main=set(results.leading.values()),
        columns=results.metrics,
        rows=_rows(results, rows),
        tested=any(row.corrected for row in rows),
        significance=SIGNIFICANCE,
        some_failed=any(row.failed for row in rows),
        failed_note=FAILED,
        searched=SEARCHES if any(row.cell.localization for row in rows) else "",
        best=BEST.format(clear="“Best”", unclear="“Best?”") if any(row.best for row in rows) else "",
        models=models,
        presets=presets,
        detection=detection,
        score_titles=[results.metrics[key].title for key in _scores(results)],
        order_title=_worst(results),
        cards=cards,
        kinds=[(g, g, "") for g in GROUPS if any(p.group == g for cell in results.cells for p in cell.prompts)],
        costs=[_COSTS[key] for key in costs],
        cost_rows=[(cell, [_cost({**cell.cost, **cell.counts}.get(key)) for key in costs]) for cell in results.cells],
        commands=list(dict.fromkeys(start["command"] for cell in results.cells for start in cell.starts)),
        citations=list(dict.fromkeys(text for cell in results.cells for text in cell.citations.values())),
        pretty=lambda content: json.dumps(content, indent=2, ensure_ascii=False, default=str),
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """What was run, for the head of the page."""
    prompts = {(cell.prompt_list, prompt.id) for cell in results.cells for prompt in cell.prompts}
    seeds = {seed for cell in results.cells for outcome in cell.outcomes.values() for seed in outcome.seeds}
    starts = [start for cell in results.cells for start in cell.starts]
    facts = [
        ("Model" + "s" * (len(results.models) > 1), ", ".join(results.models)),
        ("Methods", "; ".join(dict.fromkeys(cell.title for cell in results.cells))),
        ("Prompts", f"{len(prompts)} ({', '.join(dict.fromkeys(cell.prompt_list for cell in results.cells))})"),
        ("Images", f"{len(seeds)} of each prompt"),
    ]
    if starts:
        last = max(starts, key=lambda start: str(start["time"]))
        facts.append(("Run", str(last["time"])[:10]))
        facts += [("Version", v) for name, v in last["versions"].items() if name.replace("-", "_") == "nemo_bench"]
    return facts


def _gaps(results: Results) -> list[str]:
    """What is missing, once for each list of prompts and model that it is missing for."""
    found: dict[str, None] = {}
    for cell in results.cells:
        of = f" ({cell.prompt_list})" if len({c.prompt_list for c in results.cells}) > 1 else ""
        for key, words in _GAPS.items():
            if cell.counts.get(key):
                found[f"{words}{of}: {cell.counts[key]}"] = None
    return [*found, *(f"Not finite, and so without a value: {words}" for words in _failed(results))]


def _failed(results: Results) -> list[str]:
    """What failed in every cell, with the most frequent reason of images."""
    found = []
    for cell in results.cells:
        if words := str(cell.failures.get("all", "")):
            reasons = Counter(reason for outcome in cell.outcomes.values() for reason in outcome.failed.values())
            why = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
            found.append(f"{cell.label}: {words}{why}")
    return found


def _sections(
    found: dict[str, list[Plot]], examples: bool, models: bool, presets: bool, detection: bool, audit: bool
) -> dict[str, str]:
    """Title of every section that has something to show, by its anchor: pictures first, long tables last."""
    titles = {"examples": "Worst and best"} if examples else {}
    titles |= {"leaderboard": "Leaderboard"}
    titles |= {name: title for name, title, _ in _FIGURES if found[name] or (name == "detection" and detection)}
    titles |= {"audit": "Audit"} if audit else {}
    titles |= {"prompts": "Prompts"}
    titles |= {"models": "Models"} if models else {}
    titles |= {"presets": "As other papers"} if presets else {}
    return {**titles, "reproduce": "Reproduce"}


def _examples(results: Results, kept: Mapping[str, Thumbnails]) -> list[dict[str, Any]]:
    """The memorized prompts that the best mitigation of each model serves worst and best, with their first images."""
    key = results.leading.get("memorization")
    if key is None or results.metrics[key].per == "set":
        return []
    sign = -1 if results.metrics[key].higher_is_better else 1
    cells = {cell.name: cell for cell in results.cells}
    found = []
    for model in results.models:
        means = {
            cell.name: cell.prompt_means(key, MEMORIZED)
            for cell in results.cells
            if cell.model == model and cell.unmitigated in cells
        }
        means = {name: values for name, values in means.items() if values}
        # What failed may be what would have been bad.
        complete = {name: v for name, v in means.items() if all(cells[name].is_complete(g, key) for g in MEMORIZED)}
        means = complete or means
        if not means:
            continue
        cell = cells[min(means, key=lambda name: sign * fmean(means[name].values()))]
        order = sorted(means[cell.name], key=lambda prompt: -sign * means[cell.name][prompt])
        count = min(_EXAMPLES, max(1, len(order) // 2))
        prompts = {prompt.id: prompt for prompt in cell.prompts}
        ends = [("Worst", order[:count]), ("Best", order[count:][::-1][:count])]
        unmitigated = cells[cell.unmitigated or ""]
        examples = [
            _example(results, (unmitigated, cell), prompts[prompt], (word, means[cell.name][prompt]), kept)
            for word, end in ends
            for prompt in end
        ]
        found.append({"cell": cell, "metric": results.metrics[key].title, "prompts": examples})
    return found


def _example(
    results: Results,
    cells: tuple[Cell, Cell],
    prompt: Prompt,
    place: tuple[str, float],
    kept: Mapping[str, Thumbnails],
) -> dict[str, Any]:
    word, mean = place
    box = (SIZES[0].side, SIZES[0].side)
    pictures = [("Training image", kept[cells[1].name](path, box)) for path in prompt.references[:1]]
    for cell in cells:
        pictures += [(cell.short, kept[cell.name](i.path, box)) for i in cell.outcomes[prompt.id].images[:1]]
    return {
        "word": word,
        "prompt": prompt,
        "address": _address(results, cells[1], prompt),
        "mean": _number(results, results.leading["memorization"], mean),
        "pictures": pictures,
    }


def _address(results: Results, cell: Cell, prompt: Prompt) -> str:
    """What names a prompt in the page's address: its id, with the list's name where there are several lists."""
    lists = {cell.prompt_list for cell in results.cells}
    return f"{cell.prompt_list}/{prompt.id}" if len(lists) > 1 else prompt.id


def _number(results: Results, key: str, value: float, sign: str = "") -> str:
    return number(results, key, value, sign).replace("-", "−")


def _interval(results: Results, key: str, low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_number(results, key, low)} to {_number(results, key, high)}"


def _rows(results: Results, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of the leaderboard with every number as it is shown, and each interval as percent of its column's span."""
    columns = {}
    for key in results.metrics:
        ends = [end for row in rows if (v := row.values.get(key)) for end in (v.low, v.high, v.mean) if end is not None]
        columns[key] = (min(ends), (max(ends) - min(ends)) or 1.0) if ends else (0.0, 1.0)
    found = []
    for row in rows:
        values: dict[str, dict[str, Any]] = {}
        for key in results.metrics:
            if value := row.values.get(key):
                left, span = columns[key]
                low, high = (value.mean if end is None else end for end in (value.low, value.high))
                interval = _interval(results, key, value.low, value.high)
                few = fewer(row, value)
                values[key] = {
                    **_shown(results, row, key),
                    "sort": repr(value.mean),
                    "interval": ", ".join(words for words in (interval or "no interval", few) if words),
                    "median": _median(results, key, value),
                    "change": _change(results, row, key, value),
                    "test": _test(row, key, value),
                    "start": f"{100 * (low - left) / span:.2f}",
                    "width": f"{100 * (high - low) / span:.2f}" if interval else "",
                    "at": f"{100 * (value.mean - left) / span:.2f}",
                }
        failed = {"failed": row.failed, "failed_count": row.cell.failures.get(row.group, Failures()).total}
        searches = row.cell.searches(row.group)
        found.append({"cell": row.cell, "group": row.group, "values": values, "searches": searches, **failed})
    return found


def _shown(results: Results, row: Row, key: str) -> dict[str, Any]:
    best = ("best" if row.is_clear(key) else "best?") if key in row.best else ""
    against = f"p = {row.best[key]:.2g} against the runner-up" if best else ""
    mean = _number(results, key, row.values[key].mean)
    return {"mean": mean, "stars": row.stars(key), "best": best, "against": against}


def _median(results: Results, key: str, value: Aggregate) -> str:
    if value.median is None or value.mad is None:
        return ""
    return f"median {_number(results, key, value.median)} ± {number(results, key, value.mad)}"


def _change(results: Results, row: Row, key: str, value: Aggregate) -> str:
    if not value.paired:
        return ""
    better, ends = results.metrics[key].higher_is_better, (value.paired.low, value.paired.high)
    words = f"{_number(results, key, value.paired.difference, '+')} ({_interval(results, key, *ends)})"
    if better is None or value.paired.p >= _CHANCE or not row.cell.is_complete(row.group, key):
        return words
    return f"{words} {'better' if (value.paired.difference > 0) == better else 'worse'}"


def _test(row: Row, key: str, value: Aggregate) -> str:
    if not value.paired:
        return ""
    return f"p = {value.paired.p:.2g}, Holm-corrected {row.corrected[key]:.2g}, {value.paired.prompts} prompts"


def _models(results: Results, rows: Sequence[Row]) -> dict[str, Any]:
    """The leading metrics, models beside each other, a method and group a row; nothing for a single model."""
    if len(results.models) == 1:
        return {}
    keys = list(results.leading.values())
    lists = {cell.prompt_list for cell in results.cells}
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.group, row.cell.short, row.cell.prompt_list), {})[row.cell.model] = row
    return {
        "columns": keys,
        "rows": [
            {
                "group": group,
                "name": f"{short} · {prompts}" if len(lists) > 1 else short,
                "cell": next(iter(of.values())).cell,
                "values": [
                    _shown(results, of[model], key) if model in of and key in of[model].values else None
                    for key in keys
                    for model in results.models
                ],
            }
            for (group, short, prompts), of in found.items()
        ],
    }


def _presets(results: Results) -> list[dict[str, Any]]:
    """A table for each preset: value ± spread and interval by cell and group."""
    found = []
    for name in dict.fromkeys(name for cell in results.cells for name in cell.presets):
        cells = [cell for cell in results.cells if name in cell.presets]
        about = cells[0].presets[name]
        keys = list(dict.fromkeys(k for cell in cells for row in cell.presets[name].rows.values() for k in row))
        rows = []
        for group in GROUPS:
            for cell in cells:
                if statistics := cell.presets[name].rows.get(group):
                    values = [_statistic(results, key, statistics[key]) if key in statistics else None for key in keys]
                    rows.append({"group": group, "cell": cell, "values": values})
        titles = [_column(results, key) for key in keys]
        found.append({
            "title": about.title, "definition": about.definition, "citation": about.citation, "columns": titles,
            "rows": rows, "warning": "" if any("sscd" in key.lower() for key in [*keys, *titles]) else _NO_SSCD,
        })  # fmt: skip
    return found


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
        for found in cell.detection.values():
            rates = (
                found.average_precision, found.tpr_at_1_fpr_below, found.tpr_at_1_fpr_nearest,
                found.tpr_at_1_fpr_first, found.best_accuracy,
            )  # fmt: skip
            numbers = [(f"{found.auc:.3f}", _interval(results, "", found.auc_low, found.auc_high))]
            numbers += [(f"{rate:.3f}", "") for rate in rates]
            numbers += [(str(count), "") for count in (found.memorized, found.other)]
            rows.append({"cell": cell, "title": found.title, "numbers": numbers})
    return rows


def _cards(results: Results, kept: Mapping[str, Thumbnails]) -> list[dict[str, Any]]:
    """The gallery: one card a prompt, one strip a cell. Cards are made side by side, since images take the time."""
    prompts: dict[tuple[str, str], list[tuple[Cell, Prompt]]] = {}
    for cell in results.cells:
        for prompt in cell.prompts:
            prompts.setdefault((cell.prompt_list, prompt.id), []).append((cell, prompt))
    strips = sum(len(cells) for cells in prompts.values())
    size = next(size for size in SIZES if strips <= size.strips)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda found: _card(results, found, size, kept), prompts.values()))


def _card(
    results: Results, found: Sequence[tuple[Cell, Prompt]], size: Size, kept: Mapping[str, Thumbnails]
) -> dict[str, Any]:
    prompt, own = found[0][1], {cell.name for cell, _ in found}
    seeds = sorted({seed for cell, _ in found for seed in cell.outcomes[prompt.id].seeds})
    key = results.leading.get("memorization", "")
    sign = -1 if key and results.metrics[key].higher_is_better else 1
    order = [cell.outcomes[prompt.id].values(key) if cell.name in own else [] for cell in results.cells]
    reference, make = prompt.references[:1], kept[found[0][0].name]
    return {
        "prompt": prompt,
        "address": _address(results, found[0][0], prompt),
        "reference": make(reference[0], (size.side, size.side)) if reference else None,
        "seeds": len(seeds),
        "shown": min(size.seeds, len(seeds)),
        "order": [f"{sign * fmean(values):.4f}" if values else "" for values in order],
        "strips": [_strip(results, cell, prompt, seeds[: size.seeds], size, kept[cell.name]) for cell, _ in found],
    }


def _strip(
    results: Results, cell: Cell, prompt: Prompt, seeds: Sequence[int], size: Size, make: Thumbnails
) -> dict[str, Any]:
    outcome = cell.outcomes[prompt.id]
    by_seed = {image.seed: image for image in outcome.images}
    scores = []
    for key in _scores(results):
        values = outcome.values(key)
        scores.append((results.metrics[key].title, _number(results, key, median(values)) if values else "–"))
    short = short_layers(cell.layers)
    return {
        "cell": cell,
        "images": [_image(results, cell, seed, by_seed.get(seed), outcome.failed, size, make) for seed in seeds],
        "has_noise": outcome.noise is not None,
        "noise": make(outcome.noise, (16 * size.noise, size.noise), lossless=False) if outcome.noise else None,
        "scores": scores,
        "neurons": outcome.neurons.count,
        "layers": [(short[layer], outcome.neurons[layer]) for layer in cell.layers if layer in outcome.neurons],
    }


def _image(
    results: Results,
    cell: Cell,
    seed: int,
    image: GeneratedImage | None,
    failed: Mapping[int, str],
    size: Size,
    make: Thumbnails,
) -> tuple[str, str, Thumbnail | None]:
    """What an image is, its scores, and the image."""
    if image is None:
        why = f"failed: {failed[seed]}" if seed in failed else "not generated"
        return f"{cell.label}, seed {seed}: {why}", "", None
    scores = [
        f"{info.title} {_number(results, key, image.scores[key])}"
        for key, info in results.metrics.items()
        if key in image.scores
    ]
    return f"{cell.label}, seed {seed}", "\n".join(scores), make(image.path, (size.side, size.side))


def _scores(results: Results) -> list[str]:
    """What is shown beside a strip: the first metric of every family, then those of prompts, as many as there is room.

    Neurons have a column of their own.
    """
    wanted = dict.fromkeys([*results.leading.values(), *(k for k, i in results.metrics.items() if i.per == "prompt")])
    return [key for key in wanted if results.metrics[key].per != "set" and key != "neurons"][:_SCORES]


def _worst(results: Results) -> str:
    """Title of what prompts can be put in order of."""
    key = results.leading.get("memorization")
    return results.metrics[key].title if key and results.metrics[key].per != "set" else ""


def _cost(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
