"""Compares NeMo's search with the plain schedule of the public scripts: UNet row passes, time, and the neurons found.

Run: python benchmarks/localize.py [--prompts 20] [--plain 20] [--seeds 10] [--similarity fixed] [...]
The words key=value are settings of `nemo-bench run`, such as model=sd14. Both sides follow protocol `reference` with
the similarity of --similarity, so the plain side makes the passes of the public scripts: for every tested set of
neurons the text is encoded again and two UNet steps run on all seeds, one prompt at a time; statistics are collected in
UNet passes, one prompt at a time. It is the slow implementation that the tests compare with, and takes longest by far:
--plain is the number of prompts, from the first, that it runs on, and ratios are of those. Where the selection runs
out, its limit is ours, so that neurons without effect are not kept or dropped by rounding. A row pass is one sample
through the UNet. Passes that start at a replayed prefix compute less, and gradients of bisection more: `pass` counts
the multiplications of convolutions and linear layers (twice where gradients flow back), in full passes; `row` counts
samples, whatever part of the UNet they pass. `rebatched` is the exact search in batches of another size, which round
otherwise: it shows how often the neurons depend on that. The scripts discard the first of their two steps: `to one
step` is a ratio to the same schedule without it, half as many rows and passes. `lowest` and `highest` are of single
prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nemo_bench import Calibration, Diffusion, Localization, Neurons, read_prompts, resolve
from nemo_bench.benchmark.runner import load_model
from nemo_bench.config import grid
from nemo_bench.diffusion import MEASURES
from nemo_bench.localization import (
    REFERENCE,
    NemoSettings,
    Protocol,
    activation_statistics,
    localize,
    noise_differences,
    pair_similarities,
    pair_values,
    threshold,
)
from nemo_bench.localization.nemo import ROUNDING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
import reference_nemo as plain

BATCH_SIZE = 32
OTHER_BATCH_SIZE = 24


@dataclass
class Meter:
    rows: float = 0.0
    batches: float = 0.0
    multiplications: float = 0.0
    seconds: float = 0.0
    processor_seconds: float = 0.0

    def add(self, other: Meter) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@contextmanager
def measured(model: Diffusion, meter: Meter) -> Iterator[None]:
    def count_rows(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        meter.rows += len(args[0])
        meter.batches += 1

    def count_multiplications(module: Any, _args: tuple[Tensor, ...], output: Tensor) -> None:
        meter.multiplications += output.numel() * module.weight[0].numel() * (2 if torch.is_grad_enabled() else 1)

    leaves = [m for m in model.unet.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [model.unet.register_forward_pre_hook(count_rows)]
    hooks += [leaf.register_forward_hook(count_multiplications) for leaf in leaves]
    start, processor_start = time.perf_counter(), time.process_time()
    try:
        yield
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    finally:
        meter.seconds += time.perf_counter() - start
        meter.processor_seconds += time.process_time() - processor_start
        for hook in hooks:
            hook.remove()


SIDES: dict[str, tuple[Any, int]] = {
    "exact": ("sequential", BATCH_SIZE),
    "rebatched": ("sequential", OTHER_BATCH_SIZE),
    "margin": ("margin", BATCH_SIZE),
    "bisect": ("bisect", BATCH_SIZE),
}
"""Refinement and rows in a batch."""
_one_step = plain.noise_differences


def both_steps(pipe: Any, text: str, latents: Tensor, blocked: Any = None, number: int = 0, *options: Any) -> Tensor:
    """The computation of the scripts, which also predict at the first step and discard the result."""
    for step in range(number):
        _one_step(pipe, text, latents, blocked, step, *options)
    return _one_step(pipe, text, latents, blocked, number, *options)


plain.noise_differences = both_steps
_refinement = plain.refinement


def refinement_without_ties(tau: float) -> Callable[..., Any]:
    """The refinement of the scripts by our limit where the selection ran out.

    The limit is then a similarity that was reached before. Neurons that do not matter reach it again but for rounding,
    by which the scripts keep or drop them; in ours they are kept.
    """
    return lambda neurons, score, limit: _refinement(neurons, score, limit - ROUNDING if limit > tau else limit)


def plain_statistics(model: Diffusion, texts: list[str], latent: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out, n=name: seen.update({n: out.abs().mean(1)}))
        for name, layer in plain.value_layers(model.unet).items()
    ]
    rows = []
    for text in texts:
        plain.noise_differences(model.pipeline, text, latent)
        rows.append(dict(seen))
    for hook in hooks:
        hook.remove()
    for name in seen:
        torch.std_mean(torch.cat([row[name] for row in rows]), dim=0)


def plain_threshold(model: Diffusion, texts: list[str], latents: Tensor, protocol: Protocol) -> None:
    for text in texts:
        differences = plain.noise_differences(model.pipeline, text, latents, number=1)
        plain.noise_differences(model.pipeline, "", latents, number=1)
        plain.pair_scores(differences, similarity_of(model, protocol))


def our_threshold(model: Diffusion, texts: list[str], latents: Tensor, protocol: Protocol) -> float:
    pairs: list[float] = []
    for text in texts:
        rows = model.encode([text]).rows([0] * len(latents))
        differences = noise_differences(model, rows, latents, protocol, calibrating=True)
        pairs += pair_values(pair_similarities(differences, model.similarity, protocol.similarity)).tolist()
    return threshold(pairs)


def similarity_of(model: Diffusion, protocol: Protocol) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(plain.ms_ssim if model.similarity.betas else plain.ssim, measure=protocol.similarity)


def per_prompt(model: Diffusion, run: Callable[[list[str]], Any], texts: list[str]) -> tuple[Any, Meter]:
    run(texts[:2])
    meter = Meter()
    with measured(model, meter), REFERENCE.precision(model):
        result = run(texts)
    return result, Meter(*(part / len(texts) for part in vars(meter).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=20, help="prompts with enough candidates to compare")
    parser.add_argument(
        "--plain", type=int, help="prompts, from the first, that the plain schedule runs on; default: all"
    )
    parser.add_argument("--candidates", type=int, default=20, help="least number of candidates of a prompt")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threshold", type=float, default=None, help="memorization threshold; default: calibrated")
    parser.add_argument("--similarity", choices=MEASURES, default="fixed", help="how noise differences are compared")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    with_plain = arguments.prompts if arguments.plain is None else arguments.plain
    if not 1 <= with_plain <= arguments.prompts:
        parser.error(f"--plain {with_plain}: expected 1 to the number of prompts, {arguments.prompts}")
    settings = grid([*arguments.overrides, "method=nemo"])[0].settings
    model = load_model(settings.model).to("cuda" if torch.cuda.is_available() else "cpu")
    general = [p.text for p in read_prompts(resolve(str(settings.prompts.calibration)))]
    prompts = [p for file in settings.prompts.files for p in read_prompts(resolve(file))]
    protocol = REFERENCE.changed(similarity=arguments.similarity)
    latents = REFERENCE.latents(model, range(arguments.seeds))

    with torch.no_grad():
        _, slow_statistics = per_prompt(model, lambda t: plain_statistics(model, t, latents[:1]), general[:64])
        (mean, std), fast_statistics = per_prompt(model, lambda t: activation_statistics(model, batches(t)), general)
        _, slow_threshold = per_prompt(model, lambda t: plain_threshold(model, t, latents, protocol), general[:16])
        tau, fast_threshold = per_prompt(model, lambda t: our_threshold(model, t, latents, protocol), general[:64])
    tau = tau if arguments.threshold is None else arguments.threshold
    calibration = Calibration(mean, std, tau, len(general))
    plain.refinement = refinement_without_ties(tau)

    meters = {name: Meter() for name in ("plain", *SIDES)}
    lines: list[dict[str, Any]] = []
    bar = tqdm(total=arguments.prompts, desc="prompts", unit="prompt")
    for prompt in prompts:
        localized: dict[str, Localization] = {}
        spent = {name: Meter() for name in meters}
        for name, (refinement, batch_size) in SIDES.items():
            with measured(model, spent[name]):
                text = model.encode([prompt.text])
                options = NemoSettings(refinement=refinement)
                localized[name] = localize(model, text, latents, calibration, options, protocol, batch_size)
            if localized["exact"].initial.count < arguments.candidates:
                break
        if len(localized) < len(SIDES):
            continue
        exact = localized["exact"].neurons
        line: dict[str, Any] = {
            "prompt": prompt.id,
            "candidates": localized["exact"].initial.count,
            "exhausted": localized["exact"].exhausted,
            "neurons": exact.count,
            **{f"{name}_same_as_exact": localized[name].neurons == exact for name in ("rebatched", "margin")},
            "bisect_neurons": localized["bisect"].neurons.count,
            "shared_with_bisect": overlap(exact, localized["bisect"].neurons),
            **{f"{name}_rows": spent[name].rows for name in SIDES},
        }
        if len(lines) < with_plain:
            with measured(model, spent["plain"]), REFERENCE.precision(model):
                expected = plain.localize(
                    model.pipeline,
                    prompt.text,
                    latents,
                    mean,
                    std,
                    tau,
                    similarity_of(model, protocol),
                    step=1,
                    duplicates=True,
                    raw=True,
                )
            for name, meter in meters.items():
                meter.add(spent[name])
            line["smallest_margin"] = min((abs(s - t) for s, t in expected.decisions if s != t), default=0.0)
            for name, found in localized.items():
                line[f"{name}_same_as_plain"] = found.neurons == Neurons(expected.refined)
                line[f"{name}_row_ratio"] = spent["plain"].rows / spent[name].rows
        lines.append(line)
        bar.update()
        if len(lines) == arguments.prompts:
            break
    bar.close()
    if not lines:
        sys.exit(f"none of {len(prompts)} prompts has {arguments.candidates} candidates: nothing to compare")
    base, compared = meters["plain"], lines[:with_plain]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "prompts": len(lines),
        "prompts_with_the_plain_schedule": len(compared),
        **{f"{name}_rows_of_all_prompts": sum(line[f"{name}_rows"] for line in lines) for name in SIDES},
        **{f"prompts_{key}": sum(line.get(key, False) for line in lines) for key in lines[0] if "_same_" in key},
        **{
            f"{name}_{measure}": value
            for name in SIDES
            for measure, value in ratios(base, meters[name], [line[f"{name}_row_ratio"] for line in compared]).items()
        },
        "statistics_time_ratio": slow_statistics.seconds / fast_statistics.seconds,
        "threshold_pass_ratio": slow_threshold.multiplications / fast_threshold.multiplications,
        "threshold_time_ratio": slow_threshold.seconds / fast_threshold.seconds,
        **{f"{name}_seconds_per_prompt": meter.seconds / len(compared) for name, meter in meters.items()},
    }
    if arguments.json:
        print(json.dumps({**result, "lines": lines}))
        return
    for line in lines:
        print(
            "  ".join(
                f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items()
            )
        )
    print("\n| measure | value |\n| --- | ---: |")
    for key, value in result.items():
        print(f"| {key.replace('_', ' ')} | {f'{value:.2f}' if isinstance(value, float) else value} |")


def ratios(base: Meter, side: Meter, row_ratios: list[float]) -> dict[str, float]:
    return {
        "pass_ratio": base.multiplications / side.multiplications,
        "row_ratio": base.rows / side.rows,
        "row_ratio_lowest": min(row_ratios),
        "row_ratio_highest": max(row_ratios),
        "row_ratio_to_one_step": base.rows / 2 / side.rows,
        "rows_per_batch": side.rows / side.batches,
        "time_ratio": base.seconds / side.seconds,
        "processor_time_ratio": base.processor_seconds / side.processor_seconds,
    }


def batches(texts: list[str]) -> list[list[str]]:
    return [texts[i : i + 64] for i in range(0, len(texts), 64)]


def overlap(a: Neurons, b: Neurons) -> float:
    """Intersection over union."""
    either = (a | b).count
    return 1 - ((a - b).count + (b - a).count) / either if either else 1.0


if __name__ == "__main__":
    main()
