"""Builds a small, believable results folder: 3 methods x 6 prompts x 3 seeds, with real pictures and made-up scores."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float64]

PROMPTS = (
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
METRICS: dict[str, dict[str, Any]] = {
    "ssim": {"title": "SSIM to training image", "higher_is_better": False, "lower": -1.0, "upper": 1.0,
             "citation": "Wang et al. 2004", "description": "Structural similarity to the prompt's training image.",
             "family": "memorization", "per": "image"},
    "ssim_nearest": {"title": "SSIM to nearest", "higher_is_better": False, "lower": -1.0, "upper": 1.0,
                     "citation": "Wang et al. 2004", "description": "Best similarity to any known training image.",
                     "family": "memorization", "per": "image"},
    "alignment": {"title": "CLIP alignment", "higher_is_better": True, "lower": -1.0, "upper": 1.0,
                  "citation": "Radford et al. 2021", "description": "Cosine similarity of image and prompt in CLIP.",
                  "family": "alignment", "per": "image"},
    "diversity": {"title": "Diversity", "higher_is_better": True, "lower": 0.0, "upper": 1.0,
                  "citation": "", "description": "Mean pairwise dissimilarity of the images of a prompt.",
                  "family": "diversity", "per": "prompt"},
    "fid": {"title": "FID", "higher_is_better": False, "lower": 0.0, "upper": None, "citation": "Heusel et al. 2017",
            "description": "Distance of Inception features to those of a folder.", "family": "quality", "per": "set"},
    "memorization": {"title": "Memorization", "higher_is_better": False, "lower": -1.0, "upper": 1.0,
                     "citation": "Hintersdorf et al. 2024",
                     "description": "Mean pairwise SSIM of the noise differences of a prompt.",
                     "family": "localization", "per": "prompt"},
    "neurons": {"title": "Neurons", "higher_is_better": None, "lower": 0.0, "upper": None,
                "citation": "", "description": "Number of neurons blocked.", "family": "localization", "per": "prompt"},
}  # fmt: skip
CITATION = "@inproceedings{hintersdorf2024nemo,\n  title = {Finding NeMo},\n  year = {2024}\n}"


def write_fake_results(
    folder: Path,
    models: Sequence[str] = ("planted",),
    prompts: Sequence[tuple[str, str, str | None]] = PROMPTS,
    methods: Mapping[str, str] = METHODS,
) -> Path:
    """Writes a run of some methods on some models, keeping to the contract of ``metrics.json``.

    Args:
        folder: Where the run goes, such as ``results/default``.
        models: Names of the models.
        prompts: Id, text and kind of each prompt.
        methods: Name and title of each method; ``none`` first, if at all.

    Returns:
        The folder.
    """
    cells = [
        _write_cell(folder, model, named, prompts, len(methods) * i + j)
        for i, model in enumerate(models)
        for j, named in enumerate(methods.items())
    ]
    _dump(folder / "run.json", {"schema": 1, "name": folder.name, "cells": cells})
    return folder


def write_fake_calibration(run: Path, model: str = "planted", pairs: int = 200, protocol: str = "paper") -> Path:
    """Gives a run's cells of a model, but the one without mitigation, a calibration beside the run.

    Args:
        run: What :func:`write_fake_results` gave.
        model: Name of the model.
        pairs: Number of general prompts, two pairwise scores each.
        protocol: How noise differences were taken.

    Returns:
        The folder of the calibration.
    """
    folder = run.parent / "calibration" / f"{model}__{pairs:08x}"
    (folder / "records").mkdir(parents=True)
    scores = np.random.default_rng(pairs).normal(0.2, 0.1, (pairs, 2)).round(4)
    lines = [{"id": f"{i:016x}", "prompt": str(i), "pairs": row.tolist()} for i, row in enumerate(scores)]
    _write_jsonl(folder / "records" / "calibrate.0.jsonl", lines)
    threshold = float(scores.mean() + scores.std(ddof=1))
    about = {"mean": 0.2, "std": 0.1, "prompts": pairs, "protocol": protocol, "similarity": "fixed"}
    _dump(folder / "threshold.json", {"threshold": threshold, **about})
    for path in run.glob(f"{model}__*/spec.json"):
        if "__none__" not in path.parent.name:
            spec = json.loads(path.read_text())
            _dump(path, {**spec, "calibration": f"../../calibration/{folder.name}"})
    return folder


def _write_cell(
    folder: Path, model: str, named: tuple[str, str], prompts: Sequence[tuple[str, str, str | None]], number: int
) -> str:
    method, title = named
    name = f"{model}__{method}__planted__{number:08x}"
    cell = folder / name
    for sub in ("records", "images", "noise", "neurons"):
        (cell / sub).mkdir(parents=True)
    rng = np.random.default_rng(number)
    lines: dict[str, list[dict[str, Any]]] = {"prompts": [], "localize": [], "generate": [], "score": []}
    scores: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for place, (prompt, text, kind) in enumerate(prompts):
        references = _references(folder / "references", prompt, kind, place)
        group = kind or "general"
        lines["prompts"].append({
            "id": prompt, "text": text, "kind": kind, "group": group,
            "references": [str(path) for path in references], "tags": [],
        })  # fmt: skip
        copied = kind is not None and (method in ("none", "random") or (method == "tokens" and place % 2 == 0))
        neurons = _neurons(rng, kind, method)
        memorization = round(float(rng.uniform(0.35, 0.5) if copied else rng.uniform(0.02, 0.12)), 4)
        _noise(rng, 0.9 if copied else 0.1).save(cell / "noise" / f"{prompt}.png")
        lines["localize"].append({
            "id": f"{place:016x}", "prompt": prompt, "neurons": neurons, "initial": neurons, "gate_score": 0.61,
            "initial_score": 0.1, "refined_score": 0.11, "threshold": 0.12, "memorization": memorization,
            "noise": f"noise/{prompt}.png", "cost": {"seconds": 3.1, "row_passes": 512},
        })  # fmt: skip
        per_image: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            image = f"images/{prompt}_{seed:02d}.png"
            _save(_picture(place, seed, copied, kind, rng), cell / image)
            record = {"id": f"{place:08x}{seed:08x}", "prompt": prompt, "seed": seed}
            lines["generate"].append({**record, "image": image, "cost": {"seconds": 0.4, "row_passes": 40}})
            found = {"alignment": round(float(rng.normal(0.3 - 0.01 * (method != "none"), 0.015)), 4)}
            if kind:
                found["ssim"] = round(float(np.clip(rng.normal(0.78 if copied else 0.24, 0.07), -1, 1)), 4)
                found["ssim_nearest"] = round(found["ssim"] + 0.05 * (kind == "TM"), 4)
            lines["score"].append({**record, "scores": found})
            for key, value in found.items():
                per_image.setdefault(key, []).append(value)
        whole = {
            "diversity": round(float(rng.uniform(0.03, 0.1) if copied else rng.uniform(0.4, 0.6)), 4),
            "memorization": memorization,
            "neurons": sum(len(ids) for ids in neurons.values()),
            DETECTOR: round(float(rng.normal(0.5 if copied else 0.3, 0.1)), 4),
        }
        lines["score"].append({"id": f"ffffffff{place:08x}", "prompt": prompt, "seed": None, "scores": whole})
        means = {key: (fmean(values), median(values)) for key, values in per_image.items()}
        for key, pair in (means | {key: (value, value) for key, value in whole.items()}).items():
            for target in (group, "all"):
                scores.setdefault(target, {}).setdefault(key, []).append(pair)
    _write_jsonl(cell / "prompts.jsonl", lines["prompts"])
    for stage in ("localize", "generate", "score"):
        _write_jsonl(cell / "records" / f"{stage}.0.jsonl", lines[stage])
        (cell / f"{stage}.done").touch()
    _dump(cell / "spec.json", {
        "schema": 1, "model": model, "method": method, "prompts": "planted", "title": title,
        "settings": {"seeds": SEEDS, "steps": 20, "method": {"name": method, "theta_min": 0.12}},
        "digests": {"model": f"{zlib.crc32(model.encode()):016x}", "prompts": "5f3a9be1c0d24786"},
        "citations": {"NeMo": CITATION} if method == "nemo" else {},
    })  # fmt: skip
    _dump(cell / "layers.json", LAYERS)
    _dump(cell / "env.json", {"starts": [{
        "time": "2026-11-23T17:00:00+00:00", "command": "nemo-bench run prompts=planted", "commit": "abc1234",
        "dirty": False, "world_size": 1, "device": "cpu", "versions": {"nemo_bench": "0.1.0", "torch": "2.15.0"},
    }]})  # fmt: skip
    _dump(cell / "metrics.json", {
        "schema": 1, "metrics": METRICS,
        "unmitigated": next((path.name for path in folder.glob(f"{model}__none__*") if path != cell), None),
        "aggregates": _aggregates(folder, model, scores, rng),
        "presets": {"nemo": {
            "title": "NeMo", "definition": "Median over images, then median ± MAD over prompts.",
            "citation": "Hintersdorf et al. 2024",
            "rows": {g: {"ssim": _statistic(scores[g]["ssim"])} for g in ("VM", "TM") if g in scores},
        }},
        **_detection(lines),
        "counts": {
            "images": len(lines["generate"]), "prompts": len(prompts), "truncated": 1, "without_reference": 0,
            "dead_references": 0, "damaged_references": 2,
        },
        "cost": {
            "localize_seconds_per_prompt": 3.1, "once_seconds_per_prompt": 2.9,
            "once_row_passes_per_prompt": 512.0 * (method == "nemo"),
            "generate_seconds_per_image": 0.4, "row_passes_per_image": 40.0, "peak_memory_mb": 812.5,
        },
    })  # fmt: skip
    return name


def _aggregates(
    folder: Path, model: str, scores: Mapping[str, Mapping[str, list[tuple[float, float]]]], rng: np.random.Generator
) -> dict[str, dict[str, dict[str, Any]]]:
    """By group and metric, held against the cell without mitigation, which was written before."""
    found = {g: {k: _aggregate(v) for k, v in scores[g].items() if k in METRICS} for g in scores}
    for group in found:
        nothing = dict.fromkeys(("low", "high", "median", "mad"))
        found[group]["fid"] = {"mean": round(float(rng.uniform(15, 30)), 2), **nothing, "prompts": len(PROMPTS)}
    for path in folder.glob(f"{model}__none__*/metrics.json"):
        for group, row in json.loads(path.read_text())["aggregates"].items():
            for key, before in row.items():
                if before["low"] is not None:
                    difference = found[group][key]["mean"] - before["mean"]
                    found[group][key]["paired"] = {
                        "difference": difference, "low": difference - 0.05, "high": difference + 0.05,
                        "p": round(float(np.exp(-40 * abs(difference))), 6), "prompts": before["prompts"],
                    }  # fmt: skip
    return found


def _statistic(pairs: list[tuple[float, float]]) -> dict[str, float]:
    found = _aggregate(pairs)
    return {"value": found["median"], "spread": found["mad"], **{key: found[key] for key in ("low", "high", "prompts")}}


def _detection(lines: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    kinds = {line["id"]: line["kind"] for line in lines["prompts"]}
    scores = {line["prompt"]: line["scores"][DETECTOR] for line in lines["score"] if line["seed"] is None}
    memorized, other = ([v for k, v in scores.items() if bool(kinds[k]) is wanted] for wanted in (True, False))
    if not memorized or not other:
        return {}
    auc = float(np.mean([(a > b) + (a == b) / 2 for a in memorized for b in other]))
    return {"detection": {DETECTOR: {
        "title": "Noise similarity", "auc": auc, "auc_low": max(0.0, auc - 0.1), "auc_high": min(1.0, auc + 0.1),
        "average_precision": 0.91, "tpr_at_1_fpr_below": 0.5, "tpr_at_1_fpr_nearest": 0.75,
        "tpr_at_1_fpr_first": 0.25, "best_accuracy": 0.88,
        "memorized": len(memorized), "other": len(other), "curve": [[0.0, 0.0], [0.0, 0.5], [0.5, 1.0], [1.0, 1.0]],
        "failed": 0,
    }}}  # fmt: skip


def _aggregate(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    means, medians = np.array(pairs).T
    draws = np.random.default_rng(1).choice(means, (500, len(means))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    middle = np.median(medians)
    mad = np.median(np.abs(medians - middle))
    return {
        "mean": float(means.mean()), "low": float(low), "high": float(high), "median": float(middle),
        "mad": float(mad), "prompts": len(pairs),
    }  # fmt: skip


def _neurons(rng: np.random.Generator, kind: str | None, method: str) -> dict[str, list[int]]:
    if kind is None or method == "none":
        return {}
    layers = rng.choice(list(LAYERS)[:5], int(rng.integers(1, 4)), replace=False)
    return {str(layer): sorted(rng.choice(48, int(rng.integers(1, 6)), replace=False).tolist()) for layer in layers}


def _references(folder: Path, prompt: str, kind: str | None, place: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prompt}{suffix}.png" for suffix in {"TM": ("a", "b", "c"), None: ()}.get(kind, ("",))]
    for variant, path in enumerate(paths):
        _save(_scene(place, variant if kind == "TM" else 0), path)
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


def _save(pixels: Pixels, path: Path) -> None:
    Image.fromarray(np.uint8(np.clip(pixels, 0, 1) * 255)).save(path)


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_jsonl(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
