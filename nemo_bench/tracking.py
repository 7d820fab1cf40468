"""Weights & Biases, told from records alone; nothing else imports wandb.

A run is complete on disk before this is called, so a failure here loses nothing and is only reported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from nemo_bench.config import LoggerSettings
from nemo_bench.store import read_json, read_records, write_json
from nemo_bench.types import Neurons, digest


def track(cell: Path, settings: LoggerSettings, *, group: str, say: Callable[[str], None] = print) -> None:
    """Makes one W&B run of a finished cell: config, summary, a table with pictures, the records as artifact.

    The run's id follows from run and cell, so tracking again continues the same W&B run; results that were tracked
    already are left alone.

    Args:
        cell: A finished cell's folder; W&B's own files go to ``cell/wandb``.
        settings: Project, entity, mode and number of prompts shown with pictures.
        group: Name that ties the cells of one run together.
        say: Where the one line on success or failure goes.
    """
    spec, metrics = read_json(cell / "spec.json"), read_json(cell / "metrics.json")
    mode: Any = settings.mode or os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode == "disabled":
        return
    marker, wanted = cell / "tracked.json", {"results": _results_digest(cell), "mode": mode}
    if marker.exists() and read_json(marker) == wanted:
        return
    try:
        with _staged_in(cell / "wandb"):
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                id=digest([read_json(cell.parent / "run.json")["token"], cell.name]),
                name=cell.name[:64],
                group=group[:64],
                job_type="benchmark",
                tags=[spec[key][:64] for key in ("model", "method", "prompts")],
                config={**spec["settings"], "title": spec["title"], "digests": spec["digests"]},
                dir=cell,
                mode=mode,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
            )
            try:
                run.summary.update(dict(_summary(metrics)))
                run.log({"prompts": _table(cell, metrics, settings.thumbnails)})
                run.log_artifact(_artifact(cell))
            finally:
                run.finish()
        write_json(marker, wanted)
        say(f"W&B ({mode}): {cell / 'wandb'}")
    except (wandb.Error, OSError) as error:
        say(f"W&B failed, the results are untouched: {error}")


def _has_key() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    return bool(os.environ.get("WANDB_API_KEY")) or host in _netrc().split()


def _netrc() -> str:
    try:
        return Path(os.environ.get("NETRC", "~/.netrc")).expanduser().read_text(encoding="utf-8")
    except OSError:
        return ""


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Keeps W&B's staged media and artifacts beside the run, so that the folder can be copied and synced elsewhere."""
    wanted = {"WANDB_DATA_DIR": str(folder.resolve()), "WANDB_CACHE_DIR": str((folder / "cache").resolve())}
    before = {name: os.environ.get(name) for name in wanted}
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _results_digest(cell: Path) -> str:
    results = {
        stage: sorted(
            json.dumps({k: v for k, v in record.items() if k != "cost"}, sort_keys=True)
            for record in read_records(cell, stage).values()
        )
        for stage in ("localize", "generate", "score")
    }
    return digest(results, 12)


def _summary(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for group, row in metrics["aggregates"].items():
        for metric, numbers in row.items():
            for kind, value in numbers.items():
                yield f"{group}/{metric}/{kind}", value
    for name, value in metrics["cost"].items():
        yield f"cost/{name}", value


def _table(cell: Path, metrics: Mapping[str, Any], thumbnails: int) -> wandb.Table:
    lines = (cell / "prompts.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    prompts = [json.loads(line) for line in lines]
    localized = {r["prompt"]: r for r in read_records(cell, "localize").values()}
    images: dict[str, list[Path]] = {}
    for record in sorted(read_records(cell, "generate").values(), key=lambda r: r["seed"]):
        images.setdefault(record["prompt"], []).append(cell / record["image"])
    scores: dict[str, dict[str, list[float]]] = {}
    for record in read_records(cell, "score").values():
        for metric, value in record["scores"].items():
            scores.setdefault(record["prompt"], {}).setdefault(metric, []).append(value)
    unmitigated = _unmitigated(cell)
    names = list(metrics["metrics"])
    pictures = ["training image", "unmitigated", "mitigated", "noise differences"]
    table = wandb.Table(columns=["prompt", "text", "group", *pictures, "neurons by layer", *names])
    for number, prompt in enumerate(prompts):
        record = localized[prompt["id"]]
        first = images[prompt["id"]][0]
        files: list[Path | None] = [Path(p) for p in prompt["references"][:1]] or [None]
        files += [unmitigated / first.relative_to(cell) if unmitigated else None, first, cell / record["noise"]]
        shown = [wandb.Image(str(f)) if f and f.is_file() and number < thumbnails else None for f in files]
        means = [scores[prompt["id"]].get(name) for name in names]
        table.add_data(
            prompt["id"],
            prompt["text"],
            prompt["group"],
            *shown,
            json.dumps(dict(Neurons(record["neurons"]))),
            *(sum(m) / len(m) if m else None for m in means),
        )
    return table


def _unmitigated(cell: Path) -> Path | None:
    """The folder of the cell without mitigation that belongs to the same model and prompts, if there is one."""
    spec = read_json(cell / "spec.json")
    for path in sorted(cell.parent.glob("*/spec.json")):
        other = read_json(path)
        same = all(other["settings"][key] == spec["settings"][key] for key in ("model", "prompts"))
        if other["method"] == "none" and same:
            return path.parent
    return None


def _artifact(cell: Path) -> wandb.Artifact:
    artifact = wandb.Artifact(f"records-{digest([cell.name], 12)}", type="records", metadata={"cell": cell.name})
    for name in ("records", "neurons"):
        artifact.add_dir(str(cell / name), name)
    for name in ("spec.json", "metrics.json", "prompts.jsonl", "env.json"):
        artifact.add_file(str(cell / name), name)
    return artifact
