"""From the records of a cell to the numbers of its table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from nemo_bench.benchmark.pending import SETS_FILE, unmitigated_images
from nemo_bench.benchmark.plan import SCORING_FILE, Cell, metrics_of
from nemo_bench.benchmark.stages.fit import COST
from nemo_bench.metrics import BenchMetric, detection
from nemo_bench.prompts import dead_references
from nemo_bench.records import schema
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import read_file
from nemo_bench.records.schema import ImageRecord, LocalizationRecord, MemorizationRecord, PromptRecord, ScoreRecord
from nemo_bench.records.statistics import GROUPS, aggregate, presets

REACHED = "target_reached"
"""In tables, the share of images whose method reached its target."""
_REACHED_INFO = schema.MetricInfo(
    measure="TargetReached",
    title="Target reached",
    description="share of images whose optimization or search reached the method's target",
    lower=0.0,
    upper=1.0,
    family="localization",
    per="image",
)


def summarize(cell: Cell) -> schema.Summary:
    """The table of a cell, its failures, counts and costs."""
    store = cell.store
    localized = list(store.records(LocalizationRecord).values())
    measured = list(store.records(MemorizationRecord).values())
    images = list(store.records(ImageRecord).values())
    scored = list(store.records(ScoreRecord).values())
    metrics = metrics_of(cell)
    sets = read_file(store.folder / SETS_FILE, schema.Sets)
    infos = {name: schema.MetricInfo(**metric.describe()) for name, metric in metrics.items()}
    by_other_papers = presets(scored, cell.prompts, infos)
    aggregates = aggregate(scored, cell.prompts, _unmitigated_scores(cell))
    if targets := _targets(images):
        infos[REACHED] = _REACHED_INFO
        for group, row in aggregate(targets, cell.prompts).items():
            aggregates.setdefault(group, {}).update(row)
    with_images = {record.prompt for record in images if record.image}
    for group, values in sets.items():
        count = sum(p.id in with_images for p in _members(cell, group))
        found = {
            name: schema.Aggregate(mean=value, prompts=count) for name, value in values.items() if value is not None
        }
        aggregates.setdefault(group, {}).update(found)
    failed = _failures(cell, metrics, sets, [*localized, *measured], images, scored)
    for group in failed:
        aggregates.setdefault(group, {})
    costs = [record.cost for record in (*localized, *measured, *images) if record.cost]
    peak = max(costs, key=lambda cost: cost.peak_memory_mb or 0, default=schema.Cost())
    return schema.Summary(
        unmitigated=cell.unmitigated.folder.name if cell.unmitigated else None,
        metrics=infos,
        aggregates=aggregates,
        presets=by_other_papers,
        failed=failed,
        detection=_detection(cell, measured),
        localization=_searches(cell, localized),
        counts=_counts(cell, failed.get("all", schema.Failures()), images, scored),
        cost={**_with_flops(cell, _costs([*localized, *measured], images)), **_of_fit(cell)},
        peak_memory_of="process" if (peak.device or "cpu") == "cpu" else "GPU",
    )


def _members(cell: Cell, group: str) -> list[Prompt]:
    return [prompt for prompt in cell.prompts if group in ("all", prompt.group)]


def _counts(
    cell: Cell, failed: schema.Failures, images: Sequence[ImageRecord], scored: Iterable[ScoreRecord]
) -> dict[str, int]:
    counts = {
        "images": sum(record.image is not None for record in images),
        "prompts": len(cell.prompts),
        "failed_images": failed.images,
        "failed_localizations": failed.localizations,
        "failed_scores": failed.scores,
        "truncated": sum(bool(record.truncated) for record in scored),
        "without_reference": sum(bool(p.kind) and not p.references for p in cell.prompts),
        "dead_references": len(dead_references(cell.prompts)),
        "damaged_references": len({file for p in cell.prompts for file in p.damaged_references}),
    }
    if cell.spec.task == "external":
        sizes = Counter(record.size for record in images if record.size)
        counts["without_images"] = len(cell.prompts) - len({record.prompt for record in images})
        counts["resized"] = sizes.total() - max(sizes.values(), default=0)
    return counts


def _costs(of_prompts: Sequence[PromptRecord], images: Sequence[ImageRecord]) -> dict[str, float]:
    """Mean seconds and passes, and peak memory, without records that failed: those may have been given up at once.

    The stages of a prompt are summed. Nothing is known of the cost of external images.
    """
    costs: dict[str, float] = {}
    measured: list[tuple[str, Sequence[PromptRecord], str]] = [
        ("localize_seconds_per_prompt", of_prompts, "seconds"),
        ("once_seconds_per_prompt", of_prompts, "once_seconds"),
        ("once_row_passes_per_prompt", of_prompts, "once_row_passes"),
        ("generate_seconds_per_image", images, "seconds"),
        ("row_passes_per_image", images, "row_passes"),
    ]
    for name, records, key in measured:
        sums: dict[str, float] = {}
        for record in records:
            value = getattr(record.cost, key) if record.cost and not record.failed else None
            if value is not None:
                owner = record.id if isinstance(record, ImageRecord) else record.prompt
                sums[owner] = sums.get(owner, 0) + value
        if sums:
            costs[name] = round(sum(sums.values()) / len(sums), 4)
    finished = [record.cost for record in (*of_prompts, *images) if record.cost and not record.failed]
    if peaks := [cost.peak_memory_mb for cost in finished if cost.peak_memory_mb]:
        costs["peak_memory_mb"] = max(peaks)
    return costs


def _with_flops(cell: Cell, costs: dict[str, float]) -> dict[str, float]:
    """Adds teraflops of an image, its share of what the method does once for a prompt too, where a pass's are known."""
    file = cell.store.folder / "network.json"
    if "row_passes_per_image" not in costs or not file.is_file():
        return costs
    once = costs.get("once_row_passes_per_prompt", 0) / cell.config.settings.seeds
    flops = (costs["row_passes_per_image"] + once) * read_file(file, schema.Network).flops_per_pass
    return {**costs, "teraflops_per_image": float(f"{flops / 1e12:.5g}")}


def _of_fit(cell: Cell) -> dict[str, float]:
    """What the fit of the method's weights took, once for all images."""
    if cell.fitted is None or not (cell.fitted.folder / COST).is_file():
        return {}
    cost = read_file(cell.fitted.folder / COST, schema.Cost)
    return {"fit_seconds": cost.seconds or 0.0, "fit_row_passes": cost.row_passes or 0.0}


def _targets(images: Iterable[ImageRecord]) -> list[ScoreRecord]:
    """Of images whose method had a target, whether it was reached, in the form of scores."""
    return [
        ScoreRecord(id=r.id, prompt=r.prompt, seed=r.seed, scores={REACHED: float(r.notes["reached"])})
        for r in images
        if r.image and r.notes and "reached" in r.notes
    ]


def _failures(
    cell: Cell,
    metrics: Mapping[str, BenchMetric],
    sets: Mapping[str, Mapping[str, float | None]],
    of_prompts: Iterable[PromptRecord],
    images: Iterable[ImageRecord],
    scored: Sequence[ScoreRecord],
) -> dict[str, schema.Failures]:
    """What was not finite, by group that has any."""
    unmitigated = unmitigated_images(cell)
    lost_images = Counter(record.prompt for record in images if record.failed)
    unpaired = Counter(r.prompt for r in images if r.image and unmitigated and r.id not in unmitigated)
    lost_prompts = {record.prompt for record in of_prompts if record.failed}
    lost_scores = Counter((record.prompt, name) for record in scored for name in record.failed or ())
    present = {(record.prompt, name) for record in scored for name in record.scores}
    table = {}
    for group in GROUPS:
        members = {prompt.id for prompt in _members(cell, group)}
        without_value = [name for name, value in sets.get(group, {}).items() if value is None]
        of_metrics = {}
        for name, metric in metrics.items():
            missing = sum(lost_scores[i, name] for i in members) + without_value.count(name)
            if "images" in metric.needs:
                missing += sum(lost_images[i] for i in members)
            if "unmitigated" in metric.needs:
                missing += sum(unpaired[i] for i in members)
            if metric.needs & {"localization", "memorization", "loss"}:
                missing += sum(i in lost_prompts and (i, name) not in present for i in members)
            if missing:
                of_metrics[name] = missing
        failures = schema.Failures(
            images=sum(lost_images[i] for i in members),
            localizations=sum(i in lost_prompts for i in members),
            scores=sum(count for (i, _), count in lost_scores.items() if i in members),
            metrics=of_metrics,
        )
        if failures.total or of_metrics:
            table[group] = failures
    return table


def _searches(cell: Cell, localized: Iterable[LocalizationRecord]) -> dict[str, dict[str, int | None]]:
    """By group that was searched, how many prompts passed the gate, and in how many the selection ran out, if known."""
    records = {record.prompt: record.localization for record in localized}
    table: dict[str, dict[str, int | None]] = {}
    for group in GROUPS:
        prompts = _members(cell, group)
        members = [found for prompt in prompts if (found := records.get(prompt.id))]
        passed = [found.passed_gate for found in members if found.passed_gate is not None]
        exhausted = [found.exhausted for found in members if found.exhausted is not None]
        if passed:
            ran_out = sum(exhausted) if exhausted else None
            table[group] = {"prompts": len(prompts), "passed_gate": sum(passed), "exhausted": ran_out}
    return table


def _unmitigated_scores(cell: Cell) -> Iterable[ScoreRecord]:
    """Scores to pair with those of a cell; none where other metrics or reference images made them."""
    other = cell.unmitigated
    if other is None or not other.is_done(ScoreRecord):
        return ()
    own, theirs = (read_file(store.folder / SCORING_FILE, schema.Scoring) for store in (cell.store, other))
    same = own.metrics == theirs.metrics and own.references == theirs.references
    return other.records(ScoreRecord).values() if same else ()


def _detection(cell: Cell, measured: Sequence[MemorizationRecord]) -> dict[str, schema.Roc]:
    """How well the memorization score tells memorized prompts from others: without mitigation, where both are there."""
    is_memorized = {p.id: bool(p.kind) for p in cell.originals}
    measured = [record for record in measured if record.prompt in is_memorized]
    scored = [(is_memorized[record.prompt], record.score) for record in measured if record.score is not None]
    memorized = [score for memorized, score in scored if memorized]
    other = [score for memorized, score in scored if not memorized]
    if cell.is_mitigated or not (memorized and other):
        return {}
    failed = len(measured) - len(scored)
    return {"memorization": schema.Roc(title="Memorization score", failed=failed, **detection(memorized, other))}
