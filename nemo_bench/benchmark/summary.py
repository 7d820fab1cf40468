"""From the records of a cell to the numbers of its table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_bench.benchmark.plan import ImageCell, metrics_of
from nemo_bench.benchmark.runner import (
    SETS,
    unmitigated_images,
)
from nemo_bench.metrics import detection
from nemo_bench.prompts import dead_references
from nemo_bench.records.data import Record
from nemo_bench.records.io import read_json, read_object
from nemo_bench.records.statistics import GROUPS, aggregate, presets
from nemo_bench.records.store import SCHEMA

REACHED = "target_reached"
"""In tables, the share of images whose method reached its target."""
_REACHED_IS = {
    "measure": "TargetReached",
    "title": "Target reached",
    "description": "share of images whose optimization or search reached the method's target",
    "citation": "",
    "higher_is_better": None,
    "lower": 0.0,
    "upper": 1.0,
    "family": "localization",
    "per": "image",
}


def summary_of(cell: ImageCell) -> dict[str, Any]:
    """What ``metrics.json`` of a cell holds: its table, failures, counts and cost."""
    store = cell.store
    localized, generated = store.records("localize").values(), store.records("generate").values()
    scored = store.records("score").values()
    peak = max((r.get("cost", {}) for r in [*localized, *generated]), key=lambda cost: cost.get("peak_memory_mb", 0))
    about = {name: metric.describe() for name, metric in metrics_of(cell).items()}
    measures = presets(scored, cell.prompts, about)
    aggregates = aggregate(scored, cell.prompts, _scores_without_mitigation(cell))
    if targets := _targets(generated):
        about[REACHED] = _REACHED_IS
        for group, row in aggregate(targets, cell.prompts).items():
            aggregates.setdefault(group, {}).update(row)
    sets = read_json(store.folder / SETS)
    with_images = {record["prompt"] for record in generated if "image" in record}
    for group, row in sets.items():
        count = sum(group in ("all", p.group) and p.id in with_images for p in cell.prompts)
        nothing = dict.fromkeys(("low", "high", "median", "mad"))
        found = {name: {"mean": value, **nothing, "prompts": count} for name, value in row.items() if value is not None}
        aggregates.setdefault(group, {}).update(found)
    failed = _failures(cell, sets)
    for group in failed:
        aggregates.setdefault(group, {})
    total = failed.get("all", {"images": 0, "localizations": 0, "scores": 0})

    def costs(records: Iterable[Record], field: str) -> list[float]:
        # What failed may have been given up at once.
        return [r["cost"][field] for r in records if field in r.get("cost", {}) and "failed" not in r]

    measured = {
        "localize_seconds_per_prompt": costs(localized, "seconds"),
        "once_seconds_per_prompt": costs(localized, "once_seconds"),
        "once_row_passes_per_prompt": costs(localized, "once_row_passes"),
        "generate_seconds_per_image": costs(generated, "seconds"),
        "row_passes_per_image": costs(generated, "row_passes"),
    }
    memory = costs([*localized, *generated], "peak_memory_mb")
    return {
        "schema": SCHEMA,
        "unmitigated": cell.unmitigated.id if cell.unmitigated else None,
        "metrics": about,
        "aggregates": aggregates,
        "presets": measures,
        "failed": failed,
        "detection": _detection(cell, localized),
        "localization": _searches(cell, localized),
        "counts": {
            "images": sum("image" in record for record in generated),
            "prompts": len(cell.prompts),
            **{f"failed_{kind}": total[kind] for kind in ("images", "localizations", "scores")},
            **_apart(cell, generated),
            "truncated": sum(bool(record.get("truncated")) for record in scored),
            "without_reference": sum(bool(p.kind) and not p.references for p in cell.prompts),
            "dead_references": len(dead_references(cell.prompts)),
            "damaged_references": len({file for p in cell.prompts for file in p.damaged_references}),
        },
        # Nothing is known of the cost of images that were made elsewhere.
        "cost": {
            **{name: round(sum(values) / len(values), 4) for name, values in measured.items() if values},
            **({"peak_memory_mb": max(memory)} if memory else {}),
        },
        "peak_memory_of": "process" if peak.get("device", "cpu") == "cpu" else "GPU",
    }


def _targets(generated: Iterable[Record]) -> list[Record]:
    """Of images whose method had a target, whether it was reached, in the form of scores."""
    return [
        {**record, "scores": {REACHED: float(record["notes"]["reached"])}}
        for record in generated
        if "image" in record and "reached" in record.get("notes", {})
    ]


def _failures(cell: ImageCell, sets: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """What was not finite, by group that has any.

    Returns:
        Numbers of ``images``, of prompts' ``localizations`` and of ``scores``; and by metric, ``metrics``, of the
        images and prompts that it lacks for one of these reasons.
    """
    store, metrics = cell.store, metrics_of(cell)
    generated, localized, scored = (store.records(stage).values() for stage in ("generate", "localize", "score"))
    before = unmitigated_images(cell)
    images = Counter(record["prompt"] for record in generated if "failed" in record)
    unpaired = Counter(r["prompt"] for r in generated if "image" in r and before and r["id"] not in before)
    lost = {record["prompt"] for record in localized if "failed" in record}
    scores = Counter((record["prompt"], name) for record in scored for name in record.get("failed", ()))
    found = {(record["prompt"], name) for record in scored for name in record["scores"]}
    table = {}
    for group in GROUPS:
        members = {p.id for p in cell.prompts if group in ("all", p.group)}
        without_value = [name for name, value in sets.get(group, {}).items() if value is None]
        of_metrics = {}
        for name, metric in metrics.items():
            missing = sum(scores[i, name] for i in members) + without_value.count(name)
            if "images" in metric.needs:
                missing += sum(images[i] for i in members)
            if "unmitigated" in metric.needs:
                missing += sum(unpaired[i] for i in members)
            if "localization" in metric.needs:
                missing += sum(i in lost and (i, name) not in found for i in members)
            if missing:
                of_metrics[name] = missing
        counts = {
            "images": sum(images[i] for i in members),
            "localizations": sum(i in lost for i in members),
            "scores": sum(count for (i, _), count in scores.items() if i in members),
        }
        if any(counts.values()) or of_metrics:
            table[group] = {**counts, "metrics": of_metrics}
    return table


def _searches(cell: ImageCell, localized: Iterable[Record]) -> dict[str, dict[str, int | None]]:
    """By group, how many prompts passed the gate of a search, and in how many its selection ran out.

    None where that is not known; without a group whose prompts were not searched.
    """
    records = {record["prompt"]: record for record in localized}

    def count(members: Sequence[str], key: str) -> int | None:
        known = [found for name in members if (found := records.get(name, {}).get(key)) is not None]
        return sum(known) if known else None

    groups = {group: [p.id for p in cell.prompts if group in ("all", p.group)] for group in GROUPS}
    table = {
        group: {"prompts": len(members), **{key: count(members, key) for key in ("passed_gate", "exhausted")}}
        for group, members in groups.items()
    }
    return {group: row for group, row in table.items() if row["passed_gate"] is not None}


def _apart(cell: ImageCell, generated: Iterable[Record]) -> dict[str, int]:
    """Of images made elsewhere: prompts that have none, and images of another size than most."""
    sizes = Counter(tuple(record["size"]) for record in generated if "size" in record)
    without = len(cell.prompts) - len({record["prompt"] for record in generated})
    return {"without_images": without, "resized": sizes.total() - max(sizes.values())} if sizes else {}


def _scores_without_mitigation(cell: ImageCell) -> Iterable[Record]:
    """Scores to pair with those of a cell; none where other metrics or reference images made them."""
    none = cell.unmitigated
    if none is None or not none.store.is_done("score"):
        return ()
    keys = ("metrics", "references")
    own, other = (read_object(store.folder / "scoring.json", *keys) for store in (cell.store, none.store))
    same = all(own[key] == other[key] for key in keys)
    return none.store.records("score").values() if same else ()


def _detection(cell: ImageCell, localized: Iterable[Record]) -> dict[str, Any]:
    """How well the memorization score tells memorized prompts from others: without mitigation, where both are there.

    Prompts whose noise differences are not finite have no score; ``failed`` is their number.
    """
    kinds, records = {p.id: bool(p.kind) for p in cell.prompts}, list(localized)
    scored = [r for r in records if "memorization" in r]
    scores = {kind: [r["memorization"] for r in scored if kinds[r["prompt"]] == kind] for kind in (True, False)}
    if cell.is_mitigated or not all(scores.values()):
        return {}
    found = detection(scores[True], scores[False])
    return {"memorization": {"title": "Memorization score", **found, "failed": len(records) - len(scored)}}
