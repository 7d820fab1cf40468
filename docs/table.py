"""Prints the most telling columns of a run's leaderboard as a Markdown table, for the README.

python docs/table.py results/all_methods
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_bench.records.results import load_results
from nemo_bench.records.schema import LeaderboardRow
from nemo_bench.report.tables import leaderboard, number, stars

COLUMNS = (("VM", "ssim"), ("VM", "memorized"), ("VM", "alignment"), ("VM", "diversity"), ("TM", "ssim"),
           ("general", "alignment"), ("general", "kid"), ("VM", "target_reached"),
           ("TM", "target_reached"))  # fmt: skip
"""Groups of prompts and metrics; those that no method of the run has are left out."""


def table(folder: Path) -> str:
    """The table of a finished run of one model.

    Args:
        folder: Such as ``results/all_methods``.
    """
    results = load_results(folder)
    rows = {(row.cell, row.group): row for row in leaderboard(results)}

    def value(row: LeaderboardRow, metric: str) -> str:
        shown = row.metrics.get(metric)
        if shown is None:
            return "–"
        span = "" if shown.low is None else f" [{shown.low:.2f}, {shown.high:.2f}]"
        return number(results, metric, shown.mean) + stars(row, metric).replace("*", "\\*") + span

    columns = [(group, metric) for group, metric in COLUMNS if metric in results.metrics]
    heads = [f"{group}: {results.metrics[metric].title} {results.metrics[metric].arrow}" for group, metric in columns]
    lines = [
        ["Method", *heads, "UNet passes once for a prompt", "for an image"],
        ["---", *["---:"] * (len(heads) + 2)],
    ]
    for cell in results.cells:
        values = [value(rows[cell.name, group], metric) for group, metric in columns]
        costs = [cell.summary.cost[key] for key in ("once_row_passes_per_prompt", "row_passes_per_image")]
        lines.append([cell.label, *values, *(f"{cost:.0f}" for cost in costs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
