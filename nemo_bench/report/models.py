"""Models side by side, without mitigation: each against its own threshold, and what an image costs."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_bench.records.io import read_file
from nemo_bench.records.results import CellResults, Results
from nemo_bench.records.schema import Aggregate, Threshold

MEASURED_AS = {"protocol": "paper", "similarity": "fixed", "velocity": "converted"}
"""Of thresholds, how noise differences are taken and compared as for memorization scores."""


@dataclass(frozen=True)
class ModelRow:
    """A model on a group of prompts."""

    cell: CellResults  #: Its cell without mitigation.
    group: str
    #: Similarity of noise differences above which its prompts count as memorized; None where that was not calibrated.
    threshold: float | None
    scores: list[float]  #: Memorization scores of the prompts.

    @property
    def above(self) -> int:
        """Number of prompts above the threshold."""
        return sum(self.threshold is not None and score > self.threshold for score in self.scores)

    def aggregate(self, metric: str | None) -> Aggregate | None:
        """A metric of the group, None where it has none."""
        return self.cell.summary.aggregates.get(self.group, {}).get(metric or "")


def model_rows(results: Results) -> list[ModelRow]:
    """Rows of every model by group, for each list of prompts; none where the run has a single model."""
    plain = [cell for cell in results.cells if cell.method == "none"] if len(results.models) > 1 else []
    keys = results.keys_of("memorization_score")
    return [
        ModelRow(cell, group, _threshold(results, cell), [*cell.prompt_means(keys[0], [group]).values()])
        for group in results.groups
        for cell in plain
        if keys and group in cell.summary.aggregates
    ]


def _threshold(results: Results, cell: CellResults) -> float | None:
    """The threshold that any cell of the same model calibrated."""
    for other in results.cells:
        if _network(other) == _network(cell) and (folder := other.calibration):
            found = read_file(folder / "threshold.json", Threshold)
            if all(getattr(found, name) == value for name, value in MEASURED_AS.items()):
                return found.threshold
    return None


def _network(cell: CellResults) -> object:
    """What decides a threshold of a model."""
    settings = cell.spec.settings.get("model", {})
    return cell.model, {name: value for name, value in settings.items() if name not in ("steps", "guidance")}
