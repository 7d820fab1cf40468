"""What every mitigation costs, relative to no mitigation measured in the same run.

Run: python benchmarks/methods.py [--json] [key=value ...]
The words key=value are settings of `nemo-bench run`; without them, the cells are those of experiment=all_methods
strengths=false. An image's time is the median over batches, so that neither the first one nor a hiccup counts. Costs
of a prompt, once, and of every image are separate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run
from nemo_bench.config import grid
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import ImageRecord, LocalizationRecord, MemorizationRecord
from nemo_bench.records.store import read_records

FEW = ["prompts.limit=3", "batch_size=8"]


def image_costs(cell: Path) -> tuple[float, float]:
    """Median seconds and mean UNet passes of one sample, for an image."""
    costs = [record.cost for record in read_records(cell, ImageRecord).values() if record.cost]
    return median(cost.seconds or 0.0 for cost in costs), fmean(cost.row_passes or 0.0 for cost in costs)


def prompt_costs(cell: Path) -> tuple[float, float]:
    """The same of what a method does once for a prompt, over both stages that it may do it in."""
    seconds: dict[str, float] = {}
    passes: dict[str, float] = {}
    for kind in (LocalizationRecord, MemorizationRecord):
        for record in read_records(cell, kind).values():
            if record.cost:
                seconds[record.prompt] = seconds.get(record.prompt, 0.0) + (record.cost.once_seconds or 0.0)
                passes[record.prompt] = passes.get(record.prompt, 0.0) + (record.cost.once_row_passes or 0.0)
    return median(seconds.values()), fmean(passes.values())


def measure(words: list[str], root: str) -> list[dict[str, Any]]:
    """Costs of each cell beside those of the cell without mitigation of the same run."""
    cells = plan(grid([*words, f"root={root}"]))
    folder = run(cells, "benchmarks/methods.py")
    labels = {cell.name: cell.label for cell in load_results(folder).cells}
    (unmitigated,) = (cell.id for cell in cells if not cell.is_mitigated)
    base_seconds, base_passes = image_costs(folder / unmitigated)
    rows = []
    for cell in cells:
        seconds_once, passes_once = prompt_costs(folder / cell.id)
        seconds, passes = image_costs(folder / cell.id)
        rows.append(
            {
                "method": labels[cell.id],
                "image_time_ratio": seconds / base_seconds,
                "image_pass_ratio": passes / base_passes,
                "seconds_per_image": seconds,
                "seconds_once": seconds_once,
                "passes_once": passes_once,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, redirect_stdout(sys.stderr):
        rows = measure([*FEW, *(arguments.overrides or ["experiment=all_methods", "strengths=false"])], root)
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| method | image: time | image: passes | s an image | prompt, once: s | prompt, once: passes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        ratios = f"{row['image_time_ratio']:.2f}x | {row['image_pass_ratio']:.2f}x | {row['seconds_per_image']:.2f}"
        print(f"| {row['method']} | {ratios} | {row['seconds_once']:.2f} | {row['passes_once']:.0f} |")


if __name__ == "__main__":
    main()
