"""Measures how time and memory grow with the cells of a run and the images of a cell, against linear growth.

Run: python benchmarks/load.py [--cells 10 100 1000] [--images 1000 10000 100000] [--keep DIR] [--json]
A small run is made for real. Its records are copied into as many cells, or under as many ids, as are asked for, and its
images are linked; what is measured is the finished run. Each command is a process of its own:

- plan: `nemo-bench run ... --dry-run`;
- resume: the `nemo-bench run` that finds nothing to do;
- score: the `nemo-bench score` that finds nothing to do but to sum up;
- summary: the tables alone, all of them made again, as one of the two parts of that;
- report: `nemo-bench report`.

Growth from one size to the next is the ratio of what a step costs above the smallest size: (t3 - t1) / (t2 - t1), as a
share of the same ratio of sizes. Where it is 1, growth is linear, whatever a process costs before it does anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

SEEDS = 10
"""Images a prompt where images are counted."""
SUMMARY = """
import sys
from pathlib import Path
from nemo_bench.benchmark.rescore import cells_of
from nemo_bench.benchmark.summary import summarize
for cell in cells_of(Path(sys.argv[1])):
    summarize(cell)
"""


@dataclass
class Usage:
    """What a process took."""

    cpu_seconds: float
    seconds: float
    peak_mb: float


def measure(command: Sequence[str]) -> Usage:
    """Runs a command to its end; an error of it ends this one."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"this failed: {' '.join(command)}")
    memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return Usage(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, memory)


def command(*words: str) -> list[str]:
    """A command of the package."""
    return [sys.executable, "-m", "nemo_bench", *words]


def words_of_cells(count: int) -> list[str]:
    """Settings of a run of so many cells, of two prompts each."""
    seeds = ",".join(map(str, range(count - 1)))
    return ["method=none,random", f"method.seed={seeds}", "prompts.limit=1", "seeds=1"]


def words_of_images(count: int, folder: Path) -> list[str]:
    """Settings of a run of one cell of so many images, half of them of memorized prompts."""
    references = Path(__file__).parents[1] / "nemo_bench" / "planted" / "references"
    file = folder / "many.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count // SEEDS):
            memorized = {"kind": "VM", "references": [str(references / "vm-01.png")]} if number % 2 else {}
            lines.write(json.dumps({"id": f"p{number}", "text": f"made-up prompt number {number}", **memorized}) + "\n")
    return ["method=none", f"prompts.files=[{file}]", f"seeds={SEEDS}"]


def copy(base: Path, root: Path, words: Sequence[str]) -> None:
    """Makes the cells that settings ask for, each of the records and images of the base that has its method."""
    from nemo_bench.benchmark.pending import SETS_FILE, image_tasks, prompt_tasks
    from nemo_bench.benchmark.plan import SCORING_FILE, plan, scoring_of
    from nemo_bench.config import grid
    from nemo_bench.prompts.tasks import Task
    from nemo_bench.records import schema
    from nemo_bench.records.io import read_file, write_json
    from nemo_bench.records.store import Store, read_starts, write_prompts

    bases = {path.parent.name.split("__")[1]: path.parent for path in base.glob("*/score.done")}
    cells = plan(grid([*words, f"root={root}", "name=load"]))
    for cell in cells:
        model, store = bases[str(cell.spec.method)], cell.store
        store.open(cell.spec)
        write_prompts(store.folder, cell.prompts)
        write_json(store.folder / "layers.json", read_file(model / "layers.json", schema.Layers))
        start = read_starts(model)[-1].model_copy(update={"settings": asdict(cell.config.settings)})
        write_json(store.folder / "env.json", [start])
        prompts, images = prompt_tasks(cell), image_tasks(cell)
        for kind in cell.stages:
            records = Store(model).records(kind).values()
            by_group = {("general" in r.prompt, getattr(r, "seed", None) is None): r for r in records}

            def like(
                task: Task, seed: int | None, cell=cell, kind=kind, by_group=by_group, folder=store.folder, model=model
            ):
                record = by_group[task.prompt.kind is None, seed is None]
                changed = {"id": task.id, "prompt": task.prompt.id}
                if seed is not None:
                    changed["seed"] = seed
                if record.image:
                    end = "" if seed is None else f"_{seed:02d}"
                    changed["image"] = f"{Path(record.image).parent}/{task.prompt.id}{end}.png"
                    os.link(model / record.image, folder / changed["image"])
                if kind is schema.ScoreRecord:  # no two cells are alike
                    shift = 1e-3 * Random(f"{cell.id} {task.id}").random()
                    changed["scores"] = {name: value + shift for name, value in record.scores.items()}
                return record.model_copy(update=changed)

            of_images = [like(t, t.seed) for t in images] if kind in (schema.ImageRecord, schema.ScoreRecord) else []
            of_prompts = [like(t, None) for t in prompts] if kind is not schema.ImageRecord else []
            store.writer(kind)([*of_images, *of_prompts])
            store.finish(kind, [t.id for t in (images if kind is schema.ImageRecord else prompts)])
        write_json(store.folder / SETS_FILE, {})
        write_json(store.folder / SCORING_FILE, scoring_of(cell))


def steps(root: Path, words: Sequence[str]) -> dict[str, Usage]:
    """What each step takes of a run that is made first and taken to its end, unmeasured."""
    run = command("run", *words, f"root={root}", "name=load")
    folder = str(root / "load")
    measure([sys.executable, __file__, "--copy", str(root), *words])
    measure(run)
    return {
        "plan": measure([*run, "--dry-run"]),
        "resume": measure(run),
        "score": measure(command("score", folder)),
        "summary": measure([sys.executable, "-c", SUMMARY, folder]),
        "report": measure(command("report", folder)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="an empty folder for the runs, which stay")
    parser.add_argument("--copy", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.copy:
        root, *words = arguments.copy
        copy(Path(root).parent / "base" / "load", Path(root), words)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = (arguments.keep or Path(place)).resolve()
        measure(command("run", *words_of_cells(2), f"root={folder / 'base'}", "name=load"))
        found: dict[str, dict[int, dict[str, Usage]]] = {}
        for what, sizes in (("cells", arguments.cells), ("images", arguments.images)):
            for size in sizes:
                root = folder / f"{size} {what}"
                root.mkdir(parents=True)
                shutil.copytree(folder / "base" / "calibration", root / "calibration")
                if what == "cells":  # with the localization that random neurons start from
                    for cell in (folder / "base" / "load").glob("*__nemo__*"):
                        shutil.copytree(cell, root / "load" / cell.name)
                words = words_of_cells(size) if what == "cells" else words_of_images(size, root)
                found.setdefault(what, {})[size] = steps(root, words)
    if arguments.json:
        print(
            json.dumps(
                {w: {n: {s: asdict(u) for s, u in own.items()} for n, own in r.items()} for w, r in found.items()}
            )
        )
        return
    for what, by_size in found.items():
        show(what, by_size)


def show(what: str, by_size: dict[int, dict[str, Usage]]) -> None:
    """Prints a line for each step."""
    sizes = sorted(by_size)
    print(f"| {what} | {' | '.join(f'{size:,}' for size in sizes)} | growth against linear | peak memory |")
    print(f"| --- |{' ---: |' * (len(sizes) + 2)}")
    for step in by_size[sizes[0]]:
        used = [by_size[size][step] for size in sizes]
        times = [own.cpu_seconds for own in used]
        growth = "–"
        if len(sizes) > 2:
            first, second, *_, last = range(len(sizes))
            ratio = (times[last] - times[first]) / (times[second] - times[first])
            growth = f"{ratio * (sizes[second] - sizes[first]) / (sizes[last] - sizes[first]):.2f}"
        memory = " to ".join(f"{used[index].peak_mb:.0f}" for index in (0, -1))
        print(f"| {step} | {' | '.join(f'{t:.1f} s' for t in times)} | {growth} | {memory} MB |")


if __name__ == "__main__":
    main()
