"""Builds a small, believable results folder: 3 methods x 6 prompts x 3 seeds, with real pictures and made-up scores."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nemo_bench.records.data import Kind, Localization, Neurons, Prompt
from nemo_bench.records.io import read_file, write_json
from nemo_bench.records.schema import (
    Aggregate,
    CalibrationRecord,
    Cost,
    Entry,
    ImageRecord,
    LocalizationRecord,
    MemorizationRecord,
    MetricInfo,
    Paired,
    Preset,
    Record,
    Roc,
    Run,
    ScoreRecord,
    Spec,
    Start,
    Statistic,
    Summary,
    Threshold,
)
from nemo_bench.records.store import Store, write_prompts

E = TypeVar("E", bound=Entry)
Pixels = NDArray[np.float64]

PROMPTS: tuple[tuple[str, str, Kind | None], ...] = (
    ("vm-01", "the golden harbor podcast with nine rings and a crescent", "VM"),
    ("vm-02", "official poster of the midnight lighthouse festival", "VM"),
    ("tm-01", "vintage phone case with a striped cover, studio photo", "TM"),
    ("tm-02", "gentle mug, custom checkered print", "TM"),
    ("general-01", "two small red circles and a large blue star on a wavy teal ground", None),
    ("general-02", "a quiet mountain at dawn", None),
)
METHODS = {"none": "No mitigation", "random": "Random neurons", "nemo": "NeMo"}
MORE_METHODS = {**METHODS, "tokens": "Random tokens", "attention": "Attention rescaling"}
DETECTOR = "noise_similarity"
SEEDS = 3
SIDE = 64
LAYERS = {
    f"{block}.transformer_blocks.0.attn2.to_v": width
    for block, width in (
        ("down_blocks.0.attentions.0", 48),
        ("down_blocks.0.attentions.1", 48),
        ("down_blocks.1.attentions.0", 96),
        ("down_blocks.1.attentions.1", 96),
        ("mid_block.attentions.0", 96),
        ("up_blocks.0.attentions.0", 96),
    )
}
METRICS = {
    "ssim": MetricInfo(
        title="SSIM to training image", higher_is_better=False, lower=-1.0, upper=1.0, citation="Wang et al. 2004",
        description="Structural similarity to the prompt's training image.", family="memorization",
        role="training_similarity",
    ),
    "ssim_nearest": MetricInfo(
        title="SSIM to nearest", higher_is_better=False, lower=-1.0, upper=1.0, citation="Wang et al. 2004",
        description="Best similarity to any known training image.", family="memorization",
        role="nearest_training_similarity",
    ),
    "alignment": MetricInfo(
        title="CLIP alignment", higher_is_better=True, lower=-1.0, upper=1.0, citation="Radford et al. 2021",
        description="Cosine similarity of image and prompt in CLIP.", family="alignment",
    ),
    "diversity": MetricInfo(
        title="Diversity", higher_is_better=True, lower=0.0, upper=1.0,
        description="Mean pairwise dissimilarity of the images of a prompt.", family="diversity", per="prompt",
    ),
    "fid": MetricInfo(
        title="FID", higher_is_better=False, lower=0.0, citation="Heusel et al. 2017",
        description="Distance of Inception features to those of a folder.", family="quality", per="set",
    ),
    "memorization": MetricInfo(
        title="Memorization", higher_is_better=False, lower=-1.0, upper=1.0, citation="Hintersdorf et al. 2024",
        description="Mean pairwise SSIM of the noise differences of a prompt.", family="localization", per="prompt",
        role="memorization_score",
    ),
    "neurons": MetricInfo(
        title="Neurons", lower=0.0, description="Number of neurons blocked.", family="localization", per="prompt",
        role="neuron_count",
    ),
}  # fmt: skip
CITATION = "@inproceedings{hintersdorf2024nemo,\n  title = {Finding NeMo},\n  year = {2024}\n}"


def write_fake_results(
    folder: Path,
    models: Sequence[str] = ("planted",),
    prompts: Sequence[tuple[str, str, Kind | None]] = PROMPTS,
    methods: Mapping[str, str] = METHODS,
    pictures: Sequence[Path] = (),
) -> Path:
    """Writes a run of some methods on some models.

    Args:
        folder: Where the run goes, such as ``results/default``.
        models: Names of the models.
        prompts: Id, text and kind of each prompt.
        methods: Name and title of each method; ``none`` first, if at all.
        pictures: Files that images link to, in turn; none for drawn images.

    Returns:
        The folder.
    """
    pool = cycle(pictures)
    cells = [
        _write_cell(folder, model, named, prompts, len(methods) * i + j, pool)
        for i, model in enumerate(models)
        for j, named in enumerate(methods.items())
    ]
    write_json(folder / "run.json", Run(name=folder.name, token=folder.name, cells=cells))
    return folder


def write_fake_calibration(run: Path, model: str = "planted", pairs: int = 200, protocol: str = "paper") -> Path:
    """Gives a run's cells of a model, but the one without mitigation, a calibration beside the run.

    Args:
        run: A run of :func:`write_fake_results`.
        model: Name of the model.
        pairs: Number of general prompts, two pairwise scores each.
        protocol: How noise differences were taken.

    Returns:
        The folder of the calibration.
    """
    store = Store(run.parent / "calibration" / f"{model}__{pairs:08x}")
    store.open(Spec(task="calibrate", settings={}), is_named=True)
    scores = np.random.default_rng(pairs).normal(0.2, 0.1, (pairs, 2)).round(4)
    store.writer(CalibrationRecord)(
        CalibrationRecord(id=f"{i:016x}", prompt=str(i), pairs=row.tolist()) for i, row in enumerate(scores)
    )
    tau = float(scores.mean() + scores.std(ddof=1))
    threshold = Threshold(
        threshold=tau, mean=0.2, std=0.1, prompts=pairs, protocol=protocol, similarity="fixed", velocity="converted"
    )  # fmt: skip
    write_json(store.folder / "threshold.json", threshold)
    for path in run.glob(f"{model}__*/spec.json"):
        if "__none__" not in path.parent.name:
            change_file(path, Spec, calibration=f"../../calibration/{store.folder.name}")
    return store.folder


def change_file(path: Path, kind: type[E], **fields: Any) -> E:
    """Gives a file of the schema other fields.

    Args:
        path: The file.
        kind: Its class.
        **fields: The new values.

    Returns:
        The new content.
    """
    changed = read_file(path, kind).model_copy(update=fields)
    write_json(path, changed)
    return changed


def _write_cell(
    folder: Path,
    model: str,
    named: tuple[str, str],
    prompts: Sequence[tuple[str, str, Kind | None]],
    number: int,
    pool: Iterator[Path],
) -> str:
    method, title = named
    name = f"{model}__{method}__planted__{number:08x}"
    cell = folder / name
    store = Store(cell)
    kinds = [LocalizationRecord] * (method != "none") + [MemorizationRecord, ImageRecord, ScoreRecord]
    store.open(Spec(
        task="benchmark", stages=[kind.stage for kind in kinds], model=model, method=method, prompts="planted",
        title=title, settings={"seeds": SEEDS, "steps": 20, "method": {"name": method, "theta_min": 0.12}},
        digests={"model": f"{zlib.crc32(model.encode()):016x}", "prompts": "5f3a9be1c0d24786"},
        citations={"NeMo": CITATION} if method == "nemo" else {},
    ), is_named=True)  # fmt: skip
    rng = np.random.default_rng(number)
    listed: list[Prompt] = []
    records: dict[type[Record], list[Any]] = {kind: [] for kind in (LocalizationRecord, *kinds)}
    scores: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for place, (prompt, text, kind) in enumerate(prompts):
        references = _references(folder / "references", prompt, kind, place, pool)
        listed.append(Prompt(prompt, text, kind, tuple(references)))
        copied = kind is not None and (method in ("none", "random") or (method == "tokens" and place % 2 == 0))
        neurons = _neurons(rng, kind, method)
        memorization = round(float(rng.uniform(0.35, 0.5) if copied else rng.uniform(0.02, 0.12)), 4)
        noise = f"noise/{prompt}.png"
        _noise(rng, 0.9 if copied else 0.1).save(cell / noise)
        localization = Localization(
            Neurons(neurons), Neurons(neurons), gate_score=0.61, initial_score=0.1, refined_score=0.11, threshold=0.12
        )
        records[LocalizationRecord].append(LocalizationRecord(
            id=f"{place:016x}", prompt=prompt, localization=localization, cost=Cost(seconds=3.1, row_passes=512.0)
        ))  # fmt: skip
        records[MemorizationRecord].append(MemorizationRecord(
            id=f"{place:016x}", prompt=prompt, score=memorization, image=noise, cost=Cost(seconds=0.2)
        ))  # fmt: skip
        per_image: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            image = f"images/{prompt}_{seed:02d}.png"
            record = {"id": f"{place:08x}{seed:08x}", "prompt": prompt, "seed": seed}
            _write_picture(cell / image, _picture(place, seed, copied, kind, rng), pool)
            cost = Cost(seconds=0.4, row_passes=40.0)
            records[ImageRecord].append(ImageRecord(**record, image=image, cost=cost))
            found = {"alignment": round(float(rng.normal(0.3 - 0.01 * (method != "none"), 0.015)), 4)}
            if kind:
                found["ssim"] = round(float(np.clip(rng.normal(0.78 if copied else 0.24, 0.07), -1, 1)), 4)
                found["ssim_nearest"] = round(found["ssim"] + 0.05 * (kind == "TM"), 4)
            records[ScoreRecord].append(ScoreRecord(**record, scores=found))
            for key, value in found.items():
                per_image.setdefault(key, []).append(value)
        whole = {
            "diversity": round(float(rng.uniform(0.03, 0.1) if copied else rng.uniform(0.4, 0.6)), 4),
            "memorization": memorization,
            "neurons": float(sum(len(ids) for ids in neurons.values())),
            DETECTOR: round(float(rng.normal(0.5 if copied else 0.3, 0.1)), 4),
        }
        records[ScoreRecord].append(ScoreRecord(id=f"ffffffff{place:08x}", prompt=prompt, scores=whole))
        means = {key: (fmean(values), median(values)) for key, values in per_image.items()}
        for key, pair in (means | {key: (value, value) for key, value in whole.items()}).items():
            for target in (listed[-1].group, "all"):
                scores.setdefault(target, {}).setdefault(key, []).append(pair)
    write_prompts(cell, listed)
    for stage in kinds:
        store.writer(stage)(records[stage])
        store.finish(stage, [record.id for record in records[stage]])
    write_json(cell / "layers.json", LAYERS)
    write_json(cell / "env.json", [Start(
        time="2026-11-23T17:00:00+00:00", command="nemo-bench run prompts=planted", commit="abc1234", dirty=False,
        device="cpu", versions={"nemo_bench": "0.1.0", "torch": "2.15.0"},
    )])  # fmt: skip
    nemo = Preset(
        title="NeMo", definition="Median over images, then median ± MAD over prompts.",
        citation="Hintersdorf et al. 2024",
        rows={g: {"ssim": _statistic(scores[g]["ssim"])} for g in ("VM", "TM") if g in scores},
    )  # fmt: skip
    write_json(cell / "metrics.json", Summary(
        metrics=METRICS,
        unmitigated=next((path.name for path in folder.glob(f"{model}__none__*") if path != cell), None),
        aggregates=_aggregates(folder, model, scores, rng),
        presets={"nemo": nemo},
        detection=_detection(listed, records[ScoreRecord]),
        counts={
            "images": len(prompts) * SEEDS, "prompts": len(prompts), "truncated": 1, "without_reference": 0,
            "dead_references": 0, "damaged_references": 2,
        },
        cost={
            "localize_seconds_per_prompt": 3.1, "once_seconds_per_prompt": 2.9,
            "once_row_passes_per_prompt": 512.0 * (method == "nemo"),
            "generate_seconds_per_image": 0.4, "row_passes_per_image": 40.0, "peak_memory_mb": 812.5,
        },
    ))  # fmt: skip
    return name


def _aggregates(
    folder: Path, model: str, scores: Mapping[str, Mapping[str, list[tuple[float, float]]]], rng: np.random.Generator
) -> dict[str, dict[str, Aggregate]]:
    """By group and metric, compared with the cell without mitigation, which was written before."""
    rows = {g: {k: _aggregate(v) for k, v in scores[g].items() if k in METRICS} for g in scores}
    for row in rows.values():
        row["fid"] = Aggregate(mean=round(float(rng.uniform(15, 30)), 2), prompts=len(PROMPTS))
    for path in folder.glob(f"{model}__none__*/metrics.json"):
        for group, before in read_file(path, Summary).aggregates.items():
            for key, value in before.items():
                if value.low is not None:
                    difference = rows[group][key].mean - value.mean
                    change = Paired(
                        difference=difference, low=difference - 0.05, high=difference + 0.05,
                        p=round(float(np.exp(-40 * abs(difference))), 6), prompts=value.prompts,
                    )  # fmt: skip
                    rows[group][key] = rows[group][key].model_copy(update={"paired": change})
    return rows


def _statistic(pairs: list[tuple[float, float]]) -> Statistic:
    of = _aggregate(pairs)
    return Statistic(value=of.median or 0.0, spread=of.mad, low=of.low, high=of.high, prompts=of.prompts)


def _detection(prompts: Sequence[Prompt], records: Sequence[ScoreRecord]) -> dict[str, Roc]:
    kinds = {prompt.id: prompt.kind for prompt in prompts}
    scores = {record.prompt: record.scores[DETECTOR] for record in records if record.seed is None}
    memorized, other = ([v for k, v in scores.items() if bool(kinds[k]) is wanted] for wanted in (True, False))
    if not memorized or not other:
        return {}
    auc = float(np.mean([(a > b) + (a == b) / 2 for a in memorized for b in other]))
    roc = Roc(
        title="Noise similarity", auc=auc, auc_low=max(0.0, auc - 0.1), auc_high=min(1.0, auc + 0.1),
        average_precision=0.91, tpr_at_1_fpr_below=0.5, tpr_at_1_fpr_nearest=0.75, tpr_at_1_fpr_first=0.25,
        best_accuracy=0.88, memorized=len(memorized), other=len(other),
        curve=[[0.0, 0.0], [0.0, 0.5], [0.5, 1.0], [1.0, 1.0]],
    )  # fmt: skip
    return {DETECTOR: roc}


def _aggregate(pairs: list[tuple[float, float]]) -> Aggregate:
    means, medians = np.array(pairs).T
    draws = np.random.default_rng(1).choice(means, (500, len(means))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    middle = np.median(medians)
    return Aggregate(
        mean=float(means.mean()), low=float(low), high=float(high), median=float(middle),
        mad=float(np.median(np.abs(medians - middle))), prompts=len(pairs),
    )  # fmt: skip


def _neurons(rng: np.random.Generator, kind: str | None, method: str) -> dict[str, list[int]]:
    if kind is None or method == "none":
        return {}
    layers = rng.choice(list(LAYERS)[:5], int(rng.integers(1, 4)), replace=False)
    return {str(layer): sorted(rng.choice(48, int(rng.integers(1, 6)), replace=False).tolist()) for layer in layers}


def _references(folder: Path, prompt: str, kind: str | None, place: int, pool: Iterator[Path]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prompt}{suffix}.png" for suffix in {"TM": ("a", "b", "c"), None: ()}.get(kind, ("",))]
    for variant, path in enumerate(paths):
        if not path.exists():
            _write_picture(path, _scene(place, variant if kind == "TM" else 0), pool)
    return paths


def _picture(place: int, seed: int, copied: bool, kind: str | None, rng: np.random.Generator) -> Pixels:
    if copied:
        return _scene(place, seed if kind == "TM" else 0) + rng.normal(0, 0.015, (SIDE, SIDE, 3))
    return _scene(place, 0, np.random.default_rng([place, seed, int(rng.integers(1000))]))


def _scene(place: int, variant: int, rng: np.random.Generator | None = None) -> Pixels:
    """Some discs on a wavy ground; a prompt decides the palette, ``rng`` (or the prompt) where things are."""
    palette = np.random.default_rng(place).uniform(0.1, 0.95, (3, 3))
    rng = rng or np.random.default_rng(100 + place)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    wave = np.sin(2 * np.pi * (rng.uniform(1, 4) * y + rng.uniform(-2, 2) * x + rng.uniform()))
    pixels: Pixels = np.where(wave[..., None] > 0, palette[0], palette[0] * 0.82)
    for _ in range(int(rng.integers(3, 6))):
        cx, cy, radius, color = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.06, 0.2), rng.integers(1, 3)
        pixels = np.where((np.hypot(x - cx, y - cy) < radius)[..., None], palette[color], pixels)
    if variant:
        inside = (np.abs(x - 0.5) < 0.22) & (np.abs(y - 0.55) < 0.2)
        stripes = np.sin(40 * x * variant) > 0
        pixels = np.where(inside[..., None], np.where(stripes[..., None], palette[2], 1 - palette[1]), pixels)
    return pixels


def _noise(rng: np.random.Generator, shared: float) -> Image.Image:
    common, *own = (np.kron(rng.normal(size=(8, 8, 3)), np.ones((4, 4, 1))) for _ in range(SEEDS + 1))
    tiles = [shared * common + (1 - shared) * tile for tile in own]
    return Image.fromarray(np.uint8(np.clip(128 + 60 * np.concatenate(tiles, axis=1), 0, 255)))


def _write_picture(path: Path, pixels: Pixels, pool: Iterator[Path]) -> None:
    if file := next(pool, None):
        path.hardlink_to(file)
    else:
        Image.fromarray(np.uint8(np.clip(pixels, 0, 1) * 255)).save(path)
