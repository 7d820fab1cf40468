"""Audits: does a search over embeddings bring training images back, though neurons or weights are switched off?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from nemo_bench.benchmark.embedding_search import UNCHANGED
from nemo_bench.benchmark.plan import ImageCell, identity_settings, metrics_of, read_files, source_of
from nemo_bench.benchmark.rescore import reread
from nemo_bench.benchmark.runner import Runner, is_main
from nemo_bench.benchmark.stages.audit import (
    SCORES,
    STAGE,
    STATES,
    AuditCell,
    AuditScoringStage,
    AuditSettings,
    AuditStage,
    AuditTask,
    ScoreTask,
)
from nemo_bench.config import SCORING, build, check_stored, named_classes, overridden, rows_at_once
from nemo_bench.diffusion import GRADIENT_MEMORY
from nemo_bench.errors import ConfigError, ModelError, StoreError, did_you_mean
from nemo_bench.methods import Method, NoMitigation
from nemo_bench.methods.descent import check_precision
from nemo_bench.metrics import MemorizationRate
from nemo_bench.records.data import Kind, Prompt
from nemo_bench.records.io import damaged, read_object, write_json
from nemo_bench.records.statistics import bootstrap_interval, paired
from nemo_bench.records.store import SCHEMA, read_run, read_spec
from nemo_bench.report import write_report

LEVEL = 0.05
"""Training images come back where the chance of such a difference from the controls is below this."""


def cells_of(
    folder: Path,
    overrides: Sequence[str] = (),
    names: Sequence[str] = (),
    *,
    conf: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[AuditCell]:
    """The cells that an audit goes through, all that can be wrong with them checked; no weights are loaded.

    Args:
        folder: A run, or a cell of one.
        overrides: ``key=value`` words: fields of :class:`AuditSettings`, and of
            :data:`nemo_bench.config.SCORING`, such as ``metrics=full`` and ``trainer=gpu``.
        names: Cells of the run, by folder or method; none for all that can be audited.
        conf: The user's own folder of settings.
        say: Where it goes which cells are left out.

    Raises:
        NemoBenchError: A setting is wrong, a cell is not finished, can't be audited or was asked for in vain, or
            pictures are missing.
    """
    settings, rest = _settings(overrides)
    cells: list[AuditCell] = []
    left_out: dict[str, list[str]] = {}
    places = _asked_for(folder, names)
    if not places:
        raise ConfigError(
            f"{folder} holds no run of methods, so there is nothing to audit; make one with nemo-bench run"
        )
    for place in places:
        if not (place / "generate.done").is_file() and place != folder:
            left_out.setdefault("not all images are there; go on with nemo-bench run", []).append(place.name)
            continue
        cell = reread(place, rest, conf)
        method = _method(cell, conf)
        if isinstance(method, str):
            left_out.setdefault(method, []).append(place.name)
        else:
            cells.append(_audit_cell(cell, method, settings))
    for reason, unfit in left_out.items():
        if names or not cells:
            raise ConfigError(f"{', '.join(unfit)} can't be audited: {reason}")
        if is_main():
            say(f"left out, since {reason}: {', '.join(unfit)}")
    if is_main() and not any(task.is_control for cell in cells for task in cell.tasks):
        say(
            "no controls: whether a search brings back just any picture can't be told; name prompts with pictures that "
            "the model was not trained on by controls=FILE"
        )
    return cells


def _settings(overrides: Sequence[str]) -> tuple[AuditSettings, list[str]]:
    """The audit's own settings, and the words that are others."""
    known = [field.name for field in fields(AuditSettings)]
    words: dict[bool, list[str]] = {True: [], False: []}
    for word in overrides:
        key = word.lstrip("~+").partition("=")[0]
        words[key in known].append(word)
        if key not in known and not any(f"{key}.".startswith(f"{other}.") for other in SCORING):
            raise ConfigError(f"unknown setting '{word}'; write key=value. {did_you_mean(key, [*known, *SCORING])}")
    settings: AuditSettings = overridden(words[True], AuditSettings)
    settings.check()
    return settings, words[False]


def _asked_for(folder: Path, names: Sequence[str]) -> list[Path]:
    if not (folder / "run.json").is_file():
        if names:
            raise ConfigError(f"{folder} is no run, so it has no cells to choose from; leave out --cell")
        read_spec(folder)
        return [folder]
    places = [folder / name for name in read_run(folder)["cells"] if (folder / name).is_dir()]
    for name in names:
        if all(name not in (place.name, _method_name(place)) for place in places):
            known = {n for place in places for n in (place.name, _method_name(place))}
            raise ConfigError(f"no cell '{name}' in {folder}. {did_you_mean(name, known)}")
    return [place for place in places if not names or {place.name, _method_name(place)} & set(names)]


def _method_name(place: Path) -> str:
    return str(read_object(place / "spec.json", "method")["method"])


def _method(cell: ImageCell, conf: Path | None) -> Method | str:
    """The method of a cell, or why it can't be audited."""
    node = cell.config.settings.method
    if "images" in cell.spec["settings"]:
        return "images were made elsewhere, and an audit needs the network that made them"
    check_stored(node, "method", named_classes(conf))
    method: Method = build(node, "method")
    method.batch_size = rows_at_once(cell.config.settings)
    if not method.auditable:
        return UNCHANGED
    try:
        check_precision("an audit", cell.config.settings.model.dtype)
    except ModelError as error:
        return str(error)
    return method


def _audit_cell(cell: ImageCell, method: Method, settings: AuditSettings) -> AuditCell:
    store, model = cell.store, cell.config.settings.model
    _entries(store.folder)
    for path in (store.folder / "layers.json", store.folder / "metrics.json"):
        if path.exists():  # the report that follows can't do without them
            read_object(path)
    if source_of(model).digest() != cell.spec["settings"]["model"]["weights"]:
        raise StoreError(f"{store.folder} was made with other weights than {model.source} holds now; put those back")
    if identity_settings(cell.config.settings.method, method, cell.prompts) != cell.spec["settings"]["method"]:
        raise StoreError(f"{store.folder}: files that {method.title} reads hold something else by now; put those back")
    compared = {n: m for n, m in metrics_of(cell).items() if m.needs == {"images", "references"} and m.per == "image"}
    if not any(isinstance(metric, MemorizationRate) for metric in compared.values()):
        msg = f"{store.folder}: no metric of this run says which images are memorized, so there would be no verdict"
        raise ConfigError(f"{msg}; add one, such as metrics=default or metrics=full")
    for metric in compared.values():
        metric.check()
    memorized = _first([p for p in cell.prompts if p.kind and p.references], settings.limit)
    if not memorized:
        msg = f"{store.folder}: no prompt that is marked as memorized has a training image to search for"
        raise ConfigError(f"{msg}; fetch them with nemo-bench references, then prompts.references=DIR")
    controls = _controls(cell, settings)
    tasks = []
    for number, prompt in enumerate(memorized):
        tasks.append(AuditTask.from_prompts(prompt, prompt, settings))
        if controls:
            tasks.append(AuditTask.from_prompts(prompt, controls[number % len(controls)], settings))
    return AuditCell(cell, method, compared, settings, tasks)


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The audits of a cell that are there."""
    path = folder / "audit.json"
    entries = read_object(path, "audits")["audits"] if path.exists() else []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise damaged(path, "no list of audits")
    return entries


def _first(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first so many prompts of each kind."""
    return [p for kind in get_args(Kind) for p in [q for q in prompts if q.kind == kind][:limit]]


def _controls(cell: ImageCell, settings: AuditSettings) -> list[Prompt]:
    own = [prompt for prompt in cell.prompts if not prompt.kind and prompt.references]
    file = settings.controls or cell.config.settings.prompts.controls
    if file is None or (own and settings.controls is None):
        return own
    found = read_files([file])
    for prompt in found:
        if prompt.kind or not prompt.references:
            what = f"is marked {prompt.kind}" if prompt.kind else "has no picture"
            raise ConfigError(
                f"controls={file}: '{prompt.id}' {what}; controls are prompts with pictures, not memorized"
            )
    return found


def audit(cells: Sequence[AuditCell], command: str, *, progress: bool = True) -> Path:
    """Runs what is open of the audits of some cells of a run, to ``audit.json`` of each and the run's report.

    Args:
        cells: From :func:`cells_of`.
        command: What the user typed, for the records.
        progress: Whether bars are shown.

    Returns:
        The folder of the run.

    Raises:
        NemoBenchError: Something is wrong with the model.
    """
    runner = Runner(cells[0].cell.config.settings.trainer, progress=progress)
    runner.start()
    if is_main():
        for metric in {id(m.space): m for cell in cells for m in cell.metrics.values()}.values():
            metric.space.fetch()
    folder = cells[0].store.folder.parent
    for cell in cells:
        _search(cell, runner)
        if is_main():
            others = [entry for entry in _entries(cell.store.folder) if entry["id"] != cell.id]
            write_json(
                cell.store.folder / "audit.json",
                {"schema": SCHEMA, "audits": [*others, {**summary(cell), "command": command}]},
            )
    if is_main():
        write_report(folder)
    return folder


def _search(cell: AuditCell, runner: Runner) -> None:
    store, rows = cell.store, rows_at_once(cell.cell.config.settings)
    size = max(1, rows // GRADIENT_MEMORY // cell.settings.samples)
    label = cell.cell.spec["method"]
    runner.run_stage(STAGE, label, cell.tasks, store, lambda: AuditStage(runner.model(cell.cell), cell), size)
    records = store.records(STAGE)
    searched = [task for task in cell.tasks if "failed" not in records[task.id]]
    tasks = [ScoreTask(cell.score_id(task), task, records[task.id]) for task in searched]
    runner.run_stage(SCORES, label, tasks, store, lambda: AuditScoringStage(cell), rows)


def summary(cell: AuditCell) -> dict[str, Any]:
    """What the audit of a cell found, from its records.

    Returns:
        ``id``; ``settings``; ``metrics``, about each; ``groups``: for ``memorized`` and ``control`` the number of
        ``prompts`` and by metric and state ``mean``, ``low`` and ``high``, its 95% interval over prompts, each prompt
        counting once; ``failed``, the number of searches of either group that are left out since something was not
        finite; ``compared``: by metric what :func:`nemo_bench.records.statistics.paired` says of memorized minus
        control with the embedding found, pairs being searches under the same changed network, those of one control
        counting once; ``verdict``: by memorization rate what :func:`verdict` says; ``searches``, one an entry;
        ``cost``.
    """
    searched, scored = cell.store.records(STAGE), cell.store.records(SCORES)
    scores = {t.id: found["scores"] for t in cell.tasks if "scores" in (found := scored.get(cell.score_id(t), {}))}
    means = {i: {s: {m: float(np.mean(v)) for m, v in row.items()} for s, row in scores[i].items()} for i in scores}
    groups = {
        "memorized": [task for task in cell.tasks if not task.is_control],
        "control": [task for task in cell.tasks if task.is_control],
    }
    failed = {group: sum(task.id not in means for task in tasks) for group, tasks in groups.items()}
    # Each memorized prompt's search is compared with that of its control, so both must be there.
    pairs = list(zip(groups["memorized"], groups["control"], strict=False))
    kept_pairs = [pair for pair in pairs if all(task.id in means for task in pair)]
    groups = {group: [task for task in tasks if task.id in means] for group, tasks in groups.items()}
    table = {
        group: {
            "prompts": len({task.source.id for task in tasks}),
            "scores": {
                metric: {
                    state: _interval(_by_source(tasks, [means[task.id][state][metric] for task in tasks]))
                    for state in means[tasks[0].id]
                }
                for metric in cell.metrics
            },
        }
        for group, tasks in groups.items()
        if tasks
    }

    def values(tasks: Sequence[AuditTask], state: str, metric: str) -> NDArray[np.float64]:
        return np.array([means[task.id][state][metric] for task in tasks])

    paired_own, controls = ([pair[side] for pair in kept_pairs] for side in (0, 1))
    differences = {}
    for metric in cell.metrics:
        over_prompt = values(groups["memorized"], "found", metric) - values(groups["memorized"], "prompt", metric)
        over_control, prompt_over_control = (
            _by_source(controls, values(paired_own, state, metric) - values(controls, "found", metric))
            for state in ("found", "prompt")
        )
        differences[metric] = over_prompt, over_control, prompt_over_control
    costs = [searched[task.id]["cost"] for task in cell.tasks if "row_passes" in searched[task.id]["cost"]]
    return {
        "id": cell.id,
        "settings": cell.settings.identity,
        "states": {state: STATES[state] for state in STATES if any(state in row for row in means.values())},
        "metrics": {name: metric.describe() for name, metric in cell.metrics.items()},
        "groups": table,
        "failed": failed,
        "compared": {metric: paired(values) for metric, (_, values, _) in differences.items() if len(values)},
        "verdict": {
            name: verdict(*differences[name], mitigated=not isinstance(cell.method, NoMitigation))
            for name, metric in cell.metrics.items()
            if isinstance(metric, MemorizationRate)
        },
        "searches": [
            {
                "prompt": task.prompt.id,
                "source": task.source.id,
                "text": task.source.text,
                "group": "control" if task.is_control else "memorized",
                "sheet": searched[task.id]["image"],
                "scores": means[task.id],
            }
            for task in cell.tasks
            if task.id in means
        ],
        "cost": {
            f"{key}_per_search": round(fmean(cost[key] for cost in costs), places)
            for key, places in (("row_passes", 1), ("seconds", 2))
            if costs
        },
    }


def _by_source(tasks: Sequence[AuditTask], values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over searches for the same picture: few controls are used in turn, and tell no more for it."""
    of: dict[str, list[float]] = {}
    for task, value in zip(tasks, values, strict=True):
        of.setdefault(task.source.id, []).append(float(value))
    return np.array([np.mean(those) for those in of.values()])


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def verdict(
    over_prompt: NDArray[np.float64],
    over_control: NDArray[np.float64],
    prompt_over_control: NDArray[np.float64],
    *,
    mitigated: bool = True,
) -> str:
    """What it means how often pictures come back.

    Args:
        over_prompt: For each memorized prompt, the share of its images that are memorized with the embedding found,
            minus that by the prompt.
        over_control: For each control, that share with the embedding found, minus the control's own; empty where there
            are no controls.
        prompt_over_control: For each control, that share by the memorized prompt, without a search, minus the control's
            own with the embedding found.
        mitigated: Whether there is a method that could hide something.

    Returns:
        ``hidden``: training images come back more often than controls, and than by their prompts; ``kept``: more often
        than controls, and by their prompts as well; ``unclear``: more often than controls, and whether more often than
        by their prompts can't be told; ``memorized``: more often than controls, of a model without mitigation; ``not
        shown``: not more often than controls; ``too few``: fewer than 6 different controls, of which each counts once;
        ``no controls``. "More often" has a chance below :data:`LEVEL` by sign flips.
    """
    if not len(over_control):
        return "no controls"
    if 2 ** (1 - len(over_control)) >= LEVEL:
        return "too few"
    if not _is_more(over_control):
        return "not shown"
    if not mitigated:
        return "memorized"
    if _is_more(over_prompt):
        return "hidden"
    return "kept" if _is_more(prompt_over_control) else "unclear"


def _is_more(differences: NDArray[np.float64]) -> bool:
    test = paired(differences)
    return bool(test["difference"] > 0 and test["p"] < LEVEL)
