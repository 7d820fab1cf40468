"""Tables, figures and page of metrics of similarity against pairs that are known to be copies or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_bench.records.io import write_json, write_text
from nemo_bench.records.schema import Operating, SimilarityRow, SimilarityTable
from nemo_bench.report.tables import markdown_table
from nemo_bench.report.texts import TEXTS
from nemo_bench.report.thumbnails import Thumbnails

FILES = ("similarity.json", "similarity.csv", "similarity.md", "similarity.html")
"""All but the second, the values of all pairs, are made from the first."""
SHEET = "similarity.png"
"""Picture of a copy under each transformation."""
_TEXTS: dict[str, Any] = TEXTS["similarity"]


def write_similarity(folder: Path, table: SimilarityTable) -> Path:
    """Writes :data:`FILES` but the values of all pairs into the folder of a run; gives the page."""
    write_json(folder / FILES[0], table)
    write_text(folder / FILES[2], markdown(table))
    write_text(folder / FILES[3], _page(folder, table))
    return folder / FILES[3]


def transformations(table: SimilarityTable) -> list[str]:
    """Names of the transformations in their order, that of unchanged images first."""
    return list(dict.fromkeys(row.transformation for row in table.rows))


def rows_of(table: SimilarityTable, transformation: str) -> list[SimilarityRow]:
    """The rows of a transformation, the metric with the largest area for unchanged images first."""
    first = transformations(table)[0]
    areas = {row.metric: row.roc.auc for row in table.rows if row.transformation == first}
    own = [row for row in table.rows if row.transformation == transformation]
    return sorted(own, key=lambda row: -areas[row.metric])


def pairs_of(table: SimilarityTable) -> list[str]:
    """Number and kinds of copies, and of other pairs."""
    lines = []
    for is_copy, word in ((True, "copies"), (False, "other pairs")):
        own = {name: kind.pairs for name, kind in table.kinds.items() if kind.is_copy == is_copy}
        lines.append(f"{sum(own.values())} {word}: {', '.join(f'{count} {name}' for name, count in own.items())}")
    return lines


def unchanged_lines(table: SimilarityTable) -> list[list[str]]:
    """The table of unchanged images: titles, then a line for each metric."""
    lines = [["Metric", *_TEXTS["columns"]]]
    for row in rows_of(table, transformations(table)[0]):
        roc, best, published = row.roc, row.best, row.published
        lines.append([
            table.metrics[row.metric].title,
            f"{roc.auc:.3f} [{roc.auc_low:.3f}, {roc.auc_high:.3f}]",
            f"{roc.average_precision:.3f}",
            f"{roc.tpr_at_1_fpr_below:.3f}",
            _limit(table, row, best),
            _rates(best),
            _limit(table, row, published) if published else "–",
            _rates(published) if published else "–",
        ])  # fmt: skip
    return lines


def _limit(table: SimilarityTable, row: SimilarityRow, at: Operating) -> str:
    return f"{'>' if table.metrics[row.metric].higher_is_better else '<'} {at.threshold:.3f}"


def _rates(at: Operating) -> str:
    return f"{at.tpr:.3f} / {at.fpr:.3f}"


def flagged_lines(table: SimilarityTable) -> list[list[str]]:
    """Shares of unchanged pairs that count as copies at the best threshold, by their kind."""
    lines = [["Metric", *table.kinds]]
    for row in rows_of(table, transformations(table)[0]):
        lines.append([table.metrics[row.metric].title, *(f"{row.flagged[kind]:.3f}" for kind in table.kinds)])
    return lines


def changed_lines(table: SimilarityTable) -> list[list[str]]:
    """What the threshold of unchanged images does once images are changed: true and false positive rate."""
    first, *changes = transformations(table)
    metrics = [row.metric for row in rows_of(table, first)]
    lines = [["Images", *(table.metrics[metric].title for metric in metrics)]]
    for change in (first, *changes):
        lines.append([change, *(_rates(row.unchanged) for row in rows_of(table, change))])
    return lines


def area_lines(table: SimilarityTable) -> list[list[str]]:
    """The area under the ROC curve of every metric and transformation."""
    names = transformations(table)
    metrics = [row.metric for row in rows_of(table, names[0])]
    lines = [["Images", *(table.metrics[metric].title for metric in metrics)]]
    return [*lines, *([name, *(f"{row.roc.auc:.3f}" for row in rows_of(table, name))] for name in names)]


def sections(table: SimilarityTable) -> list[tuple[str, list[list[str]]]]:
    """All tables, under their headings."""
    makers = {
        "unchanged": unchanged_lines,
        "flagged": flagged_lines,
        "areas": area_lines,
        "changed": changed_lines,
    }
    return [(_TEXTS["headings"][name], make(table)) for name, make in makers.items()]


def gaps(table: SimilarityTable) -> list[str]:
    """Metrics that were left out, and why."""
    return [f"{name} is left out: {why}" for name, why in table.left_out.items()]


def markdown(table: SimilarityTable) -> str:
    """The tables as a Markdown document."""
    parts = [f"# {table.name}: similarity\n", f"{table.source}. {'; '.join(pairs_of(table))}.\n"]
    for heading, lines in sections(table):
        parts.append(f"## {heading}\n\n{markdown_table(lines, ['---', *['---:'] * (len(lines[0]) - 1)])}")
    parts += [f"- {line}\n" for line in gaps(table)]
    return "\n".join([*parts, _TEXTS["note"] + "\n"])


def _page(folder: Path, table: SimilarityTable) -> str:
    from nemo_bench.report.copy_plots import heat_map  # matplotlib is slow to import
    from nemo_bench.report.plots import detector_curves
    from nemo_bench.report.templates import render

    unchanged = rows_of(table, transformations(table)[0])
    curves = [(table.metrics[row.metric].title, row.roc) for row in unchanged]
    thumbnails = Thumbnails(folder)
    sheet = thumbnails(folder / SHEET, (1400, 400))
    return render(
        "similarity.html.jinja",
        name=table.name,
        source=table.source,
        files=FILES[:3],
        pairs=pairs_of(table),
        sections=sections(table),
        gaps=gaps(table),
        heat_map=heat_map(table),
        curves=detector_curves(curves, "curves", f"{table.name}, unchanged images"),
        sheet=sheet,
        transformations=transformations(table),
        metrics=table.metrics,
    )
