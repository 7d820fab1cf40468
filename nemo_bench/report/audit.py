"""Audits of a run: rows, sentences and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from nemo_bench.errors import counted
from nemo_bench.records.citations import cite
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import Audit, SearchResult, Thumbnail
from nemo_bench.report.texts import TEXTS
from nemo_bench.report.thumbnails import Thumbnails

_GROUPS = {"memorized": "Memorized", "control": "Controls"}
_NAMES = {"memorized": "memorized prompts", "control": "controls"}
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
        if self.is_inversion:
            steps = f"inversion in at most {settings['steps']} steps of {settings['samples']} samples"
            return f"{self.cell.label}: {steps} at rate {settings['rate']:g}"
        start = "the prompt" if settings["start"] == "prompt" else "random numbers"
        steps = f"{settings['steps']} steps of {settings['samples']} samples at rate {settings['rate']:g} from {start}"
        return f"{self.cell.label}: {steps}, {counted(settings['images'], 'image')} each"

    @property
    def is_inversion(self) -> bool:
        """Whether pictures were inverted."""
        return self.audit.settings.get("audit") == "inversion"

    @property
    def citation(self) -> str:
        """BibTeX of the search."""
        return cite("ma2025inversion") if self.is_inversion else cite("kowalczuk2026finding")

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
            what = "noise and tokens" if self.is_inversion else "embedding"
            text = (
                f"{title}: {own['prompt']['mean']:.0%} of the images of a prompt, "
                f"{own['found']['mean']:.0%} with the {what} found"
            )
            if "control" in scores:
                text += f", {scores['control'][key]['found']['mean']:.0%} of controls"
            yield f"{text}. {TEXTS['verdicts'][verdict]}"
        if inverted := self.audit.inverted:
            parts = [
                f"{found.reached} of {found.pictures} pictures of {_NAMES[group]} replicated"
                + (f" (median divergence {found.median:.3f})" if found.median is not None else "")
                for group, found in inverted.items()
            ]
            auc = self.audit.inverted_auc
            told = "" if auc is None else f" Memorized pictures come before controls with AUC {auc:.2f}."
            yield f"InvMM: {'; '.join(parts)}.{told}"
        yield from self._diagnoses()
        if failed := sum(self.audit.failed.values()):
            yield f"Searches that failed, since something was not finite, and are left out: {failed}."

    def _diagnoses(self) -> Iterator[str]:
        """What searches from many starts for the same pictures have in common, in words."""
        found = [search.diagnosis for search in self.audit.searches if search.diagnosis]
        if not found:
            return
        names = {"found": "what they found", "starts": "their starts", "general": "general prompts"}
        apart = ", ".join(
            f"{name} {fmean(one.spread[key].mean for one in found):.1f} "
            f"(cosine {fmean(one.spread[key].cosine for one in found):.2f})"
            for key, name in names.items()
            if key in found[0].spread
        )
        layers = [layer for one in found for layer in one.activations.values()]
        activated = ", ".join(
            f"{name} {fmean(layer[key] for layer in layers):.2f}"
            for key, name in (("found", names["found"]), ("memorized", "memorized prompts"))
            if all(key in layer for layer in layers)
        )
        agreements = [layer for one in found for layer in one.agreement.values()]
        iou, random, share = (fmean(getattr(one, key) for one in agreements) for key in ("iou", "random", "share"))
        yield (
            f"{self.audit.settings['starts']} searches from random numbers for {counted(len(found), 'picture')}. Mean "
            f"distance of embeddings: {apart}. Of activations, in units of their norm: {activated}. Wanda's weights, "
            f"{share:.1%} of each layer: intersection over union {iou:.2f}, {random:.3f} for random ones."
        )

    def pictures(self) -> list[tuple[SearchResult, Thumbnail | None]]:
        """The first searches and their sheets."""
        make = Thumbnails(self.cell.folder)
        searches = self.audit.searches[:_SHOWN]
        return [(search, make(self.cell.folder / search.sheet, (_PIXELS, _PIXELS))) for search in searches]


def audits_of(results: Results) -> list[CellAudit]:
    """All audits of the finished cells of a run."""
    return [CellAudit(cell, audit) for cell in results.cells for audit in cell.audits]
