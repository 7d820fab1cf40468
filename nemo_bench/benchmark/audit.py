"""Audits: does a search over embeddings bring training images back, though neurons or weights are switched off?"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from nemo_bench.benchmark.pending import write_pages
from nemo_bench.benchmark.plan import Cell, identity_settings, metrics_of, read_listed, source_of
from nemo_bench.benchmark.processes import is_main
from nemo_bench.benchmark.rescore import reread
from nemo_bench.benchmark.run import log_file
from nemo_bench.benchmark.runner import Runner
from nemo_bench.benchmark.stages.audit import AuditSettings, Search, SearchSettings, score_sheets, search
from nemo_bench.benchmark.stages.base import Chunk
from nemo_bench.benchmark.stages.inversion import InversionSettings, invert
from nemo_bench.config import SCORING, PromptSettings, build, overridden
from nemo_bench.config.groups import named_classes
from nemo_bench.config.schema import rows_at_once
from nemo_bench.config.targets import check_stored
from nemo_bench.diffusion import GRADIENT_MEMORY, UNETS
from nemo_bench.errors import ConfigError, ModelError, StoreError, did_you_mean
from nemo_bench.methods import NoMitigation
from nemo_bench.methods.descent import check_precision
from nemo_bench.methods.embedding_search import UNCHANGED
from nemo_bench.metrics import BenchMetric, MemorizationRate
from nemo_bench.metrics.roc import detection
from nemo_bench.records import schema
from nemo_bench.records.data import GENERAL, Kind, Prompt
from nemo_bench.records.io import digest, read_file, write_json
from nemo_bench.records.schema import Audit, Inversion, Inverted, Layers, SearchRecord, SearchScoreRecord, Spec, Summary
from nemo_bench.records.statistics import bootstrap_interval, paired
from nemo_bench.records.store import read_run, read_spec

AUDITS: dict[str, type[SearchSettings]] = {kind.audit: kind for kind in (AuditSettings, InversionSettings)}
"""Settings of each kind of audit, the default first."""
LEVEL = 0.05
"""Training images come back where the chance of such a difference from the controls is below this."""


log = logging.getLogger(__name__)


def cells_of(
    folder: Path,
    overrides: Sequence[str] = (),
    names: Sequence[str] = (),
    *,
    conf: Path | None = None,
) -> list[Cell]:
    """The cells of a run, or one cell, that are audited; no weights are loaded.

    Overrides are ``audit``, one of :data:`AUDITS`, the fields of its settings, and those of
    :data:`nemo_bench.config.SCORING`, such as ``metrics=full``.
    Names choose cells by folder or method; without any, all that can be audited are taken, and it is said which are
    left out.

    Raises:
        NemoBenchError: A setting is wrong, a cell is not finished, can't be audited or was asked for in vain, or
            pictures are missing.
    """
    settings, rest = settings_of(overrides)
    cells: list[Cell] = []
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
        if reason := _unfit(cell, settings, conf):
            left_out.setdefault(reason, []).append(place.name)
        else:
            _plan_searches(cell, settings)
            cells.append(cell)
    for reason, unfit in left_out.items():
        if names or not cells:
            raise ConfigError(f"{', '.join(unfit)} can't be audited: {reason}")
        if is_main():
            log.warning("left out, since %s: %s", reason, ", ".join(unfit))
    if is_main() and not any(task.is_control for cell in cells for task in cell.searches):
        log.warning(
            "no controls: whether a search brings back just any picture is not known; name prompts with pictures that "
            "the model was not trained on by controls=FILE"
        )
    return cells


def settings_of(overrides: Sequence[str]) -> tuple[SearchSettings, list[str]]:
    """The audit's own settings, and the words that are others."""
    name = next((word.partition("=")[2] for word in overrides if word.startswith("audit=")), AuditSettings.audit)
    if name not in AUDITS:
        raise ConfigError(f"unknown audit '{name}'. {did_you_mean(name, AUDITS)}")
    kind = AUDITS[name]
    known = [field.name for field in fields(kind)]
    words: dict[bool, list[str]] = {True: [], False: []}
    for word in overrides:
        if word.startswith("audit="):
            continue
        key = word.lstrip("~+").partition("=")[0]
        words[key in known].append(word)
        if key not in known and not any(f"{key}.".startswith(f"{other}.") for other in SCORING):
            hint = did_you_mean(key, ["audit", *known, *SCORING])
            raise ConfigError(f"unknown setting '{word}'; write key=value. {hint}")
    return overridden(words[True], kind), words[False]


def _asked_for(folder: Path, names: Sequence[str]) -> list[Path]:
    if not (folder / "run.json").is_file():
        if names:
            raise ConfigError(f"{folder} is no run, so it has no cells to choose from; leave out --cell")
        read_spec(folder)
        return [folder]
    places = [folder / name for name in read_run(folder).cells if (folder / name).is_dir()]
    methods = {place: str(read_file(place / "spec.json", Spec).method) for place in places}
    for name in names:
        if all(name not in (place.name, method) for place, method in methods.items()):
            known = {*methods.values(), *(place.name for place in places)}
            raise ConfigError(f"no cell '{name}' in {folder}. {did_you_mean(name, known)}")
    return [place for place in places if not names or {place.name, methods[place]} & set(names)]


def _unfit(cell: Cell, settings: SearchSettings, conf: Path | None) -> str:
    """Why a cell can't be audited; empty where it can. The cell gets its method."""
    node = cell.config.settings.method
    if cell.spec.task == "external":
        return "these are external images, and an audit needs the network that made them"
    check_stored(node, "method", named_classes(conf))
    cell.method = build(node, "method")
    if not cell.method.auditable:
        return UNCHANGED
    family = source_of(cell.config.settings.model).family.pipeline_class
    if isinstance(settings, AuditSettings) and settings.starts:
        if cell.config.settings.model.compiled or family not in UNETS:
            return "starts looks into a UNet that is not compiled; leave it out"
        if settings.starts == 1:
            return "starts=1 leaves no pairs to compare; give 0 or 2 at least"
    if settings.families is not None and family not in settings.families:
        return f"audit={settings.audit} is made for {', '.join(sorted(settings.families))}, given a {family}"
    try:
        check_precision("an audit", cell.config.settings.model.dtype)
    except ModelError as error:
        return str(error)
    return ""


def _plan_searches(cell: Cell, settings: SearchSettings) -> None:
    """Gives a cell its searches."""
    store, model = cell.store, cell.config.settings.model
    assert cell.method is not None
    for name, kind in (("audit.json", list[Audit]), ("layers.json", Layers), ("metrics.json", Summary)):
        if (store.folder / name).exists():  # the report that follows can't do without them
            read_file(store.folder / name, kind)
    if source_of(model).digest() != cell.spec.settings["model"]["weights"]:
        raise StoreError(f"{store.folder} was made with other weights than {model.source} holds now; put those back")
    if identity_settings(cell.config.settings.method, cell.method, cell.prompts) != cell.spec.settings["method"]:
        title = cell.method.title
        raise StoreError(f"{store.folder}: files that {title} reads hold something else by now; put those back")
    compared = compared_metrics(cell)
    if not _rates(cell):
        msg = f"{store.folder}: no metric of this run says which images are memorized, so there would be no verdict"
        raise ConfigError(f"{msg}; add one, such as metrics=default or metrics=full")
    for metric in compared.values():
        metric.check()
    by_kind = [[p for p in cell.prompts if p.kind == kind and p.references] for kind in get_args(Kind)]
    memorized = [prompt for prompts in by_kind for prompt in prompts[: settings.limit]]
    if not memorized:
        msg = f"{store.folder}: no prompt that is marked as memorized has a training image to search for"
        raise ConfigError(f"{msg}; fetch them with nemo-bench references, then prompts.references=DIR")
    controls = _controls(cell, settings)
    judge = [_identity(cell, next(iter(_rates(cell))))] if isinstance(settings, InversionSettings) else []
    searches = []
    for number, prompt in enumerate(memorized):
        searches.append(Search.from_prompts(prompt, prompt, settings, *judge))
        if controls:
            searches.append(Search.from_prompts(prompt, controls[number % len(controls)], settings, *judge))
    cell.audit = settings
    cell.searches = searches


def compared_metrics(cell: Cell) -> dict[str, BenchMetric]:
    """Metrics of a cell that compare images with training images, by name."""
    metrics = metrics_of(cell).items()
    return {name: m for name, m in metrics if m.needs == {"images", "references"} and m.per == "image"}


def _rates(cell: Cell) -> dict[str, MemorizationRate]:
    """Those of them that say which images are memorized; by the first one an inversion is successful."""
    return {name: metric for name, metric in compared_metrics(cell).items() if isinstance(metric, MemorizationRate)}


def _identity(cell: Cell, name: str) -> dict[str, Any]:
    """What the values of a metric of a cell depend on."""
    return {**cell.config.settings.metrics[name], **compared_metrics(cell)[name].fingerprint()}


def _score_id(cell: Cell, search: str) -> str:
    """Record id of the scores of a search."""
    return digest([search, {name: _identity(cell, name) for name in compared_metrics(cell)}])


def _controls(cell: Cell, settings: SearchSettings) -> list[Prompt]:
    own = [prompt for prompt in cell.prompts if prompt.group == GENERAL and prompt.references]
    file = settings.controls or cell.config.settings.prompts.controls
    if file is None or (own and settings.controls is None):
        return own
    found = read_listed(PromptSettings([file]))
    for prompt in found:
        if prompt.kind or not prompt.references:
            what = f"is marked {prompt.kind}" if prompt.kind else "has no picture"
            raise ConfigError(
                f"controls={file}: '{prompt.id}' {what}; controls are prompts with pictures, not memorized"
            )
    return found


def audit(cells: Sequence[Cell], command: str, *, progress: bool = True) -> Path:
    """Runs what is pending of the audits of cells, to ``audit.json`` of each and the report in the folder of the run.

    ``command`` is what the user typed, for the records.

    Raises:
        NemoBenchError: Something is wrong with the model.
    """
    runner = Runner(cells[0].config.settings.trainer, progress=progress)
    runner.start()
    folder = cells[0].store.folder.parent
    with log_file(folder):
        if is_main():
            for cell in cells:
                for metric in compared_metrics(cell).values():
                    metric.space.fetch()
        for cell in cells:
            with runner.holding(cell.store.folder):
                runner.fit(cell)
                _search(cell, runner)
                if is_main():
                    path = cell.store.folder / "audit.json"
                    found = summarize(cell, command)
                    before = read_file(path, list[Audit]) if path.exists() else []
                    write_json(path, [*(entry for entry in before if entry.id != found.id), found])
        if is_main():
            with runner.leases.owning(folder):
                write_pages(folder)
    return folder


def _search(cell: Cell, runner: Runner) -> None:
    settings = cell.audit
    assert settings is not None
    rows = rows_at_once(cell.config.settings)
    handle: Callable[..., Sequence[SearchRecord]]
    if isinstance(settings, InversionSettings):
        rate = next(iter(_rates(cell).values()))
        size, handle = 1, partial(invert, settings=settings, rate=rate)
    else:
        assert isinstance(settings, AuditSettings)
        size = max(1, rows // GRADIENT_MEMORY // settings.samples)
        handle = partial(search, settings=settings, prompts=cell.prompts)
    runner.run_stage(SearchRecord, handle, cell, cell.searches, size)
    records = cell.store.records(SearchRecord)
    searched = [records[task.id] for task in cell.searches if not records[task.id].failed]
    sheets = [Chunk(_score_id(cell, record.id), (record,)) for record in searched]
    compare = partial(score_sheets, metrics=compared_metrics(cell), images=settings.images)
    runner.run_stage(SearchScoreRecord, compare, cell, sheets, rows, needs_model=False)


def summarize(cell: Cell, command: str = "") -> Audit:
    """The result of the audit of a cell, from its records.

    A search under the network of a memorized prompt is paired with that of its control; searches for the same picture
    count once.
    """
    settings = cell.audit
    assert settings is not None
    searched = cell.store.records(SearchRecord)
    scored = cell.store.records(SearchScoreRecord)
    metrics = compared_metrics(cell)
    means: dict[str, dict[str, dict[str, float]]] = {}
    for task in cell.searches:
        record = scored.get(_score_id(cell, task.id))
        if record is not None and record.scores is not None:
            rows = record.scores.items()
            means[task.id] = {state: {m: float(np.mean(v)) for m, v in row.items()} for state, row in rows}
    memorized = [task for task in cell.searches if not task.is_control]
    controls = [task for task in cell.searches if task.is_control]
    # Each memorized prompt's search is compared with that of its control, so both must be there.
    pairs = [pair for pair in zip(memorized, controls, strict=False) if all(task.id in means for task in pair)]
    groups = {"memorized": memorized, "control": controls}
    scored_of = {group: [task for task in tasks if task.id in means] for group, tasks in groups.items()}

    def values(tasks: Iterable[Search], state: str, metric: str) -> NDArray[np.float64]:
        return np.array([means[task.id][state][metric] for task in tasks])

    paired_memorized = [pair[0] for pair in pairs]
    paired_controls = [pair[1] for pair in pairs]
    compared = {}
    verdicts = {}
    for name, metric in metrics.items():
        over_prompt = values(scored_of["memorized"], "found", name) - values(scored_of["memorized"], "prompt", name)
        of_controls = values(paired_controls, "found", name)
        over_control = _by_source(paired_controls, values(paired_memorized, "found", name) - of_controls)
        prompt_over_control = _by_source(paired_controls, values(paired_memorized, "prompt", name) - of_controls)
        if len(over_control):
            compared[name] = paired(over_control)
        if isinstance(metric, MemorizationRate):
            mitigated = not isinstance(cell.method, NoMitigation)
            verdicts[name] = verdict(over_prompt, over_control, prompt_over_control, mitigated=mitigated)
    ended = {group: [searched[task.id].inversion for task in tasks] for group, tasks in scored_of.items()}
    inverted, auc = inverted_groups({group: [found for found in those if found] for group, those in ended.items()})
    costs = [cost for task in cell.searches if (cost := searched[task.id].cost) and cost.row_passes is not None]
    return Audit(
        id=digest([task.id for task in cell.searches], 8),  # others for other settings, prompts or controls
        settings=settings.identity,
        states={state: text for state, text in settings.states.items() if any(state in row for row in means.values())},
        metrics={name: schema.MetricInfo(**metric.describe()) for name, metric in metrics.items()},
        groups={group: len({task.source.id for task in tasks}) for group, tasks in scored_of.items() if tasks},
        scores={
            group: {
                metric: {
                    state: _interval(_by_source(tasks, values(tasks, state, metric))) for state in means[tasks[0].id]
                }
                for metric in metrics
            }
            for group, tasks in scored_of.items()
            if tasks
        },
        failed={group: len(tasks) - len(scored_of[group]) for group, tasks in groups.items()},
        compared=compared,
        verdict=verdicts,
        searches=[
            schema.SearchResult(
                prompt=task.prompt.id,
                source=task.source.id,
                text=task.source.text,
                group="control" if task.is_control else "memorized",
                sheet=str(searched[task.id].image),
                scores=means[task.id],
                inversion=searched[task.id].inversion,
                diagnosis=searched[task.id].diagnosis,
            )
            for task in cell.searches
            if task.id in means
        ],
        cost={
            f"{key}_per_search": round(fmean(getattr(cost, key) for cost in costs), places)
            for key, places in (("row_passes", 1), ("seconds", 2))
            if costs
        },
        inverted=inverted,
        inverted_auc=auc,
        command=command,
    )


def inverted_groups(groups: Mapping[str, Sequence[Inversion]]) -> tuple[dict[str, Inverted], float | None]:
    """Inversions by group, and how well their divergence tells memorized pictures from controls."""
    values = {
        group: [found.divergence if found.reached else math.inf for found in those]
        for group, those in groups.items()
        if those
    }
    medians = {group: float(np.median(found)) for group, found in values.items()}
    inverted = {
        group: Inverted(
            pictures=len(found),
            reached=sum(map(math.isfinite, found)),
            median=medians[group] if math.isfinite(medians[group]) else None,
        )
        for group, found in values.items()
    }
    if len(values) < 2:
        return inverted, None
    # Ranks count alone, and the infinite ones come last.
    last = max((value for found in values.values() for value in found if math.isfinite(value)), default=0.0) + 1
    memorized, controls = ([-min(value, last) for value in values[group]] for group in ("memorized", "control"))
    return inverted, detection(memorized, controls)["auc"]


def _by_source(tasks: Sequence[Search], values: NDArray[np.float64]) -> NDArray[np.float64]:
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
    """What it means how often pictures come back, by differences of a memorization rate.

    Args:
        over_prompt: For each memorized prompt, its images with the embedding that the search ended with, minus those by
            the prompt.
        over_control: For each control, images of memorized prompts with the embedding of their search, minus the
            control's own; empty where there are no controls.
        prompt_over_control: For each control, images by the memorized prompts, without a search, minus the control's
            own with the embedding of its search.
        mitigated: Whether there is a method that could hide something.

    Returns:
        ``hidden``: training images come back more often than controls, and than by their prompts; ``kept``: more often
        than controls, and by their prompts as well; ``unclear``: more often than controls, and whether more often than
        by their prompts is not known; ``memorized``: more often than controls, of a model without mitigation; ``not
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
    return test.difference > 0 and test.p < LEVEL
