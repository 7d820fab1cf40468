"""Tables in terminals of any width."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

from rich.console import Console, RenderableType
from rich.table import Table


def show(*parts: RenderableType) -> None:
    """Prints tables and texts; a table that is too wide in several, so that no number is cut."""
    console = Console()
    for part in parts:
        console.print(*(fitting(part, console) if isinstance(part, Table) else [part]))


def fitting(table: Table, console: Console) -> Iterator[Table]:
    """A table in as few as show all columns in full, each beginning with the first column.

    Args:
        table: Its first column names the rows; columns whose words may be broken are those that wrap.
        console: What it is to be shown on.
    """
    first, *others = table.columns
    while True:
        count = len(others)
        while count > 1 and not _fits(part := _of(table, [first, *others[:count]]), console):
            count -= 1
        part = _of(table, [first, *others[:count]])
        others = others[count:]
        if others:
            part.caption = None
        yield part
        if not others:
            return
        table = copy(table)
        table.title = None


def _of(table: Table, columns: list) -> Table:  # type: ignore[type-arg]
    found = copy(table)
    found.columns = [copy(column) for column in columns]
    for place, column in enumerate(found.columns):
        column._index = place
    return found


def _fits(table: Table, console: Console) -> bool:
    options = console.options.update(max_width=10_000)
    width = console.measure(table, options=options).minimum
    for column in table.columns:
        if column.no_wrap:  # which rich measures as if its words could be broken
            found = [console.measure(cell, options=options) for cell in (column.header, *column.cells)]
            width += max(each.maximum for each in found) - max(each.minimum for each in found)
    return width <= console.width
