"""Table, figures and page of the localizers of a run, made from its records."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nemo_bench.errors import counted
from nemo_bench.records.data import GENERAL, Prompt
from nemo_bench.records.io import write_json, write_text
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import (
    LEVELS,
    Aggregate,
    LocalizationRecord,
    LocalizerRow,
    LocalizerTable,
    MetricInfo,
    Paired,
)
from nemo_bench.records.statistics import bootstrap_intervals, holm, paired_tests
from nemo_bench.records.store import read_records
from nemo_bench.report.detection import model_settings
from nemo_bench.report.selection import MEMORIZED
from nemo_bench.report.tables import markdown_table
from nemo_bench.report.texts import TEXTS
from nemo_bench.report.thumbnails import first_images

ROLES = (
    "precision", "recall", "f1", "recall_at_true_number", "average_precision", "training_similarity",
    "memorization_rate", "memorization_score",
)  # fmt: skip
"""Measures that are metrics of the run, by the part they play; of several the first."""
GENERAL_LOSS = "general_loss"
OWN = {
    GENERAL_LOSS: MetricInfo(
        title="General prompts lose",
        description="alignment that general prompts lose with the neurons of a memorized prompt off, drawn by ids",
        higher_is_better=False,
        family="alignment",
    ),
    "neurons": MetricInfo(title="Neurons", description="neurons switched off", lower=0.0, family="localization"),
    "row_passes": MetricInfo(
        title="UNet passes",
        description="UNet passes of one sample that localizing takes for a prompt, a derivative counted as one more",
        lower=0.0,
        higher_is_better=False,
    ),
    "seconds": MetricInfo(
        title="Seconds",
        description="time that localizing takes for a prompt, with what it measures once shared out",
        lower=0.0,
        higher_is_better=False,
    ),
}
"""Measures that are taken from several cells, or from costs."""
UNTESTED = ("neurons", "row_passes", "seconds")
"""Measures whose differences are not tested."""
FILES = ("localizers.json", "localizers.csv", "localizers.md", "localizers.html")
_NUMBERS = [name for name in Aggregate.model_fields if name != "paired"]
_TESTED = list(Paired.model_fields)


@dataclass(frozen=True)
class Localized:
    """A localizer of a run, or its prompts with nothing switched off."""

    cell: CellResults
    unmitigated: CellResults | None  #: The same images with nothing off.
    keys: Mapping[str, str]  #: Metric of the run by role.

    @property
    def settings(self) -> dict[str, Any] | None:
        """Settings of the localizer; None with nothing switched off."""
        return localizer_of(self.cell)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """Settings, but the method's, that decide images and scores; the same for localizers that are compared."""
        spec = self.cell.spec
        own = {key: spec.settings[key] for key in ("seeds", "localize_seeds")}
        prompts = {"prompts": spec.settings["prompts"][:8]}
        return {**prompts, **model_settings(spec), **own}

    @cached_property
    def records(self) -> dict[str, LocalizationRecord]:
        """Localizations by prompt id, with what they cost."""
        if self.settings is None or not self.cell.spec.source:
            return {}
        records = read_records(self.cell.folder.parent / self.cell.spec.source, LocalizationRecord).values()
        return {record.prompt: record for record in records}

    def prompts(self, group: str) -> list[Prompt]:
        """The prompts of a group."""
        return [prompt for prompt in self.cell.prompts if prompt.group == group]

    def values(self, group: str) -> dict[str, dict[str, float]]:
        """Values by measure and prompt id, without measures that no prompt has."""
        found = {role: self.cell.prompt_means(key, [group]) for role, key in self.keys.items()}
        if self.settings is not None:
            ids = [prompt.id for prompt in self.prompts(group) if self._is_localized(prompt.id)]
            found[GENERAL_LOSS] = self._general_loss()
            found["neurons"] = {i: float(self.cell.outcomes[i].neurons.count) for i in ids}
            costs = {i: cost for i in ids if (cost := self.records[i].cost)}
            for key in ("row_passes", "seconds"):
                every = {i: getattr(cost, key) for i, cost in costs.items()}
                found[key] = {i: float(value) for i, value in every.items() if value is not None}
        return {key: values for key, values in found.items() if values}

    def failed(self, group: str) -> int:
        """Prompts of a group that it failed for."""
        return sum(not self._is_localized(prompt.id) for prompt in self.prompts(group)) if self.records else 0

    def _is_localized(self, prompt: str) -> bool:
        return prompt in self.records and self.records[prompt].localization is not None

    def _general_loss(self) -> dict[str, float]:
        key = next((key for key, info in self.cell.summary.metrics.items() if info.family == "alignment"), None)
        if key is None or self.unmitigated is None:
            return {}
        own, before = (cell.prompt_means(key, [GENERAL]) for cell in (self.cell, self.unmitigated))
        return {prompt: before[prompt] - value for prompt, value in own.items() if prompt in before}


def localizer_of(cell: CellResults) -> dict[str, Any] | None:
    """Settings of the localizer whose neurons a cell switches off; None for a cell of another kind."""
    method = cell.spec.settings.get("method")
    source = method.get("source") if isinstance(method, dict) else None
    found = source.get("localizer") if isinstance(source, dict) else None
    return found if isinstance(found, dict) else None


def localized(results: Results) -> list[Localized]:
    """The localizers of a run, and before those of each model and prompts these with nothing off; none without any."""
    cells = {cell.name: cell for cell in results.cells}
    keys = {role: keys[0] for role in ROLES if (keys := results.keys_of(role))}
    found: list[Localized] = []
    for cell in results.cells:
        if localizer_of(cell) is None:
            continue
        unmitigated = cells.get(cell.summary.unmitigated or "")
        if unmitigated and all(other.cell is not unmitigated for other in found):
            found.append(Localized(unmitigated, None, keys))
        found.append(Localized(cell, unmitigated, keys))
    return found


def comparable(own: Sequence[Localized]) -> dict[str, list[Localized]]:
    """Localizers to be compared with one another, under the names of their model and prompts.

    What they share follows where others of the same names differ in it.
    """
    groups: dict[str, list[Localized]] = {}
    for each in own:
        names = [each.cell.model, each.cell.spec.prompts]
        others = [other.shared for other in own if [other.cell.model, other.cell.spec.prompts] == names]
        differing = [f"{key} {value}" for key, value in each.shared.items() if any(o.get(key) != value for o in others)]
        groups.setdefault(" · ".join([*names, *differing]), []).append(each)
    return groups


def localizer_table(results: Results, own: Sequence[Localized]) -> LocalizerTable:
    """The table of localizers, one row for each and a group of memorized prompts."""
    against: dict[str, str] = {}
    rows = []
    for name, alike in comparable(own).items():
        reference = _reference(alike)
        against[name] = reference.cell.short
        for group in MEMORIZED:
            if any(each.prompts(group) for each in alike):
                rows += _rows(alike, reference, name, group)
    measured = {key for row in rows for key in row.values}
    infos = {role: results.metrics[key] for role, key in (own[0].keys.items() if own else ())} | OWN
    return LocalizerTable(
        name=results.name,
        against=against,
        measures={key: info for key, info in infos.items() if key in measured},
        rows=rows,
    )


def _reference(alike: Sequence[Localized]) -> Localized:
    """The localizer that others are compared with: NeMo as published or, without it, the first one."""
    compared = [each for each in alike if each.settings is not None]
    return next((each for each in compared if each.cell.method == "nemo"), compared[0])


def _rows(alike: Sequence[Localized], reference: Localized, comparison: str, group: str) -> list[LocalizerRow]:
    values = {each.cell.name: each.values(group) for each in alike}
    base = values[reference.cell.name]
    columns = {(name, key): np.array([*v.values()]) for name, own in values.items() for key, v in own.items()}
    intervals = bootstrap_intervals(columns)
    differences = {}
    for name, key in columns:
        if name != reference.cell.name and key not in UNTESTED and key in base:
            own = values[name][key]
            if both := [own[prompt] - base[key][prompt] for prompt in own if prompt in base[key]]:
                differences[name, key] = np.array(both)
    tests = paired_tests(differences)
    for key in {key for _, key in tests}:
        corrected = holm({name: test.p for (name, other), test in tests.items() if other == key})
        for name, p in corrected.items():
            tests[name, key] = tests[name, key].model_copy(update={"p_holm": p})
    rows = []
    for each in alike:
        name = each.cell.name
        aggregates = {}
        for key in values[name]:
            numbers = columns[name, key]
            low, high = intervals[name, key]
            median = float(np.median(numbers))
            aggregates[key] = Aggregate(
                mean=float(numbers.mean()),
                low=low,
                high=high,
                median=median,
                mad=float(np.median(np.abs(numbers - median))),
                prompts=len(numbers),
                paired=tests.get((name, key)),
            )
        row = LocalizerRow(
            cell=name,
            label=each.cell.short,
            model=each.cell.model,
            localizer=each.cell.method,
            prompts=each.cell.spec.prompts,
            comparison=comparison,
            group=group,
            n_prompts=len(each.prompts(group)),
            failed=each.failed(group),
            values=aggregates,
            settings=each.settings or {},
        )
        rows.append(row)
    return rows


def write_localizers(results: Results) -> LocalizerTable | None:
    """Writes :data:`FILES` into the folder of a run; nothing where it has no localizers."""
    own = localized(results)
    if not own:
        return None
    table = localizer_table(results, own)
    write_json(results.folder / FILES[0], table)
    for name, text in zip(FILES[1:], (csv_text(table), markdown(table), _page(results, own, table)), strict=True):
        write_text(results.folder / name, text)
    return table


def sections(table: LocalizerTable) -> list[tuple[str, list[LocalizerRow]]]:
    """Rows that are compared, by group, under a heading such as ``planted · planted, VM: 18 prompts``."""
    groups: dict[tuple[str, str], list[LocalizerRow]] = {}
    for row in table.rows:
        groups.setdefault((row.comparison, row.group), []).append(row)
    return [
        (f"{comparison}, {group}: {counted(rows[0].n_prompts, 'prompt')}", rows)
        for (comparison, group), rows in groups.items()
    ]


def shown_measures(table: LocalizerTable, rows: Sequence[LocalizerRow]) -> dict[str, MetricInfo]:
    """Measures that some of these rows have."""
    return {key: info for key, info in table.measures.items() if any(key in row.values for row in rows)}


def number(key: str, value: float) -> str:
    """A value of a measure as it is shown."""
    if key == "row_passes":
        return f"{value:,.0f}"
    # A difference that is rounded to nothing has no sign.
    return f"{value:.3g}" if key in ("neurons", "seconds") else f"{round(value, 3) + 0.0:.3f}"


def value_text(row: LocalizerRow, key: str) -> tuple[str, str]:
    """The mean with stars, and its interval, empty where that is the mean alone; a dash where there is no value."""
    value = row.values.get(key)
    if value is None:
        return "–", ""
    test = value.paired
    stars = "*" * sum(test.p_holm < level for level in LEVELS) if test and test.p_holm is not None else ""
    if value.low is None or value.high is None or value.low == value.high:
        return number(key, value.mean) + stars, ""
    return number(key, value.mean) + stars, f"{number(key, value.low)}–{number(key, value.high)}"


def markdown(table: LocalizerTable) -> str:
    """The table as a Markdown document, one for each comparison and group."""
    parts = [f"# {table.name}: localizers\n"]
    for heading, rows in sections(table):
        measures = shown_measures(table, rows)
        lines = [["Localizer", *(f"{info.title} {info.arrow}".strip() for info in measures.values()), "Failed"]]
        for row in rows:
            texts = [value_text(row, key) for key in measures]
            cells = [f"{mean} [{interval}]" if interval else mean for mean, interval in texts]
            lines.append([row.label, *(cell.replace("*", r"\*") for cell in cells), str(row.failed or "–")])
        parts.append(f"## {heading}\n\n{markdown_table(lines, ['---', *['---:'] * (len(lines[0]) - 1)])}")
    return "\n".join([*parts, note(table).replace("*", r"\*") + "\n"])


def note(table: LocalizerTable) -> str:
    """What a reader has to know of the table."""
    text: str = TEXTS["localizers"]["note"]
    return text.format(against="; ".join(dict.fromkeys(table.against.values())))


def csv_text(table: LocalizerTable) -> str:
    """The table as CSV: one line a localizer, group and measure, every number in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    about = ("cell", "label", "model", "localizer", "prompts", "comparison", "group", "n_prompts", "failed")
    # The prompts of a measure are not those of the row, such as general ones.
    writer.writerow([*about, "measure", *("n" if name == "prompts" else name for name in _NUMBERS),
                     *(f"paired_{name}" for name in _TESTED)])  # fmt: skip
    for row in table.rows:
        for key, value in row.values.items():
            own = [getattr(row, name) for name in about]
            tested = [getattr(value.paired, name, None) for name in _TESTED]
            writer.writerow([*own, key, *(getattr(value, name) for name in _NUMBERS), *tested])
    return buffer.getvalue()


def _page(results: Results, own: Sequence[Localized], table: LocalizerTable) -> str:
    from nemo_bench.report.localizer_plots import figures  # matplotlib is slow to import
    from nemo_bench.report.templates import render

    parts = []
    for number_, (heading, rows) in enumerate(sections(table)):
        alike = [each for each in own if each.cell.name in {row.cell for row in rows}]
        measures = shown_measures(table, rows)
        parts.append({
            "heading": heading,
            "measures": measures,
            "rows": [(row, _failures(row), [value_text(row, key) for key in measures]) for row in rows],
            "figures": figures(table, rows, f"localizers-{number_}", heading),
            "labels": [each.cell.short for each in alike],
            "pictures": first_images([each.cell for each in alike], [rows[0].group, GENERAL]),
        })  # fmt: skip
    return render(
        "comparison.html.jinja",
        name=results.name,
        subject="localizers",
        first="Localizer",
        files=FILES[:3],
        pictured=TEXTS["localizers"]["pictured"],
        sections=parts,
        note=note(table),
        citations={title: text for each in own for title, text in each.cell.spec.citations.items()},
    )


def _failures(row: LocalizerRow) -> str:
    return f"failed for {row.failed} of {row.n_prompts}" if row.failed else ""
