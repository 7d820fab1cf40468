"""Audits of a run: rows, sentences and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_bench.errors import counted
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import Audit, SearchResult, Thumbnail
from nemo_bench.report.texts import TEXTS
from nemo_bench.report.thumbnails import Thumbnails

_GROUPS = {"memorized": "Memorized", "control": "Controls"}
_SHOWN = 8  # searches that the page shows with pictures
_PIXELS = 720  # longest side of a sheet on the page


@dataclass(frozen=True)
class CellAudit:
    """An audit and its cell."""

    cell: CellResults
    audit: Audit

    @property
    def title(self) -> str:
        """The cell and the settings of the search."""
        settings = self.audit.settings
        start = "the prompt" if settings["start"] == "prompt" else "random numbers"
        steps = f"{settings['steps']} steps of {settings['samples']} samples at rate {settings['rate']:g} from {start}"
        return f"{self.cell.label}: {steps}, {counted(settings['images'], 'image')} each"

    @property
    def headings(self) -> list[str]:
        """Both groups by prompt, by embedding found and, if mitigated, by that without mitigation; difference; p."""
        means = [f"{group}: {state}" for group in _GROUPS.values() for state in self.audit.states]
        return [*means, "Difference: of found", "p"]

    @property
    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """For every metric its title and the values under :attr:`headings`."""
        for key, info in self.audit.metrics.items():
            means = [self._mean(group, key, state) for group in _GROUPS for state in self.audit.states]
            test = self.audit.compared.get(key)
            interval = f"{test.difference:+.2f} [{test.low:+.2f}, {test.high:+.2f}]" if test else "–"
            yield info.title, [*means, interval, f"{test.p:.2g}" if test else "–"]

    def _mean(self, group: str, metric: str, state: str) -> str:
        scores = self.audit.scores
        return f"{scores[group][metric][state]['mean']:.2f}" if group in scores else "–"

    @property
    def sentences(self) -> Iterator[str]:
        """The result in words, for every memorization rate."""
        scores = self.audit.scores
        for key, verdict in self.audit.verdict.items():
            title = self.audit.metrics[key].title
            if "memorized" not in scores:
                yield f"{title}: all searches for training images failed."
                continue
            own = scores["memorized"][key]
            text = (
                f"{title}: {own['prompt']['mean']:.0%} of the images of a prompt, "
                f"{own['found']['mean']:.0%} with the embedding found"
            )
            if "control" in scores:
                text += f", {scores['control'][key]['found']['mean']:.0%} of controls"
            yield f"{text}. {TEXTS['verdicts'][verdict]}"
        if failed := sum(self.audit.failed.values()):
            yield f"Searches that failed, since something was not finite, and are left out: {failed}."

    def pictures(self) -> list[tuple[SearchResult, Thumbnail | None]]:
        """The first searches and their sheets."""
        make = Thumbnails(self.cell.folder)
        searches = self.audit.searches[:_SHOWN]
        return [(search, make(self.cell.folder / search.sheet, (_PIXELS, _PIXELS))) for search in searches]


def audits_of(results: Results) -> list[CellAudit]:
    """All audits of the finished cells of a run."""
    return [CellAudit(cell, audit) for cell in results.cells for audit in cell.audits]
