"""Table, ROC curves and page of the detectors of a run, made from their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from nemo_bench.records.data import Prompt
from nemo_bench.records.io import write_json, write_text
from nemo_bench.records.results import DetectorResults
from nemo_bench.records.schema import DetectionRow, DetectionTable, Spec
from nemo_bench.report.tables import markdown_table
from nemo_bench.report.texts import TEXTS
from nemo_bench.report.thumbnails import Thumbnails

COLUMNS: dict[str, tuple[str, str]] = TEXTS["detectors"]["columns"]
"""Titles and formats of the columns of the table, by measure or cost."""
_PIXELS = 640


def write_detection(detectors: Sequence[DetectorResults]) -> Path:
    """Writes ``detection.html``, ``detection.md`` and ``detection.json`` into the folder of a run; gives the page."""
    folder = detectors[0].folder.parent
    table = DetectionTable(name=folder.name, detectors=[_row(detector) for detector in detectors])
    write_json(folder / "detection.json", table)
    write_text(folder / "detection.md", markdown(detectors))
    page = folder / "detection.html"
    write_text(page, _page(folder, detectors))
    return page


def _row(detector: DetectorResults) -> DetectionRow:
    spec = detector.spec
    return DetectionRow(
        cell=spec.cell,
        model=spec.model,
        detector=spec.detector or "",
        label=detector.label,
        title=spec.title,
        cost=detector.summary.cost,
        settings=spec.settings["detector"],
        model_settings=spec.settings["model"],
        roc=detector.roc,
        **detector.summary.counts,
    )


def comparable(detectors: Sequence[DetectorResults]) -> list[tuple[str, list[DetectorResults]]]:
    """Detectors to be compared with one another, under the names of their model and prompts.

    Settings of the model follow where groups of the same names differ in them.
    """
    groups = [list(group) for _, group in groupby(detectors, lambda d: d.compared_with)]
    titled = []
    for group in groups:
        names = group[0].compared_with[:2]
        others = [model_settings(other[0].spec) for other in groups if other[0].compared_with[:2] == names]
        own = model_settings(group[0].spec).items()
        differing = [f"{key} {value}" for key, value in own if any(other.get(key) != value for other in others)]
        titled.append((" · ".join([*names, *differing]), group))
    return titled


def model_settings(spec: Spec) -> dict[str, Any]:
    """Settings of the model that decide scores, flat: ``similarity.sigma`` beside ``steps``."""
    flat: dict[str, Any] = {}
    for key, value in spec.settings["model"].items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def texts(detector: DetectorResults) -> dict[str, str]:
    """Texts below the titles of :data:`COLUMNS`."""
    roc = detector.roc
    values = {**(roc.model_dump() if roc else {}), **(roc.kinds if roc else {}), **detector.summary.cost}
    return {key: "–" if values.get(key) is None else form.format(**values) for key, (_, form) in COLUMNS.items()}


def count_of(detector: DetectorResults) -> str:
    """Numbers of its prompts, such as ``20 memorized and 20 other prompts``."""
    memorized = sum(bool(p.kind) for p in detector.prompts)
    return f"{memorized} memorized and {len(detector.prompts) - memorized} other prompts"


def _lines(group: Sequence[DetectorResults], *, some_failed: bool) -> list[list[str]]:
    """Titles, then one line a detector; with a column of failures where there are any on the page."""
    lines = [["Detector", *(title for title, _ in COLUMNS.values()), *["Failed"] * some_failed]]
    for detector in group:
        failed = f"{detector.failed} of {len(detector.prompts)}" if detector.failed else "–"
        lines.append([detector.label, *texts(detector).values(), *[failed] * some_failed])
    return lines


def markdown(detectors: Sequence[DetectorResults]) -> str:
    """The table as a Markdown document, one for each model and its prompts."""
    some_failed = any(detector.failed for detector in detectors)
    parts = ["# Detection\n"]
    for heading, group in comparable(detectors):
        lines = _lines(group, some_failed=some_failed)
        table = markdown_table(lines, ["---", *["---:"] * (len(lines[0]) - 1)])
        parts.append(f"## {heading}: {count_of(group[0])}\n\n{table}")
    return "\n".join([*parts, TEXTS["detectors"]["note"] + "\n"])


def _page(folder: Path, detectors: Sequence[DetectorResults]) -> str:
    from nemo_bench.report.plots import detector_curves  # matplotlib is slow to import
    from nemo_bench.report.templates import render

    thumbnails = {detector.folder: Thumbnails(detector.folder) for detector in detectors}
    some_failed = any(detector.failed for detector in detectors)
    sections = []
    for number, (heading, group) in enumerate(comparable(detectors)):
        titles, *lines = _lines(group, some_failed=some_failed)
        curves = [(d.label, d.roc) for d in group if d.roc]
        sections.append({
            "about": heading,
            "count": count_of(group[0]),
            "titles": titles,
            "rows": [(detector.folder.name, line) for detector, line in zip(group, lines, strict=True)],
            "plot": detector_curves(curves, f"roc-{number}", heading) if curves else "",
            "labels": [detector.label for detector in group],
            "prompts": [_prompt(group, prompt, thumbnails) for prompt in group[0].prompts],
        })  # fmt: skip
    for of_cell in thumbnails.values():
        of_cell.save()
    return render(
        "detectors.html.jinja",
        name=folder.name,
        has_report=(folder / "report.html").is_file(),
        sections=sections,
        citations={title: text for detector in detectors for title, text in detector.spec.citations.items()},
    )


def _prompt(group: Sequence[DetectorResults], prompt: Prompt, thumbnails: Mapping[Path, Thumbnails]) -> dict[str, Any]:
    """A line of the page: scores, tokens as far as a detector explains them, pictures."""
    records = [(detector, detector.records[prompt.id]) for detector in group]
    explained = (r.details["tokens"] for _, r in records if r.details and "tokens" in r.details)
    tokens: Sequence[tuple[str, float]] = next(explained, [])
    return {
        "prompt": prompt,
        "tokens": tokens,
        "largest": max((value for _, value in tokens), default=0.0) or 1.0,
        "scores": [(record, _below(detector, record.score)) for detector, record in records],
        "pictures": [
            (detector.label, thumbnails[detector.folder](detector.folder / record.image, (_PIXELS, _PIXELS)))
            for detector, record in records
            if record.image
        ],
    }


def _below(detector: DetectorResults, score: float | None) -> float:
    """Share of prompts that are not memorized and score below."""
    others = detector.scores(memorized=False)
    return sum(other < score for other in others) / len(others) if others and score is not None else 0.0
