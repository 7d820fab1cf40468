"""From cells to results: images, scores, table and report."""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import yaml

from nemo_bench.records.statistics import GROUPS, aggregate, presets
from nemo_bench.benchmark.plan import STAGES, STATISTICS, THRESHOLD, Cell, ImageCell, metrics_of, with_sources
from nemo_bench.config import ModelSettings, SimilaritySettings, resolve
from nemo_bench.diffusion import Diffusion, folder_digest
from nemo_bench.errors import ConfigError, ModelError, NemoBenchError, StoreError, counted, nearest
from nemo_bench.localization.published import PublishedRow, by_position, published_text
from nemo_bench.methods import Method
from nemo_bench.metrics import detection
from nemo_bench.benchmark.stages import localization_of
from nemo_bench.records.pictures import unreadable, visible
from nemo_bench.prompts import dead_references, references_digest
from nemo_bench.report import write_report
from nemo_bench.report.detection import write_detection
from nemo_bench.benchmark.runner import (
    SETS,
    Runner,
    by_prompt,
    is_main,
    load_model,
    mostly_failed,
    neurons_by_prompt,
    note_start,
    open_folder,
    scored_tasks,
    unmitigated_images,
)
from nemo_bench.records.store import (
    SCHEMA,
    Store,
    as_json,
    damaged,
    is_whole,
    iterate_records,
    read_cell_prompts,
    read_json,
    read_object,
    read_settings,
    read_spec,
    write_json,
    write_text,
)
from nemo_bench.tracking import sweep_trial, track
from nemo_bench.records.data import Neurons, Record, digest

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


def run(cells: Sequence[Cell], command: str, say: Callable[[str], None] = print, *, progress: bool = True) -> Path:
    """Runs what is open of some cells, to the report.

    Args:
        cells: From :func:`nemo_bench.benchmark.plan.plan`, of one name and root.
        command: What the user typed, for the records.
        say: Where single lines go.
        progress: Whether bars are shown.

    Returns:
        The folder of the run, with ``report.html`` and the leaderboard.

    Raises:
        NemoBenchError: See :func:`nemo_bench.benchmark.plan.plan`; also where a results folder belongs to something else.
    """
    settings = cells[0].choice.settings
    folder = Path(settings.root) / settings.name
    if settings.logger.wandb:
        sweep_trial({cell.id: cell.spec["method"] for cell in cells})
    runner = Runner(settings.trainer, progress=progress)
    runner.start()
    if is_main():
        open_folder(folder, cells, instead=True)
        for cell in with_sources(cells):
            cell.store.open(cell.spec)
            note_start(cell, command, runner)
            _reopen(cell)
        renew_scores(cells)
        tell_damaged(cells, say)
    runner.trainer.strategy.barrier()
    for cell in cells:
        runner.make(cell)
    if is_main():
        for cell in cells:
            _publish(cell)
    finish(cells, runner, say)
    return folder


def tell_damaged(cells: Sequence[ImageCell], say: Callable[[str], None]) -> None:
    """Says how many training images can't be decoded, and how many prompts have no similarity to any for it."""
    prompts = {prompt.id: prompt for cell in cells for prompt in cell.prompts}.values()
    files = list(dict.fromkeys(file for prompt in prompts for file in prompt.damaged_references))
    if files:
        total = len({file for prompt in prompts for file in (*prompt.references, *prompt.damaged_references)})
        alone = sum(not prompt.references for prompt in prompts if prompt.damaged_references)
        why = unreadable(files[:1], "training images").get(files[0], "mended by now")
        what = f"{len(files)} of {total} training images can't be decoded and are left out: {files[0]} ({why})"
        more = ", ..." if len(files) > 1 else ""
        say(f"{what}{more}. Prompts that have no other, so no similarity to training images: {alone}")


def renew_scores(cells: Sequence[ImageCell]) -> None:
    """Downloads what open metrics are to download; forgets scores that can't stay."""
    stale = [cell for cell in cells if _scores_are_stale(cell)]
    for cell in cells:
        cell.store.recount("score", [task.id for task in scored_tasks(cell)])
    for cell in cells:
        for metric in metrics_of(cell).values() if cell in stale or not cell.store.is_done("score") else ():
            metric.space.fetch()
    for cell in stale:
        _forget_scores(cell.store)
        write_json(cell.store.folder / "scoring.json", _scoring(cell))


def finish(cells: Sequence[ImageCell], runner: Runner, say: Callable[[str], None] = print) -> None:
    """Scores what is open of cells whose images are there, to the report of their run.

    Args:
        cells: Cells of one run.
        runner: The trainer.
        say: Where single lines go.
    """
    for cell in cells:
        runner.score(cell)
    if is_main():
        folder, logger = cells[0].store.folder.parent, cells[0].choice.settings.logger
        for cell in cells:
            write_json(cell.store.folder / "metrics.json", _summary(cell))
        # Another command of this name may have taken them off the list while they were not finished.
        open_folder(folder, cells)
        write_report(folder)
        if (folder / "detection.html").is_file():
            write_detection(folder)  # the pages link to one another
        try:
            track(folder, logger, cells=[cell.id for cell in cells], say=say)
        except NemoBenchError as error:
            say(str(error))


def calibrate(cells: Sequence[Cell], *, progress: bool = True) -> list[dict[str, Any]]:
    """Measures on general prompts what the methods of some cells, or their sources, need; once, then it is cached.

    Args:
        cells: From :func:`nemo_bench.benchmark.plan.plan`, of one root.
        progress: Whether bars are shown.

    Returns:
        One entry a calibration: model; what :func:`nemo_bench.localization.thresholds` returns (None where the
        threshold was given); file of the general prompts and of the statistics; folder of what was measured.

    Raises:
        NemoBenchError: See :func:`nemo_bench.benchmark.plan.plan`; also where no method takes a calibration.
    """
    needed = [cell for cell in with_sources(cells) if cell.method.needs_calibration]
    if not needed:
        raise ConfigError("none of the methods asked for takes a calibration; name one that does, such as method=nemo")
    if not all(cell.is_calibrated for cell in needed):
        runner = Runner(needed[0].choice.settings.trainer, progress=progress)
        runner.start()
        for cell in needed:
            runner.calibrate(cell)
    for cell in needed:
        if STATISTICS in cell.measured and not (cell.calibration.folder / STATISTICS).exists():
            msg = f"{cell.calibration.folder}: activations of the calibration prompts are not finite"
            raise ModelError(f"{msg}; try model.dtype=float32 or bfloat16")
    rows = [_calibration_of(cell) for cell in needed]
    for row in rows:
        if row["threshold"] is None:
            failed, total = row["failed"], row["failed"] + row["prompts"]
            msg = f"{row['folder']}: noise differences of {failed} of {total} calibration prompts are not finite"
            raise ModelError(f"{msg}, so there is no threshold; try model.dtype=float32 or bfloat16")
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def _calibration_of(cell: Cell) -> dict[str, Any]:
    folder, given = cell.calibration.folder, cell.choice.settings.model.statistics
    measured = read_json(folder / THRESHOLD) if THRESHOLD in cell.measured else {}
    return {
        "model": cell.spec["model"],
        **dict.fromkeys(("mean", "std", "passed_gate", "maxima")),
        "failed": 0,
        "prompts": len(cell.calibration_prompts),
        **measured,
        **({} if cell.method.threshold is None else {"threshold": cell.method.threshold}),
        **cell.method.protocol.of_threshold,
        "general_prompts": cell.choice.settings.prompts.calibration if cell.calibration_prompts else None,
        "statistics": resolve(given) if given else str(folder / STATISTICS),
        "folder": str(folder) if cell.measured else None,
    }


def _reopen(cell: Cell) -> None:
    """Opens stages again that were done once and miss something now; what is made again is scored again."""
    store = cell.store
    for stage in STAGES[:-1]:
        if store.is_done(stage) and store.open_ids(stage, cell.ids(stage)):
            store.reopen(stage)
            _forget_scores(store)


def _forget_scores(store: Store) -> None:
    store.forget("score")
    (store.folder / SETS).unlink(missing_ok=True)


def _scoring(cell: ImageCell) -> dict[str, Any]:
    """What decides the scores of given images."""
    nodes, metrics = cell.choice.settings.metrics, metrics_of(cell)
    paired = cell.unmitigated and any("unmitigated" in metric.needs for metric in metrics.values())
    content = {
        "metrics": {name: {**nodes[name], **metric.content()} for name, metric in metrics.items()},
        "unmitigated": cell.unmitigated.id if cell.unmitigated and paired else None,
        "references": references_digest(cell.prompts),
    }
    return json.loads(as_json(content))  # as it will be read again


def _scores_are_stale(cell: ImageCell) -> bool:
    """Whether scores are of other metrics or reference images, or some of them were lost.

    The scores of a prompt are written after those of its images, so no kill leaves the first without the others.
    """
    path = cell.store.folder / "scoring.json"
    if not is_whole(path) or read_json(path) != _scoring(cell):
        return True
    scored = {(record["prompt"], record["seed"]) for record in iterate_records(cell.store.folder, "score")}
    images = [(r["prompt"], r["seed"]) for r in iterate_records(cell.store.folder, "generate") if "image" in r]
    return any((prompt, None) in scored and (prompt, seed) not in scored for prompt, seed in images)


def _publish(cell: Cell) -> None:
    """Writes what a method found in the published form, beside the records; without prompts that failed."""
    if type(cell.method).localize is Method.localize:
        return
    widths, found = read_json(cell.store.folder / "layers.json"), by_prompt(cell.store)
    rows = []
    for prompt in cell.prompts:
        if "neurons" not in found[prompt.id]:
            continue
        result = localization_of(found[prompt.id])
        initial = by_position(result.listed_initial or result.initial, widths)
        refined = by_position(result.listed or result.neurons, widths)
        url = next(iter(prompt.links), "")
        rows.append(PublishedRow(prompt.text, url, initial, result.initial_score, refined, result.refined_score))
    write_text(cell.store.folder / "neurons.csv", published_text(rows))


def _summary(cell: ImageCell) -> dict[str, Any]:
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


def check_made(cells: Sequence[ImageCell]) -> None:
    """Looks whether most images of each cell are there, once everything else is done and written.

    Raises:
        ModelError: More than half of a cell's images failed; the reasons are named, and what may help.
    """
    if lines := mostly_failed([cell.store for cell in cells], "generate", "images"):
        hint = (
            "half precision may overflow: try model.dtype=float32 or bfloat16; else the weights, the scheduler or the "
            "method's settings are at fault. Failed images are recorded, and have no score"
        )
        raise ModelError("\n".join([*lines, hint]))


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


def outlook(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What a run would do, without loading or writing anything.

    Returns:
        One entry a cell, and before them one for each source that was not asked for: open records by stage, whether it
        is calibrated (None where it need not be), missing references.
    """
    rows = []
    for cell in with_sources(cells):
        stages = STAGES if cell in cells else STAGES[:1]
        open_ids = {stage: len(cell.store.open_ids(stage, cell.ids(stage))) for stage in stages}
        if "score" in open_ids and _scores_are_stale(cell):
            open_ids["score"] = len(cell.prompts)
        rows.append(
            {
                "cell": cell.id,
                "open": open_ids,
                "calibrated": cell.is_calibrated if cell.method.needs_calibration else None,
                "prompts_without_reference": sum(bool(p.kind) and not p.references for p in cell.prompts),
            }
        )
    return rows


def export(cell: Path, folder: Path, prompt: str | None = None) -> Neurons:
    """Saves a cell's pipeline with the neurons of its localization switched off for good, and a model card.

    Args:
        cell: A cell's folder.
        folder: Where the plain diffusers folder goes; must not hold anything yet.
        prompt: Id of the prompt whose neurons are taken; None takes those of all memorized prompts together, or of
            all prompts where none is known to be memorized.

    Returns:
        What was switched off.

    Raises:
        NemoBenchError: The cell has no localization, the prompt is unknown, or the folder is not empty.
    """
    if folder.exists() and any(visible(folder.iterdir(), folder)):
        raise StoreError(f"{folder} is not empty; name a new folder to export to")
    found = neurons_by_prompt(Store(cell))
    if not found:
        raise StoreError(f"{cell} holds no localization; give results/<name>/<cell> of a finished run")
    if prompt is not None and prompt not in found:
        raise ConfigError(f"no prompt '{prompt}' in {cell}. {nearest(prompt, found)}")
    memorized = [found[p.id] for p in read_cell_prompts(cell, read_spec(cell)) if p.kind and p.id in found]
    neurons = found[prompt] if prompt is not None else reduce(or_, memorized or found.values())
    if not neurons:
        raise StoreError(f"{cell} switches nothing off; name the cell of a method that localizes, such as nemo")
    settings = read_settings(cell)
    model = settings["model"]
    try:
        chosen = ModelSettings(**{**model, "similarity": SimilaritySettings(**model["similarity"])})
        factor = float(settings["method"].get("factor", 0.0))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(cell / "env.json", f"settings that can't be read: {error}") from error
    loaded = load_model(chosen)
    loaded.export(folder, neurons, factor)
    whose = f"prompt `{prompt}`" if prompt is not None else f"{counted(len(memorized or found), 'prompt')} together"
    write_text(folder / "README.md", _card(cell, folder, loaded, neurons, factor, whose))
    return neurons


def _card(cell: Path, folder: Path, model: Diffusion, neurons: Neurons, factor: float, whose: str) -> str:
    """The model card of an exported pipeline."""
    spec, settings = read_spec(cell), read_settings(cell)["model"]
    kind, digests = type(model.pipeline).__name__, spec["digests"]
    on_hub = "commit" in digests
    about = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["memorization", "nemo-bench"]}
    front = yaml.safe_dump({**about, **({"base_model": settings["source"]} if on_hub else {})}, sort_keys=False)
    given = {
        "Base model": f"`{settings['source']}`" + (f", commit `{digests['commit']}`" if on_hub else ""),
        "Listed as": settings["summary"],
        "LoRA, fused": f"`{settings['lora']}`, scale {settings['lora_scale']}" if settings.get("lora") else "",
        "Digest of the base model's weights": f"`{digests['model']}`",
        "Method": spec["title"],
        "Sampled in the run by": f"DDIM, {settings['steps']} steps, guidance {settings['guidance']:g}",
        "From cell": f"`{spec['cell']}` of nemo-bench {importlib.metadata.version('nemo-bench')}",
        "Neurons of": whose,
        "Outputs multiplied by": f"{factor:g}",
        "Digest of the neurons": f"`{digest(dict(neurons))}`",
        "Digest of this folder": f"`{folder_digest(folder)}`, without this card",
    }
    facts = "".join(f"| {name} | {value} |\n" for name, value in given.items() if value)
    layers = "".join(f"| `{name}` | {len(ids)} | {', '.join(map(str, ids))} |\n" for name, ids in neurons.items())
    citations = "".join(f"```bibtex\n{text.strip()}\n```\n\n" for text in spec["citations"].values())
    return (
        f"""---
{front}---

# {spec["model"]} with {neurons.count} value neurons switched off

A copy of the base model in which value neurons of cross-attention layers are switched off for good: their weights are
multiplied, nothing else differs. It is meant for research on memorization. What else changes was measured on the
prompts of one run only, and some memorized prompts may still be generated.

| | |
| --- | --- |
{facts}
The licence of the base model holds for this one too; see the base model's own card.

## Use

```python
from diffusers import {kind}

pipeline = {kind}.from_pretrained("path/to/this/folder")
```

## Switched off

| layer | number | neurons |
| --- | --- | --- |
{layers}
{citations}""".rstrip()
        + "\n"
    )
