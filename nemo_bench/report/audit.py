"""What audits found: a table for the terminal, and a section of the page with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from nemo_bench.errors import counted
from nemo_bench.records.citations import cite
from nemo_bench.records.io import damaged, read_object
from nemo_bench.report.data import Results, load_results
from nemo_bench.report.templates import render
from nemo_bench.report.thumbnails import Thumbnails

_GROUPS = {"memorized": "Memorized", "control": "Controls"}
_MEANING = {
    "hidden": "Training images come back: the method hides them and does not remove them.",
    "kept": "Training images are there, with a search or without: the method leaves them.",
    "unclear": "Training images come back more often than controls; whether more often than by their prompts can't be "
    "told.",
    "memorized": "The model gives its training images more readily than other pictures.",
    "not shown": "Training images do not clearly come back more often than others.",
    "too few": "To tell more takes at least 6 different controls; searches that share a control count once.",
    "no controls": "Without controls it can't be told from a search that brings back any picture.",
}
"""What verdicts mean; see :func:`nemo_bench.benchmark.audit.verdict`."""
SHOWN = 8
"""Searches of an audit that the page shows with pictures."""
PIXELS = 720
"""Longest side of a sheet on the page."""


@dataclass(frozen=True)
class Audit:
    """One audit of one cell.

    Attributes:
        cell: Folder of the cell.
        label: The cell's name in tables.
        folder: Where its pictures are.
        content: The entry of ``audit.json``; see :func:`nemo_bench.benchmark.audit.summary`.
    """

    cell: str
    label: str
    folder: Path
    content: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The cell, and how it was searched."""
        about = self.content["settings"]
        start = "the prompt" if about["start"] == "prompt" else "random numbers"
        steps = f"{about['steps']} steps of {about['samples']} samples at rate {about['rate']:g} from {start}"
        return f"{self.label}: {steps}, {counted(about['images'], 'image')} each"

    @property
    def headings(self) -> list[str]:
        """Either group by prompt, by embedding found and, if mitigated, by that without mitigation; difference; p."""
        means = [f"{group}: {state}" for group in _GROUPS.values() for state in self.content["states"]]
        return [*means, "Difference: of found", "p"]

    @property
    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """For every metric its title and what stands under :attr:`headings`."""
        for key, about in self.content["metrics"].items():
            cells = [self._mean(group, key, state) for group in _GROUPS for state in self.content["states"]]
            paired = self.content["compared"].get(key)
            interval = f"{paired['difference']:+.2f} [{paired['low']:+.2f}, {paired['high']:+.2f}]" if paired else "–"
            yield about["title"], [*cells, interval, f"{paired['p']:.2g}" if paired else "–"]

    def _mean(self, group: str, metric: str, state: str) -> str:
        found = self.content["groups"].get(group)
        return f"{found['scores'][metric][state]['mean']:.2f}" if found else "–"

    @property
    def sentences(self) -> Iterator[str]:
        """What the audit says, for every memorization rate."""
        for key, verdict in self.content["verdict"].items():
            groups = self.content["groups"]
            if "memorized" not in groups:
                yield f"{self.content['metrics'][key]['title']}: all searches for training images failed."
                continue
            own = groups["memorized"]["scores"][key]
            text = (
                f"{self.content['metrics'][key]['title']}: {own['prompt']['mean']:.0%} of the images of a prompt, "
                f"{own['found']['mean']:.0%} with the embedding found"
            )
            if "control" in groups:
                text += f", {groups['control']['scores'][key]['found']['mean']:.0%} of controls"
            yield f"{text}. {_MEANING[verdict]}"
        if failed := sum(self.content.get("failed", {}).values()):
            yield f"Searches that failed, since something was not finite, and are left out: {failed}."


def load_audits(folder: Path) -> list[Audit]:
    """All audits of the finished cells of a run, none where there are none.

    Args:
        folder: Such as ``results/default``.

    Raises:
        StoreError: The folder holds no finished run.
    """
    return audits_of(load_results(folder))


def audits_of(results: Results) -> list[Audit]:
    """All audits of a run that has been read."""
    found = []
    for cell in results.cells:
        place = results.folder / cell.name
        file = place / "audit.json"
        entries = read_object(file, "audits")["audits"] if file.is_file() else []
        keys = {"settings", "states", "metrics", "groups", "compared", "verdict", "searches"}
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and keys <= entry.keys() for entry in entries
        ):
            raise damaged(file, "no list of audits")
        found += [Audit(cell.name, cell.label, place, entry) for entry in entries]
    return found


def terminal_audits(audits: Sequence[Audit]) -> list[Table | str]:
    """For the terminal: a table a search, and what it says."""
    shown: list[Table | str] = []
    for audit in audits:
        groups = audit.content["groups"]
        counts = ", ".join(f"{groups[group]['prompts']} {word}" for group, word in _NAMES.items() if group in groups)
        table = Table(title=escape(f"{audit.title} ({counts})"), title_justify="left", box=None, pad_edge=False)
        for heading in ("", *audit.headings):
            table.add_column(heading.replace(": ", "\n"), justify="right" if heading else "left", no_wrap=bool(heading))
        for title, cells in audit.rows:
            table.add_row(escape(title), *cells)
        shown += [table, *(escape(f"{text}\n") for text in audit.sentences)]
    return shown


_NAMES = {"memorized": "training images", "control": "controls"}


def audit_section(results: Results) -> Markup:
    """A section of the page on all audits of a run, empty where there are none."""
    audits = audits_of(results)
    if not audits:
        return Markup()
    shown = [(audit, _pictures(audit)) for audit in audits]
    return Markup(render("audit.html.jinja", shown=shown, citation=cite("kowalczuk2026finding")))


def _pictures(audit: Audit) -> list[dict[str, Any]]:
    """The first searches and their sheets."""
    make = Thumbnails(audit.folder)
    return [
        {**search, "image": make(audit.folder / search["sheet"], (PIXELS, PIXELS))}
        for search in audit.content["searches"][:SHOWN]
    ]
