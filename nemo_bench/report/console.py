"""Prints tables in terminals of any width. Loads no records, so that listings are quick."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Column, Table

from nemo_bench.errors import counted

_STAGES = ("localize", "memorization", "generate", "score")


def show(*parts: RenderableType) -> None:
    """Prints tables and texts; a table that is too wide in several, so that no number is cut."""
    console = Console()
    for part in parts:
        console.print(*(fitting(part, console) if isinstance(part, Table) else [part]))


def fitting(table: Table, console: Console) -> Iterator[Table]:
    """A table in as few as show all columns in full, each beginning with the first column, which names the rows.

    Columns whose words may be broken are those that wrap.
    """
    first, *others = table.columns
    while True:
        count = len(others)
        while count > 1 and not _fits(_with_columns(table, [first, *others[:count]]), console):
            count -= 1
        part = _with_columns(table, [first, *others[:count]])
        others = others[count:]
        if others:
            part.caption = None
        yield part
        if not others:
            return
        table = copy(table)
        table.title = None


def _with_columns(table: Table, columns: Sequence[Column]) -> Table:
    part = copy(table)
    part.columns = [copy(column) for column in columns]
    for place, column in enumerate(part.columns):
        column._index = place
    return part


def _fits(table: Table, console: Console) -> bool:
    options = console.options.update(max_width=10_000)
    width = console.measure(table, options=options).minimum
    for column in table.columns:
        if column.no_wrap:  # which rich measures as if its words could be broken
            measured = [console.measure(cell, options=options) for cell in (column.header, *column.cells)]
            width += max(each.maximum for each in measured) - max(each.minimum for each in measured)
    return width <= console.width


def show_entries(
    entries: Iterable[Mapping[str, str]], columns: Sequence[str], whole: Sequence[str] = ("name",)
) -> None:
    """Prints options to choose from: some of their fields as columns, of which ``whole`` ones are never broken."""
    table = Table(*(Column(name, no_wrap=name in whole) for name in columns), box=None, pad_edge=False)
    for entry in entries:
        table.add_row(*(entry[name] for name in columns))
    show(table)


def show_status(cells: Sequence[Mapping[str, Any]]) -> None:
    """Prints how far the cells of a run are, from :func:`nemo_bench.benchmark.status.read_status`."""
    table = Table(*(Column(title, overflow="fold") for title in ("cell", "state", "records", "now", "left", "by")))
    for cell in cells:
        records = f"{cell['done']:,}" if cell["total"] is None else f"{cell['done']:,} of {cell['total']:,}"
        now = f"{cell['stage']}, {cell['rate']:.2f}/s" if cell["stage"] else ""
        left = _duration(cell["left"], "") if cell["left"] is not None else ""
        table.add_row(cell["cell"], cell["state"], records, now, left, cell["owner"] or cell["failure"])
    show(table)
    states = Counter(cell["state"] for cell in cells)
    print(", ".join(f"{count} {state}" for state, count in states.items()))


def show_forecast(expected: Mapping[str, Any]) -> None:
    """Prints what a run needs and costs, from :func:`nemo_bench.benchmark.dry_run.forecast`."""
    rows, total = expected["cells"], expected["total"]
    width = max([80, *(len(row["cell"]) + 62 for row in rows)])
    console = Console(width=max(Console().width, width), markup=False, highlight=False)
    needs = Table("", "", Column("", overflow="fold"), box=None, show_header=False, pad_edge=False)
    together: dict[tuple[str, str, str], list[str]] = {}
    for need in expected["needs"]:
        if need["kind"] != "metric" or need["state"] != "there":
            together.setdefault((need["state"], need["kind"], need["note"]), []).append(need["what"])
    for (state, kind, note), names in together.items():
        needs.add_row(state, kind, f"{', '.join(names)}\n{note}".strip())
    for found in expected["families"]:
        needs.add_row("chosen" if found["known"] else "default", "settings", f"{found['method']} {found['text']}")
    console.print(needs, "")
    _show_models(expected["models"])
    for file, about in expected["prompts"].items():
        print(f"{file}: {about['taken']:,} of {about['of']:,} prompts, the first of them:")
        for prompt in about["first"]:
            print(f"  {prompt['id']}: {textwrap.shorten(prompt['text'], 100, placeholder=' ...')}")
    if expected["uncounted"]:
        print(f"{counted(expected['uncounted'], 'cell')} can't be counted before the files are there")
    if not rows:
        return
    titles = ("pending records", *_STAGES, "passes", "TFLOPs", "time")
    table = Table(*(Column(title, no_wrap=True) for title in titles))
    for row in rows:
        counts = [str(row["pending"].get(stage, "-")) for stage in _STAGES]
        least = "≥ " if row["at_least"] else ""
        costs = [f"{least}{sum(row['passes'].values()):,}", _figure(row["teraflops"], least)]
        table.add_row(row["cell"], *counts, *costs, _duration(row["seconds"], least))
    show(table)
    least, passes = ("≥ " if total["at_least"] else ""), total["passes"]
    verbs = {"memorization": "measure memorization", "fit": "fit weights"}
    counts = [
        f"{least * (stage == 'localize')}{count:,} to {verbs.get(stage, stage)}"
        for stage, count in passes.items()
        if count or stage != "fit"  # most runs fit nothing
    ]
    print(f"passes of one sample: {', '.join(counts)}; TFLOPs: {_figure(total['teraflops'], least)}")
    if least:
        print("≥: what a search takes depends on the prompt; no record of this model tells yet, so the least")
    for metric, count in total["comparisons"].items():
        print(f"{metric}: at most {count:,} comparisons with training images, four times as many for twice the prompts")
    for model, speed in expected["speed"].items():
        each = f"{1000 * speed['seconds_per_pass']:.3g} ms a pass"
        print(f"{model}: {each} in {speed['records']:,} finished records, on {', '.join(speed['devices'])}")
    print(f"time: {_duration(total['seconds'], least)}")


def show_region_forecast(expected: Mapping[str, Any]) -> None:
    """Prints what localizers of regions would do, from :func:`nemo_bench.benchmark.regions.forecast`."""
    for source, state in expected["weights"].items():
        if state == "fetched":
            print(f"weights {source}: some gigabytes, from the hub at the first use")
    keys = {
        "prompts": "prompts",
        "masks": "masks",
        "without_mask": "left out without",
        "pending": "pending",
        "passes": "own passes",
    }
    table = Table("localizer of regions", *(Column(title, justify="right", no_wrap=True) for title in keys.values()))
    for row in expected["cells"]:
        table.add_row(row["cell"], *(f"{row[key]:,}" for key in keys))
    show(table)
    print(
        f"passes of one sample: {expected['passes']:,}, {expected['sampling']:,} of these for sampling, which is shared"
    )


def _show_models(models: Sequence[Mapping[str, Any]]) -> None:
    """Prints what each model is and costs."""
    numbers = ("weights", "download", "memory", "passes", "TFLOPs a pass", "an image")
    columns = (Column(title, justify="right", no_wrap=True) for title in numbers)
    table = Table(Column("model", no_wrap=True), *columns, Column("licence", no_wrap=True), box=None, pad_edge=False)
    for model in models:
        licence = (model["licence"] or "?") + (", gated" if model["gated"] else "")
        table.add_row(
            model["model"],
            _figure(model["weights"], unit=" B"),
            *(_figure(model[key], unit=" GB") for key in ("download_gb", "memory_gb")),
            str(model["passes_per_image"]),
            *(_figure(model[f"teraflops_per_{each}"]) for each in ("pass", "image")),
            licence,
        )
    show(table)
    print("weights: of all networks, in billions; memory: of these; passes and TFLOPs: of the network that denoises")
    if any(model["gated"] for model in models):
        print("gated: accept the conditions at the model's page, then log in with `hf auth login`")
    print()


def _figure(value: float | None, least: str = "", unit: str = "") -> str:
    """A number in three digits; a question mark where it is not known."""
    if value is None:
        return "?"
    return f"{least}{value:,.0f}{unit}" if value >= 100 else f"{least}{value:.3g}{unit}"


def _duration(seconds: float | None, least: str) -> str:
    """Seconds for people; a question mark before the first records."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{least}{seconds:.0f} s"
    return f"{least}{seconds / 60:.0f} min" if seconds < 5400 else f"{least}{seconds / 3600:,.1f} h"
