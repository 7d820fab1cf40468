"""Table and page of the localizers of regions of a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_bench.errors import counted
from nemo_bench.records.io import write_json, write_text
from nemo_bench.records.schema import RegionImage, RegionPrompt, RegionRow, RegionTable
from nemo_bench.report.tables import markdown_table
from nemo_bench.report.texts import TEXTS
from nemo_bench.report.thumbnails import Thumbnails

FILES = ("regions.json", "regions.csv", "regions.md", "regions.html")
_TEXTS: dict[str, Any] = TEXTS["regions"]
_PIXELS = 640


def write_regions(folder: Path, table: RegionTable) -> Path:
    """Writes :data:`FILES` into the folder of a run; gives the page."""
    write_json(folder / FILES[0], table)
    write_text(folder / FILES[1], csv_text(table))
    write_text(folder / FILES[2], markdown(table))
    write_text(folder / FILES[3], _page(folder, table))
    return folder / FILES[3]


def titles() -> list[str]:
    """Titles of the columns of the table."""
    return ["Localizer", *_TEXTS["columns"].values(), *(title for title, _ in _TEXTS["costs"].values())]


def sections(table: RegionTable) -> list[tuple[str, list[list[str]]]]:
    """Lines of the table, under headings such as ``planted · planted, prompts memorized in part: 8 prompts``."""
    found = []
    for place, rows in comparable(table).items():
        for name, meaning in _TEXTS["sets"].items():
            own = [(row, row.sets[name]) for row in rows if name in row.sets]
            if not own:
                continue
            most = max((numbers for _, numbers in own), key=lambda numbers: numbers.images)
            count = f"{counted(most.images, 'image')} of {counted(most.prompts, 'prompt')}"
            lines = []
            for share in sorted({numbers.share for _, numbers in own}):
                of_all = {"iou": share, "best_iou": share, "rest_iou": 0.0}
                of_all |= {"average_precision": share} if name == "partial" else {}
                lines.append([_TEXTS["everything"], *map(_number, map(of_all.get, _TEXTS["columns"])), "–", "–"])
            for row, numbers in own:
                values = [_number(getattr(numbers, key)) for key in _TEXTS["columns"]]
                costs = [form.format(row.cost.get(key, 0)) for key, (_, form) in _TEXTS["costs"].items()]
                lines.append([row.label, *values, *costs])
            found.append((f"{place}, {meaning}: {count}", lines))
    return found


def comparable(table: RegionTable) -> dict[str, list[RegionRow]]:
    """Rows by the names of model and prompts, and where these were compared with several masks by their digest."""
    masks: dict[tuple[str, str], set[str]] = {}
    for row in table.rows:
        masks.setdefault((row.model, row.prompts), set()).add(row.masks)
    groups: dict[str, list[RegionRow]] = {}
    for row in table.rows:
        several = len(masks[row.model, row.prompts]) > 1
        words = [row.model, row.prompts, *([f"masks {row.masks[:8]}"] if several else [])]
        groups.setdefault(" · ".join(words), []).append(row)
    return groups


def gaps(table: RegionTable) -> list[str]:
    """What does not count or was not checked, a line for each localizer; and that masks differ, where they do."""
    lines = (
        [TEXTS["regions"]["masks"]] if len(comparable(table)) > len({(r.model, r.prompts) for r in table.rows}) else []
    )
    for row in table.rows:
        parts = [
            f"{counted(row.left_out, 'image')} unlike the training images" if row.left_out else "",
            f"{counted(row.unchecked, 'image')} without training images, all of which count" if row.unchecked else "",
            f"{counted(row.unknown, 'memorized prompt')} without a mask" if row.unknown else "",
            f"{counted(row.failed, 'prompt')} without finite maps" if row.failed else "",
        ]
        if any(parts):
            lines.append(f"{row.label}: {', '.join(filter(None, parts))}")
    return lines


def mean_of(result: RegionPrompt, key: str) -> float | None:
    """Mean of a number of images that have it; None where none has."""
    values = [value for image in result.images if (value := getattr(image, key)) is not None]
    return fmean(values) if values else None


def markdown(table: RegionTable) -> str:
    """The table as a Markdown document."""
    parts = [f"# {table.name}: regions\n"]
    for heading, lines in sections(table):
        aligned = ["---", *["---:"] * (len(titles()) - 1)]
        parts.append(f"## {heading}\n\n{markdown_table([titles(), *lines], aligned)}")
    parts += [f"- {line}\n" for line in gaps(table)]
    return "\n".join([*parts, _TEXTS["note"] + "\n"])


def csv_text(table: RegionTable) -> str:
    """Every image as a line of CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    own = [*RegionImage.model_fields]
    writer.writerow(["cell", "label", "model", "localizer", "prompts", "prompt", "group", "share", *own])
    for row in table.rows:
        for result in row.results:
            about = [row.cell, row.label, row.model, row.localizer, row.prompts]
            about += [result.prompt, result.group, str(result.share)]
            for image in result.images:
                writer.writerow([*about, *(getattr(image, name) for name in own)])
    return buffer.getvalue()


def _number(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 3) + 0.0:.3f}"


def _page(folder: Path, table: RegionTable) -> str:
    from nemo_bench.report.templates import render

    citations = {title: text for row in table.rows for title, text in row.citations.items()}
    return render(
        "regions.html.jinja",
        name=table.name,
        files=FILES[:3],
        titles=titles(),
        sections=sections(table),
        gaps=gaps(table),
        pictures=[(place, _pictures(folder, rows)) for place, rows in comparable(table).items()],
        citations=citations,
    )


def _pictures(folder: Path, rows: Sequence[RegionRow]) -> list[dict[str, Any]]:
    """The prompts that have pictures, each with those of all localizers."""
    thumbnails = {row.cell: Thumbnails(folder / row.cell) for row in rows}
    prompts: dict[str, dict[str, Any]] = {}
    for row in rows:
        for result in (result for result in row.results if result.sheet):
            picture = thumbnails[row.cell](folder / row.cell / str(result.sheet), (_PIXELS, _PIXELS))
            numbers = {"IoU": mean_of(result, "iou"), "AP": mean_of(result, "average_precision")}
            words = [f"{name} {value:.3f}" for name, value in numbers.items() if value is not None]
            shown = prompts.setdefault(result.prompt, {"prompt": result, "sheets": []})
            shown["sheets"].append((row.label, ", ".join(words) or "no image counts", picture))
    for of_cell in thumbnails.values():
        of_cell.save()
    return sorted(prompts.values(), key=lambda shown: shown["prompt"].share in (0, 1))  # in part memorized ones first
