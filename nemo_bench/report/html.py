"""The page: everything a run found, in one file that needs no network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from nemo_bench.aggregate import GROUPS
from nemo_bench.report.data import Cell, GeneratedImage, Results, short_layers
from nemo_bench.report.plots import PALETTE, looks, plots
from nemo_bench.report.tables import decimals, leaderboard
from nemo_bench.types import Prompt

SIDE = 96
"""Longest side of an embedded image, in pixels."""

IMAGES = 4000
"""About how many generated images a page holds; runs with more show fewer seeds of every prompt."""

_SEEDS = 8
_TILE = 48
_SCORES = ("ssim", "diversity", "memorization", "neurons")


@dataclass(frozen=True)
class Thumbnail:
    """An embedded image.

    Attributes:
        uri: Data URI.
        width: In pixels.
        height: In pixels.
        tiny: The image was not made smaller, so its pixels may be shown as squares.
    """

    uri: str
    width: int
    height: int
    tiny: bool


def page(results: Results) -> str:
    """The whole page as HTML; prompts and all other texts of the run are escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.jinja").render(
        results=results,
        looks=looks(results),
        facts=_facts(results),
        palette=PALETTE,
        groups={group: _meaning(results, group) for group in results.groups},
        columns=results.metrics,
        rows=_rows(results),
        plots=plots(results),
        score_titles=[results.metrics[key].title for key in _scores(results)],
        cards=_cards(results),
        kinds=[g for g in GROUPS if any(p.group == g for cell in results.cells for p in cell.prompts)],
        costs=list(dict.fromkeys(key for cell in results.cells for key in cell.cost)),
        commands=list(dict.fromkeys(start["command"] for cell in results.cells for start in cell.starts)),
        citations={name: text for cell in results.cells for name, text in cell.citations.items()},
        pretty=lambda content: json.dumps(content, indent=2, ensure_ascii=False, default=str),
    )


def thumbnail(path: Path, box: tuple[int, int] = (SIDE, SIDE)) -> Thumbnail | None:
    """An image as WebP, made to fit a box and without loss if it already does; None if there is no image to read."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError:
        return None
    tiny = image.width <= box[0] and image.height <= box[1]
    image.thumbnail(box, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=tiny, quality=80, method=4)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(uri, image.width, image.height, tiny)


def _meaning(results: Results, group: str) -> str:
    count = len({(c.prompt_list, p.id) for c in results.cells for p in c.prompts if group in (p.group, "all")})
    return f"{GROUPS[group]}, {count} prompt{'s' * (count != 1)}"


def _facts(results: Results) -> list[tuple[str, str]]:
    """What was run, for the head of the page."""
    prompts = {(cell.prompt_list, prompt.id) for cell in results.cells for prompt in cell.prompts}
    seeds = {image.seed for cell in results.cells for outcome in cell.outcomes.values() for image in outcome.images}
    starts = [start for cell in results.cells for start in cell.starts]
    facts = [
        ("Model", ", ".join(dict.fromkeys(cell.model for cell in results.cells))),
        ("Methods", ", ".join(dict.fromkeys(cell.title for cell in results.cells))),
        ("Prompts", f"{len(prompts)} ({', '.join(dict.fromkeys(cell.prompt_list for cell in results.cells))})"),
        ("Images", f"{len(seeds)} of each prompt"),
    ]
    if starts:
        last = max(starts, key=lambda start: str(start["time"]))
        facts.append(("Run", str(last["time"])[:10]))
        facts += [("Version", v) for name, v in last["versions"].items() if name.replace("-", "_") == "nemo_bench"]
    return facts


def _rows(results: Results) -> list[dict[str, Any]]:
    """Rows of the leaderboard with every number as it is shown, and each interval as percent of its column's span."""
    rows = leaderboard(results)
    found = []
    for row in rows:
        values: dict[str, dict[str, Any]] = {}
        for key in results.metrics:
            if value := row.values.get(key):
                digits = decimals(results, key)
                ends = [end for r in rows if (v := r.values.get(key)) for end in (v.low, v.high, v.mean)]
                left, span = min(ends), (max(ends) - min(ends)) or 1.0
                names = ("mean", "low", "high", "median", "mad")
                values[key] = {name: f"{getattr(value, name):.{digits}f}" for name in names}
                values[key] |= {
                    "sort": repr(value.mean),
                    "best": key in row.best,
                    "start": f"{100 * (value.low - left) / span:.2f}",
                    "width": f"{100 * (value.high - value.low) / span:.2f}",
                    "at": f"{100 * (value.mean - left) / span:.2f}",
                }
        found.append({"cell": row.cell, "group": row.group, "values": values})
    return found


def _cards(results: Results) -> list[dict[str, Any]]:
    """The gallery: one card a prompt, one strip a cell."""
    prompts: dict[tuple[str, str], list[tuple[Cell, Prompt]]] = {}
    for cell in results.cells:
        for prompt in cell.prompts:
            prompts.setdefault((cell.prompt_list, prompt.id), []).append((cell, prompt))
    strips = sum(len(cells) for cells in prompts.values())
    shown = max(1, min(_SEEDS, IMAGES // max(strips, 1)))
    cards = []
    for found in prompts.values():
        prompt = found[0][1]
        seeds = sorted({image.seed for cell, _ in found for image in cell.outcomes[prompt.id].images})
        cards.append({
            "prompt": prompt,
            "reference": thumbnail(prompt.references[0]) if prompt.references else None,
            "seeds": len(seeds),
            "shown": min(shown, len(seeds)),
            "strips": [_strip(results, cell, prompt, seeds[:shown]) for cell, _ in found],
        })  # fmt: skip
    return cards


def _strip(results: Results, cell: Cell, prompt: Prompt, seeds: Sequence[int]) -> dict[str, Any]:
    outcome = cell.outcomes[prompt.id]
    by_seed = {image.seed: image for image in outcome.images}
    scores = []
    for key in _scores(results):
        values = outcome.values(key)
        places = 0 if key == "neurons" else decimals(results, key)
        scores.append((results.metrics[key].title, f"{median(values):.{places}f}" if values else "–"))
    short = short_layers(cell.layers)
    layers = [(short[layer], list(outcome.neurons[layer])) for layer in cell.layers if layer in outcome.neurons]
    return {
        "cell": cell,
        "images": [_image(cell, seed, by_seed.get(seed), results) for seed in seeds],
        "noise": thumbnail(outcome.noise, (16 * _TILE, _TILE)) if outcome.noise else None,
        "scores": scores,
        "layers": layers,
    }


def _image(cell: Cell, seed: int, image: GeneratedImage | None, results: Results) -> tuple[str, Thumbnail | None]:
    """What an image is, and the image."""
    if image is None:
        return f"{cell.label}, seed {seed}: not generated", None
    scores = [f"{info.title} {image.scores[key]:.3f}" for key, info in results.metrics.items() if key in image.scores]
    return ", ".join([f"{cell.label}, seed {seed}", *scores]), thumbnail(image.path)


def _scores(results: Results) -> list[str]:
    return [key for key in _SCORES if key in results.metrics]
