"""Table, figure and page of memorization sinks beside their controls, made from the records of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_bench.errors import counted
from nemo_bench.records.data import GENERAL
from nemo_bench.records.io import write_json, write_text
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import Aggregate, MetricInfo, SinksRow, SinksTable
from nemo_bench.records.statistics import GROUPS, gap_closed
from nemo_bench.report.detection import model_settings
from nemo_bench.report.tables import markdown_table
from nemo_bench.report.texts import TEXTS
from nemo_bench.report.thumbnails import first_images

LOSS = "training_loss"
GAP, GAP_TO_ONCE = "gap_closed", "gap_to_once_closed"
OF_MEMORIZED = ("training_similarity", "memorization_rate", "memorization_score", LOSS)
"""Roles of metrics of memorized prompts; of several the first."""
OF_GENERAL = ("alignment", "diversity", "quality")
"""Families of metrics of general prompts, beside the loss; of several the first."""
OWN = {
    GAP: MetricInfo(
        title="Gap closed",
        description="part of the gap between the loss with sinks on and that of held-out pictures that is closed here",
        family="memorization",
    ),
    GAP_TO_ONCE: MetricInfo(
        title="Gap closed, against training without repetition",
        description="the same with the loss of the same pictures in a model that was trained without repetition",
        family="memorization",
    ),
}
"""Measures that are taken from several cells."""
FILES = ("memsinks.json", "memsinks.md", "memsinks.html")


@dataclass
class Compared:
    """Cells over the same prompts with the same settings, but for weights and method."""

    heading: str
    cells: list[CellResults] = field(default_factory=list)

    def on(self, cell: CellResults) -> CellResults | None:
        """The cell of the same model that memorizes most: own sinks on, or all, or nothing switched off."""
        own = [other for other in self.cells if _weights(other) == _weights(cell)]
        by_mode = {mode_of(other): other for other in reversed(own)}
        if mode_of(cell) is not None:
            return by_mode.get("own") or by_mode.get("all")
        return next((other for other in own if other.name == cell.summary.unmitigated), None)

    @property
    def once(self) -> CellResults | None:
        """The model that was trained without repetition, nothing switched off."""
        alike = [cell for cell in self.cells if (cell.spec.training or {}).get("variant") == "once"]
        return next((cell for cell in alike if cell.summary.unmitigated is None and mode_of(cell) is None), None)


def mode_of(cell: CellResults) -> str | None:
    """Which sinks are on in a cell; None for another method."""
    method = cell.spec.settings.get("method")
    found = method if isinstance(method, Mapping) else {}
    return str(found.get("mode")) if str(found.get("_target_")).endswith(".Sinks") else None


def has_sinks(results: Results) -> bool:
    """Whether some cell of a run switches sinks on or off."""
    return any(mode_of(cell) is not None for cell in results.cells)


def _weights(cell: CellResults) -> object:
    return model_settings(cell.spec).get("weights")


def compared(results: Results) -> list[Compared]:
    """Cells to be compared with one another, under the names of their prompts and settings in which others differ."""
    shared: dict[str, dict[str, Any]] = {}
    for cell in results.cells:
        model = {key: value for key, value in model_settings(cell.spec).items() if key != "weights"}
        numbers = {key: cell.spec.settings.get(key) for key in ("seeds", "localize_seeds", "loss")}
        shared[cell.name] = {"prompts": cell.spec.digests.get("prompts"), **model, **numbers}
    found: dict[str, Compared] = {}
    for cell in results.cells:
        own = shared[cell.name]
        differing = [f"{key} {value}" for key, value in own.items() if any(o[key] != value for o in shared.values())]
        heading = " · ".join([cell.spec.prompts, *differing])
        found.setdefault(heading, Compared(heading)).cells.append(cell)
    return list(found.values())


def sinks_table(results: Results) -> SinksTable:
    """The table, one row for each cell and group of prompts."""
    of_memorized = {role: keys[0] for role in OF_MEMORIZED if (keys := results.keys_of(role))}
    loss = {LOSS: of_memorized[LOSS]} if LOSS in of_memorized else {}
    of_general = {**loss, **{family: results.leading[family] for family in OF_GENERAL if family in results.leading}}
    rows = []
    for alike in compared(results):
        for group in (group for group in results.own_groups if group != "all"):
            measured = of_general if group == GENERAL else of_memorized
            for cell in (cell for cell in alike.cells if cell.count(group)):
                found = cell.summary.aggregates.get(group, {})
                values = {measure: found[key] for measure, key in measured.items() if key in found}
                if group != GENERAL and loss:
                    values |= _gaps(alike, cell, group, loss[LOSS])
                row = SinksRow(
                    cell=cell.name,
                    label=cell.label,
                    model=cell.model,
                    training=cell.spec.training,
                    prompts=cell.spec.prompts,
                    comparison=alike.heading,
                    group=group,
                    n_prompts=cell.count(group),
                    values=values,
                )
                rows.append(row)
    infos = {measure: results.metrics[key] for measure, key in (of_memorized | of_general).items()} | OWN
    present = {measure for row in rows for measure in row.values}
    order = [*OF_MEMORIZED, *OWN, *OF_GENERAL]
    return SinksTable(name=results.name, measures={m: infos[m] for m in order if m in present}, rows=rows)


def _gaps(alike: Compared, cell: CellResults, group: str, loss: str) -> dict[str, Aggregate]:
    """How much of the gaps a cell closes; none for the cell whose loss is the low end."""
    on, once = alike.on(cell), alike.once
    if on is None or on is cell:
        return {}
    low, off = (each.prompt_means(loss, [group]) for each in (on, cell))
    gaps = {GAP: gap_closed(low, off, on.prompt_means(loss, [GENERAL]))}
    if once is not None and once.name not in (on.name, cell.name):
        gaps[GAP_TO_ONCE] = gap_closed(low, off, once.prompt_means(loss, [group]))
    return {measure: value for measure, value in gaps.items() if value is not None}


def write_sinks(results: Results) -> SinksTable | None:
    """Writes :data:`FILES` into the folder of a run; nothing where no cell has sinks."""
    if not has_sinks(results):
        return None
    table = sinks_table(results)
    write_json(results.folder / FILES[0], table)
    write_text(results.folder / FILES[1], markdown(table))
    write_text(results.folder / FILES[2], _page(results, table))
    return table


def _sections(table: SinksTable) -> list[tuple[str, dict[str, MetricInfo], list[SinksRow]]]:
    """Heading, measures and rows of each table, in the order of groups."""
    found: dict[tuple[str, str], list[SinksRow]] = {}
    for row in table.rows:
        found.setdefault((row.comparison, row.group), []).append(row)
    sections = []
    for (comparison, group), rows in found.items():
        heading = f"{comparison}, {group} ({GROUPS[group]}): {counted(rows[0].n_prompts, 'prompt')}"
        measures = {key: info for key, info in table.measures.items() if any(key in row.values for row in rows)}
        if LOSS in measures and group == GENERAL:  # of pictures that no model was trained on
            measures[LOSS] = measures[LOSS].model_copy(update={"title": "Validation loss"})
        sections.append((heading, measures, rows))
    return sections


def value_text(row: SinksRow, measure: str) -> tuple[str, str]:
    """A mean and its interval as they are shown; a dash where there is no value."""
    value = row.values.get(measure)
    if value is None:
        return "–", ""
    if value.low is None or value.high is None:
        return f"{value.mean:.3f}", ""
    return f"{value.mean:.3f}", f"{value.low:.3f}–{value.high:.3f}"


def training_text(row: SinksRow) -> str:
    """How the model of a row was trained, in a few words."""
    recipe: Mapping[str, Any] = row.training or {}
    if "variant" not in recipe:
        return ""
    parts = f", pool {recipe.get('pool')}, active {recipe.get('active')}" if "sinks" in recipe["variant"] else ""
    return f"{recipe['variant']}{parts}, {recipe.get('denoiser_steps', 0):,} steps"


def markdown(table: SinksTable) -> str:
    """The table as a Markdown document, a part for each comparison and group."""
    parts = [f"# {table.name}: memorization sinks\n"]
    for heading, measures, rows in _sections(table):
        titles = [f"{info.title} {info.arrow}".strip() for info in measures.values()]
        lines = [["State · model", "Training", *titles]]
        for row in rows:
            texts = [value_text(row, key) for key in measures]
            lines.append([row.label, training_text(row), *(f"{m} [{i}]" if i else m for m, i in texts)])
        parts.append(f"## {heading}\n\n{markdown_table(lines, ['---', '---', *['---:'] * len(measures)])}")
    return "\n".join([*parts, TEXTS["memsinks"]["note"] + "\n"])


def _page(results: Results, table: SinksTable) -> str:
    from nemo_bench.report.memsinks_plots import figures  # matplotlib is slow to import
    from nemo_bench.report.templates import render

    cells = {cell.name: cell for cell in results.cells}
    parts: list[dict[str, Any]] = []
    for place, (heading, measures, rows) in enumerate(_sections(table)):
        held_out = [row for row in table.rows if (row.comparison, row.group) == (rows[0].comparison, GENERAL)]
        own = [cells[row.cell] for row in rows]
        parts.append({
            "heading": heading,
            "measures": measures,
            "rows": [(row, training_text(row), [value_text(row, key) for key in measures]) for row in rows],
            "figures": figures(rows, held_out, f"memsinks-{place}", heading) if rows[0].group != GENERAL else [],
            "labels": [row.label for row in rows],
            "pictures": first_images(own, [rows[0].group]),
        })  # fmt: skip
    return render(
        "comparison.html.jinja",
        name=results.name,
        subject="memorization sinks",
        first="State · model",
        files=FILES[:2],
        pictured=TEXTS["memsinks"]["pictured"],
        sections=parts,
        note=TEXTS["memsinks"]["note"],
        citations={title: text for cell in results.cells for title, text in cell.spec.citations.items()},
    )
