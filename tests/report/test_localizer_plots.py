"""Figures of localizers."""

from __future__ import annotations

from nemo_bench.records.schema import Aggregate, LocalizerRow, LocalizerTable, MetricInfo
from nemo_bench.report.localizer_plots import figures

MEASURES = ("training_similarity", "general_loss", "recall")


def pictures(low: float | None, high: float | None) -> list[str]:
    values = {key: Aggregate(mean=0.3, low=low, high=high, prompts=4) for key in MEASURES}
    row = LocalizerRow(
        cell="a", label="A", model="m", localizer="a", prompts="p", comparison="m · p", group="VM",
        n_prompts=4, failed=0, values=values,
    )  # fmt: skip
    info = MetricInfo(title="t", description="d", family="f")
    table = LocalizerTable(name="n", against={"m · p": "A"}, measures=dict.fromkeys(MEASURES, info), rows=[row])
    return [plot.svg for plot in figures(table, [row], "f", "VM")]


def test_an_interval_that_begins_or_ends_at_zero_is_drawn() -> None:
    without = pictures(None, None)
    assert len(without) == 2
    assert pictures(0.3, 0.3) == without
    for ends in ((0.0, 0.3), (0.3, 0.0), (0.0, 0.0)):
        assert all(drawn != point for drawn, point in zip(pictures(*ends), without, strict=True))
