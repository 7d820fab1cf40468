"""Measures the embedded model and writes the figures into its card.

Run: python benchmarks/planted_card.py [--model NAME] [--seeds 8] [--json]
Every figure comes from images and noise drawn here, with seeds that training never used. The limits that decide
"repeats" come from pairs that have nothing to do with each other, before any image of a planted prompt is looked at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from nemo_bench import Calibration, Diffusion, Neurons, Prompt, read_prompts, resolve
from nemo_bench.benchmark.runner import load_model
from nemo_bench.benchmark.stages.base import to_image
from nemo_bench.config import grid
from nemo_bench.localization import (
    NemoSettings,
    activation_statistics,
    localize,
    noise_differences,
    pair_similarities,
    pair_values,
    threshold,
)
from nemo_bench.localization.noise_differences import scaled_difference
from nemo_bench.metrics import SSIM, OpenClip, PixelDistance
from nemo_bench.planted.prompts import heldout_captions
from nemo_bench.planted.truth import PIXEL_LIMIT
from nemo_bench.planted.world import render
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.images import open_image
from nemo_bench.records.truth import read_truth

CARD = Path(resolve("package:planted/README.md"))
CPU = torch.device("cpu")
MARKS = "<!-- measured {model}: begin -->", "<!-- measured {model}: end -->"


MODELS = "planted", "planted_routed", "planted_mmdit"
LEVELS = 1.0, 0.98, 0.85
"""Noise levels of flow matching beside the one at which noise differences are taken."""


def generate(
    model: Diffusion, prompt: Prompt, seeds: int, neurons: Neurons | None = None, *, pooled: bool = True
) -> Tensor:
    text = model.encode([prompt.text]).rows([0] * seeds)
    if not pooled:
        text = replace(text, pooled=model.unconditional(seeds).pooled)
    latents = model.latents(seeds_of(prompt, "card", range(seeds)))
    with model.block(neurons or Neurons()):
        return model.generate(text, latents)


def references_of(prompt: Prompt) -> Tensor:
    return SSIM().embed([open_image(path) for path in prompt.references], (64, 64), CPU)


def embed(judge: OpenClip, images: Tensor) -> Tensor:
    return F.normalize(judge.embed([to_image(image) for image in images], (64, 64), CPU))


def embed_text(judge: OpenClip, text: str) -> Tensor:
    return F.normalize(judge.embed_text(text, CPU)[0], dim=0)


def calibrate(model: Diffusion, texts: Sequence[str], seeds: int) -> tuple[Calibration, list[float]]:
    mean, std = activation_statistics(model, [texts])
    pairs: list[float] = []
    per_prompt = []
    for index, text in enumerate(tqdm(texts, desc="calibrate")):
        values = noise_scores(model, Prompt(f"calibration-{index}", text), seeds)
        pairs += values.tolist()
        per_prompt.append(float(values.mean()))
    return Calibration(mean, std, threshold(pairs), len(texts)), per_prompt


def noise_scores(model: Diffusion, prompt: Prompt, seeds: int, level: float | None = None) -> Tensor:
    text = model.encode([prompt.text]).rows([0] * seeds)
    latents = model.latents(seeds_of(prompt, "localize", range(seeds)))
    if level is None:
        differences = noise_differences(model, text, latents)
    else:
        timestep = level * model.schedule.training_timesteps
        noisy = model.schedule.noised(latents, timestep)
        predicted = model.predict_noise(noisy, timestep, text)
        differences = scaled_difference(model.schedule.difference(predicted, timestep, noisy))
    return pair_values(pair_similarities(differences, model.similarity))


def separation(memorized: Sequence[float], general: Sequence[float]) -> float:
    """Area under the ROC curve of a score."""
    labels = torch.tensor([1] * len(memorized) + [0] * len(general))
    return float(binary_auroc(torch.tensor([*memorized, *general]), labels))


def retrieval(judge: OpenClip, count: int = 500) -> float:
    """Share of held-out pictures whose caption is the nearest of all, one picture a caption."""
    captions = heldout_captions(count)
    pictures = [render(caption.scene, np.random.default_rng([77, i])) for i, caption in enumerate(captions)]
    images = F.normalize(judge.embed([Image.fromarray(picture) for picture in pictures], (64, 64), CPU))
    texts = torch.stack([embed_text(judge, caption.text) for caption in captions])
    return float(((images @ texts.T).argmax(1) == torch.arange(count)).float().mean())


@torch.no_grad()
def measure(name: str, seeds: int) -> dict[str, float]:
    settings = grid(["method=nemo", f"model={name}"])[0].settings
    model = load_model(settings.model)
    judge = OpenClip(resolve(settings.model.clip), settings.model.clip_pretrained)
    planted, general = (read_prompts(resolve(file)) for file in settings.prompts.files)
    assert settings.prompts.calibration
    texts = Path(resolve(settings.prompts.calibration)).read_text(encoding="utf-8").splitlines()
    verbatim = [p for p in planted if p.kind == "VM"]
    pool = torch.cat([references_of(p) for p in planted])
    figures: dict[str, float] = {"judge_retrieval_top1_of_500": retrieval(judge)}

    calibration, general_scores = calibrate(model, texts, settings.localize_seeds)
    figures["threshold"] = calibration.threshold
    planted_scores = [float(noise_scores(model, p, settings.localize_seeds).mean()) for p in planted]
    figures["noise_score_vm"] = float(
        np.mean([s for s, p in zip(planted_scores, planted, strict=True) if p.kind == "VM"])
    )
    figures["noise_score_tm"] = float(
        np.mean([s for s, p in zip(planted_scores, planted, strict=True) if p.kind == "TM"])
    )
    figures["noise_score_general"] = float(np.mean(general_scores))
    figures["noise_score_auc"] = separation(planted_scores, general_scores)
    if model.schedule.quantity == "velocity":
        figures["noise_score_level"] = model.schedule.difference_timestep(0) / model.schedule.training_timesteps
        unseen = [Prompt(f"calibration-{index}", text) for index, text in enumerate(texts)]
        for level in LEVELS:
            both = (
                [float(noise_scores(model, p, settings.localize_seeds, level).mean()) for p in group]
                for group in (planted, unseen)
            )
            figures[f"noise_score_auc_at_level_{level:g}"] = separation(*both)

    images = {p.id: generate(model, p, seeds) for p in tqdm([*planted, *general], desc="images")}
    everything_general = torch.cat([images[p.id] for p in general])
    unrelated = torch.cat([SSIM().nearest(everything_general, references_of(p)) for p in verbatim])
    limit = float(unrelated.quantile(0.99))
    figures["unrelated_ssim_median"], figures["unrelated_ssim_p99"] = float(unrelated.median()), limit
    own = {p.id: SSIM().nearest(images[p.id], references_of(p)) for p in planted}
    figures["vm_ssim_median"] = float(torch.cat([own[p.id] for p in verbatim]).median())
    figures["vm_prompts_all_seeds_repeat_ssim"] = float(np.mean([bool((own[p.id] > limit).all()) for p in verbatim]))
    distances = {p.id: PixelDistance().nearest(images[p.id], references_of(p)) for p in planted}
    figures["vm_pixel_distance_median"] = float(torch.cat([distances[p.id] for p in verbatim]).median())
    figures["vm_prompts_all_seeds_repeat_pixels"] = float(
        np.mean([bool((distances[p.id] < PIXEL_LIMIT).all()) for p in verbatim])
    )
    figures["vm_prompts_all_seeds_repeat_both"] = float(
        np.mean([bool(((own[p.id] > limit) & (distances[p.id] < PIXEL_LIMIT)).all()) for p in verbatim])
    )
    unrelated_pixels = torch.cat([PixelDistance().nearest(everything_general, references_of(p)) for p in verbatim])
    figures["unrelated_pixel_distance_median"] = float(unrelated_pixels.median())
    figures["unrelated_pixel_share_below_limit"] = float((unrelated_pixels < PIXEL_LIMIT).float().mean())
    codes = model.vae.decode(model.vae.encode(pool * 2 - 1).latent_dist.mean).sample.div(2).add(0.5).clamp(0, 1)
    figures["autoencoder_ssim_on_references"] = float(
        torch.cat([SSIM().nearest(codes[i : i + 1], pool[i : i + 1]) for i in range(len(pool))]).median()
    )
    if model.unconditional(1).pooled is not None:
        unpooled = [SSIM().nearest(generate(model, p, seeds, pooled=False), references_of(p)) for p in verbatim]
        figures["vm_ssim_median_with_an_empty_pooled_vector"] = float(torch.cat(unpooled).median())
    tm = [p for p in planted if p.kind == "TM"]
    figures["tm_ssim_median"] = float(torch.cat([own[p.id] for p in tm]).median())

    embeddings = {p.id: embed(judge, images[p.id]) for p in [*planted, *general]}
    captions = {p.id: embed_text(judge, p.text) for p in [*planted, *general]}
    others = general[1:] + general[:1]
    figures["general_alignment"] = float(torch.cat([embeddings[p.id] @ captions[p.id] for p in general]).mean())
    figures["general_alignment_swapped"] = float(
        torch.cat([embeddings[p.id] @ captions[q.id] for p, q in zip(general, others, strict=True)]).mean()
    )
    figures["general_nearest_planted_ssim_max"] = float(SSIM().nearest(everything_general, pool).max())
    figures["general_pixel_copies"] = float(
        (PixelDistance().nearest(everything_general, pool) < PIXEL_LIMIT).float().mean()
    )
    figures["vm_pixel_spread"] = spread([images[p.id] for p in verbatim])
    figures["general_pixel_spread"] = spread([images[p.id] for p in general])

    empty = generate(model, Prompt("empty", ""), 4 * seeds)
    figures["empty_nearest_planted_ssim_max"] = float(SSIM().nearest(empty, pool).max())
    figures["empty_pixel_copies"] = float((PixelDistance().nearest(empty, pool) < PIXEL_LIMIT).float().mean())

    truth = read_truth(Path(resolve(settings.model.truth))) if settings.model.truth else {}
    if truth:
        figures["truth_vm_prompts"] = float(sum(p.id in truth for p in verbatim))
        figures["truth_tm_prompts"] = float(sum(p.id in truth for p in planted if p.kind == "TM"))
        figures["truth_neurons_median"] = float(np.median([neurons.count for neurons in truth.values()]))
        every = reduce(or_, truth.values())
        kept = [embed(judge, generate(model, p, seeds, every)) @ captions[p.id] for p in general]
        figures["general_alignment_with_all_true_neurons_off"] = float(torch.cat(kept).mean())
        without = torch.cat([SSIM().nearest(generate(model, p, seeds, every), references_of(p)) for p in tm])
        figures["tm_ssim_median_with_all_true_neurons_off"] = float(without.median())

    figures["general_prompts_that_pass_the_gate"] = float(
        sum(bool(noise_scores(model, p, settings.localize_seeds).max() > calibration.threshold) for p in general)
    )
    found: dict[str, Neurons] = {}
    for prompt in tqdm(planted, desc="localize"):
        latents = model.latents(seeds_of(prompt, "localize", range(settings.localize_seeds)))
        result = localize(model, model.encode([prompt.text]), latents, calibration, NemoSettings())
        found[prompt.id] = result.neurons
    after = {p.id: generate(model, p, seeds, found[p.id]) for p in tqdm(planted, desc="mitigate")}
    for kind in ("VM", "TM"):
        prompts = [p for p in planted if p.kind == kind]
        counts = np.array([found[p.id].count for p in prompts])
        name = kind.lower()
        figures[f"{name}_neurons_median"] = float(np.median(counts))
        figures[f"{name}_neurons_mad"] = float(np.median(np.abs(counts - np.median(counts))))
        mitigated = {p.id: SSIM().nearest(after[p.id], references_of(p)) for p in prompts}
        nearest = {p.id: SSIM().nearest(after[p.id], pool) for p in prompts}
        figures[f"{name}_ssim_median_mitigated"] = float(torch.cat(list(mitigated.values())).median())
        figures[f"{name}_nearest_ssim_median_mitigated"] = float(torch.cat(list(nearest.values())).median())
        copies = {
            p.id: (PixelDistance().nearest(after[p.id], pool) < PIXEL_LIMIT) & (nearest[p.id] > limit) for p in prompts
        }
        figures[f"{name}_images_copying_any_planted_mitigated"] = float(torch.cat(list(copies.values())).float().mean())
        figures[f"{name}_prompts_without_any_copy_mitigated"] = float(
            np.mean([not copies[p.id].any() for p in prompts])
        )
    hits = [(len(_places(found[name]) & _places(own)), own.count, found[name].count) for name, own in truth.items()]
    if hits:
        figures["nemo_recall_of_true_neurons"] = float(np.mean([hit / own for hit, own, _ in hits]))
        figures["nemo_precision_of_true_neurons"] = float(np.mean([hit / max(count, 1) for hit, _, count in hits]))
    neuron_sets = [found[p.id] for p in planted if found[p.id]]
    kept = [
        embed(judge, generate(model, p, seeds, neuron_sets[i % len(neuron_sets)])) @ captions[p.id]
        for i, p in enumerate(general)
    ]
    figures["general_alignment_with_a_planted_prompts_neurons_off"] = float(torch.cat(kept).mean())
    union = reduce(or_, neuron_sets)
    figures["union_neurons"] = float(union.count)
    off = [embed(judge, generate(model, p, seeds, union)) @ captions[p.id] for p in general]
    figures["general_alignment_with_all_found_neurons_off"] = float(torch.cat(off).mean())
    return {name: round(value, 4) for name, value in figures.items()}


def _places(neurons: Neurons) -> set[tuple[str, int]]:
    return {(layer, index) for layer, ids in neurons.items() for index in ids}


def spread(groups: Sequence[Tensor]) -> float:
    """Mean over prompts of the mean pixel standard deviation between seeds."""
    return float(torch.stack([images.std(0).mean() for images in groups]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="planted")
    parser.add_argument("--seeds", type=int, default=8, help="images a prompt")
    parser.add_argument("--json", action="store_true", help="print JSON and leave the card alone")
    options = parser.parse_args()
    figures = measure(options.model, options.seeds)
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:g} |" for name, value in figures.items())
    start, end = (mark.format(model=options.model) for mark in MARKS)
    table = f"{start}\n\n| measure ({options.seeds} images a prompt) | value |\n| --- | --- |\n{rows}\n\n{end}"
    card = CARD.read_text(encoding="utf-8")
    CARD.write_text(card[: card.index(start)] + table + card[card.index(end) + len(end) :], encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
