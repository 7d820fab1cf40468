"""Table, ROC plots and page of the detectors that a run folder holds, made from their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from nemo_bench.errors import StoreError
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import damaged, digest, read_object, write_json, write_text
from nemo_bench.records.store import SCHEMA, read_cell_prompts, read_checked, read_spec
from nemo_bench.report.svg import INK, nth_look, style, svg
from nemo_bench.report.templates import render
from nemo_bench.report.thumbnails import Thumbnails

_PIXELS = 640
_COLUMNS = {
    "auc": "AUC",
    "VM": "VM",
    "TM": "TM",
    "tpr_at_1_fpr_below": "TPR<1%",
    "tpr_at_1_fpr_nearest": "TPR≈1%",
    "tpr_at_1_fpr_first": "first≈1%",
    "best_accuracy": "Acc.",
    "detect_row_passes_per_prompt": "Passes",
    "detect_extra_row_passes_per_prompt": "Own",
    "detect_seconds_per_prompt": "s",
}
NOTE = (
    "AUC with its 95% bootstrap interval over prompts, over all memorized prompts and over those of a kind. TPR at "
    "the last point with fewer than 1% false positives (<), and at the one nearest to 1% (≈): the highest of equally "
    "near ones, and the first of those that scikit-learn keeps. Accuracy is the best of all thresholds, either sort of "
    "prompts counting half. UNet passes and seconds are a prompt's, as if the detector ran alone; own passes are those "
    "that no other detector could share. A derivative counts as one more pass. Failed are prompts without a finite "
    "score, which nothing else rests on; a detector with any is not ranked above one without."
)
"""How to read the table."""


@dataclass(frozen=True)
class Detection:
    """What a finished detector found.

    Attributes:
        folder: Its results.
        spec: ``spec.json``.
        summary: ``metrics.json``.
        prompts: The prompts.
        records: By prompt id.
        label: Title, and the settings by which it differs from others of this title.
    """

    folder: Path
    spec: Mapping[str, Any]
    summary: Mapping[str, Any]
    prompts: Sequence[Prompt]
    records: Mapping[str, Mapping[str, Any]]
    label: str

    @property
    def about(self) -> tuple[str, str, str, str]:
        """Names of model and prompts, and digests of both: a name may stand for other settings or fewer prompts."""
        names = self.spec["model"], self.spec["prompts"]
        return *names, self.spec["digests"]["prompts"], digest(self.spec["settings"]["model"])

    @property
    def model_settings(self) -> dict[str, Any]:
        """What of the model decides scores, flat: ``similarity.sigma`` beside ``steps``."""
        flat = {}
        for key, value in self.spec["settings"]["model"].items():
            inner = {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, Mapping) else {key: value}
            flat.update(inner)
        return flat

    @property
    def measures(self) -> Mapping[str, Any]:
        """See :func:`nemo_bench.metrics.roc`; empty where prompts are of one sort."""
        return next(iter(self.summary["detection"].values()), {})

    def scores(self, *, memorized: bool) -> list[float]:
        """Finite scores of prompts of one sort, in their order."""
        own = (self.records[p.id] for p in self.prompts if bool(p.kind) == memorized)
        return [record["score"] for record in own if "score" in record]

    @property
    def failed(self) -> str:
        """How many prompts have no finite score, such as ``3 of 20``; empty where all have one."""
        count = self.summary["counts"].get("failed", 0)
        return f"{count} of {len(self.prompts)}" if count else ""

    def number(self, key: str) -> float | None:
        """A measure or a cost."""
        values = {**self.measures, **self.measures.get("kinds", {}), **self.summary["cost"]}
        return values.get(key)


def load_detections(folder: Path | str) -> list[Detection]:
    """Every finished detector of a run, the best first within its model and prompts, those with failures last.

    Raises:
        StoreError: There is none.
    """
    found = []
    for path in sorted(Path(folder).glob("*/spec.json")):
        cell = path.parent
        if "detector" in read_object(path) and (cell / "metrics.json").is_file():
            spec = read_spec(cell)
            prompts = read_cell_prompts(cell, spec)
            records = {record["prompt"]: record for record in read_checked(cell, "detect")}
            if missing := sum(prompt.id not in records for prompt in prompts):
                msg = f"{cell}: {missing} of {len(prompts)} records are missing"
                raise StoreError(f"{msg}; the same nemo-bench detect makes them again, and nothing else")
            summary = read_object(cell / "metrics.json", "detection", "cost")
            if not all(isinstance(summary[key], dict) for key in ("detection", "cost")):
                raise damaged(cell / "metrics.json", "no measures")
            found.append(Detection(cell, spec, summary, prompts, records, ""))
    if not found:
        raise StoreError(f"{folder} holds no finished detector; run nemo-bench detect")
    named = [Detection(**{**vars(d), "label": _label(d, found)}) for d in found]
    return sorted(named, key=lambda d: (d.about, bool(d.failed), -d.measures.get("auc", 0.0), d.label))


def _label(one: Detection, others: Sequence[Detection]) -> str:
    """Its title, and the settings in which others of its model, prompts and title differ."""
    alike = [d for d in others if d.about == one.about and d.spec["title"] == one.spec["title"]]
    own: Mapping[str, Any] = one.spec["settings"]["detector"]
    differing = [key for key in own if any(d.spec["settings"]["detector"].get(key) != own[key] for d in alike)]
    words = [f"{key} {'all' if own[key] is None else own[key]}" for key in differing]
    if len(alike) > 1 and not words:
        words = [one.spec["detector"]]  # two files of equal settings
    return ", ".join([one.spec["title"], *words])


def write_detection(folder: Path | str) -> Path:
    """Writes ``detection.html``, ``detection.md`` and ``detection.json`` into the folder of a run.

    Args:
        folder: Such as ``results/default``.

    Returns:
        The page.

    Raises:
        StoreError: The folder holds no finished detector.
    """
    folder = Path(folder)
    found = load_detections(folder)
    rows = [
        {
            **{key: d.spec[key] for key in ("cell", "model", "detector", "prompts")},
            "label": d.label,
            **d.measures,
            **d.summary["cost"],
            **d.summary["counts"],
            "settings": d.spec["settings"]["detector"],
            "model_settings": d.spec["settings"]["model"],
        }
        for d in found
    ]
    write_json(folder / "detection.json", {"schema": SCHEMA, "name": folder.name, "detectors": rows})
    write_text(folder / "detection.md", markdown(found))
    page = folder / "detection.html"
    write_text(page, _page(folder.name, found, has_report=(folder / "report.html").is_file()))
    return page


def _groups(found: Sequence[Detection]) -> list[tuple[str, list[Detection]]]:
    """Detectors to be compared with one another, under the names of their model and prompts.

    With those stand the model's settings by which groups of the same names differ.
    """
    groups = [list(group) for _, group in groupby(found, lambda d: d.about)]
    titled = []
    for group in groups:
        own, names = group[0].model_settings, group[0].about[:2]
        others = [g[0].model_settings for g in groups if g[0].about[:2] == names]
        differing = [f"{k} {v}" for k, v in own.items() if any(other.get(k) != v for other in others)]
        titled.append((" · ".join([*names, *differing]), group))
    return titled


def _texts(found: Detection) -> dict[str, str]:
    """What stands in the columns of the table."""
    texts = {}
    for key in _COLUMNS:
        value = found.number(key)
        if value is None:
            texts[key] = "–"
        elif key == "auc":
            texts[key] = f"{value:.3f} {found.number('auc_low'):.2f}–{found.number('auc_high'):.2f}"
        elif key.startswith("detect_"):
            texts[key] = f"{value:.2f}" if "seconds" in key else f"{value:g}"
        else:
            texts[key] = f"{value:.3f}"
    return texts


def _titles(found: Sequence[Detection]) -> list[str]:
    """Titles of the columns, with one for failures where there are any."""
    return ["Detector", *_COLUMNS.values(), *["Failed"] * any(d.failed for d in found)]


def _lines(group: Sequence[Detection], titles: Sequence[str]) -> list[list[str]]:
    """What stands below the titles, one line a detector."""
    return [[d.label, *_texts(d).values(), d.failed or "–"][: len(titles)] for d in group]


def markdown(found: Sequence[Detection]) -> str:
    """The table as a Markdown document, one for each model and its prompts."""
    titles = _titles(found)
    parts = ["# Detection\n"]
    for about, group in _groups(found):
        lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *_lines(group, titles)]
        table = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
        parts.append(f"## {about}: {_count(group[0])}\n\n{table}")
    return "\n".join([*parts, NOTE + "\n"])


def _count(found: Detection) -> str:
    memorized = sum(bool(p.kind) for p in found.prompts)
    return f"{memorized} memorized and {len(found.prompts) - memorized} other prompts"


def terminal_detection(found: Sequence[Detection]) -> list[Table]:
    """The table for the terminal, one for each model and its prompts; kinds apart are left to the page."""
    columns = [key for key in _COLUMNS if key not in ("VM", "TM")]
    tables = []
    for about, group in _groups(found):
        table = Table(
            title=f"{escape(about)}: {_count(group[0])}", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
        )
        table.add_column("Detector")
        for key in columns:
            table.add_column(_COLUMNS[key], justify="right", no_wrap=True)
        for detector in group:
            note = f"\n[yellow]failed: {detector.failed} prompts[/yellow]" if detector.failed else ""
            table.add_row(f"{escape(detector.label)}{note}", *(_texts(detector)[key] for key in columns))
        tables.append(table)
    return tables


def _roc_plot(group: Sequence[Detection], name: str, about: str) -> str:
    """ROC curves of detectors over the same prompts, or nothing where they are of one sort."""
    drawn = [d for d in group if d.measures]
    if not drawn:
        return ""
    with style():
        figure = Figure(figsize=(9.0, 4.8), layout=ConstrainedLayoutEngine(h_pad=0.12))
        axes, legend = figure.subplots(1, 2, width_ratios=[1.1, 1])
        axes.grid()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.4, linestyle=":")
        axes.axvline(0.01, color=INK, linewidth=0.8, alpha=0.4, linestyle="--")
        for number, detector in enumerate(drawn):
            look, rates = nth_look(number), zip(*detector.measures["curve"], strict=True)
            words = f"{detector.label}: AUC {detector.measures['auc']:.3f}"
            axes.plot(*rates, color=look.color, marker=look.marker, markevery=0.2, ms=5, label=words, clip_on=False)
        axes.set_xlabel("False positive rate (dashed: 1%)")
        axes.set_ylabel("True positive rate")
        axes.set_aspect("equal")
        legend.axis("off")
        legend.legend(*axes.get_legend_handles_labels(), loc="center left")
        return svg(figure, name, f"ROC curves of detectors, {about}")


def _page(name: str, found: Sequence[Detection], *, has_report: bool) -> str:
    makers, titles = {d.folder: Thumbnails(d.folder) for d in found}, _titles(found)
    sections = [
        {
            "about": about,
            "count": _count(group[0]),
            "rows": [(d.folder.name, line) for d, line in zip(group, _lines(group, titles), strict=True)],
            "plot": _roc_plot(group, f"roc-{number}", about),
            "labels": [d.label for d in group],
            "prompts": [_prompt(group, prompt, makers) for prompt in group[0].prompts],
        }
        for number, (about, group) in enumerate(_groups(found))
    ]
    for make in makers.values():
        make.keep()
    citations = {title: text for d in found for title, text in d.spec["citations"].items()}
    return render(
        "detectors.html.jinja",
        name=name,
        has_report=has_report,
        sections=sections,
        titles=titles,
        note=NOTE,
        citations=citations,
    )


def _prompt(group: Sequence[Detection], prompt: Prompt, makers: Mapping[Path, Thumbnails]) -> dict[str, Any]:
    """A line of the page: scores, tokens as far as a detector explains them, pictures."""
    records = [d.records[prompt.id] for d in group]
    tokens: Sequence[tuple[str, float]] = next(
        (r["details"]["tokens"] for r in records if "tokens" in r.get("details", {})), []
    )
    largest = max((value for _, value in tokens), default=0.0) or 1.0
    return {
        "id": prompt.id,
        "text": prompt.text,
        "group": prompt.group,
        "tokens": [(word.replace("</w>", " "), value, value / largest) for word, value in tokens],
        "scores": [
            (r["score"], _beaten(d, r["score"]), "") if "score" in r else (None, 0.0, r["failed"])
            for d, r in zip(group, records, strict=True)
        ],
        "pictures": [
            (d.label, makers[d.folder](d.folder / r["image"], (_PIXELS, _PIXELS)))
            for d, r in zip(group, records, strict=True)
            if "image" in r
        ],
    }


def _beaten(found: Detection, score: float) -> float:
    """Share of prompts that are not memorized and score below."""
    others = found.scores(memorized=False)
    return sum(other < score for other in others) / len(others) if others else 0.0
