"""Many searches for one picture: how far apart they end, what that activates, and which weights it depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.localization.calibration import activations
from nemo_bench.methods.wanda import Wanda, feed_forward_layers
from nemo_bench.records.io import batched
from nemo_bench.records.schema import Agreement, Diagnosis, Spread

COLUMNS = 1 << 20
"""Weights of a layer whose overlaps are counted at once."""


def diagnose(
    model: Diffusion,
    found: Conditioning,
    starts: Conditioning,
    memorized: Sequence[str],
    general: Sequence[str],
    *,
    seed: int,
    wanda: Wanda,
) -> Diagnosis:
    """Compares what searches found for one picture, under whatever is applied to the network (Kowalczuk et al. 2026).

    - ``spread``: distances of the embeddings, beside those of the starts and of general prompts.
    - ``activations``: distances of what they activate, beside those of other memorized prompts: value neurons, means
      over tokens, and outputs of the blocks of the UNet at the noisiest step, from noise that all share.
    - ``agreement``: how far the weights agree that Wanda would prune for each embedding alone.

    The authors' code could not be read, and notes on the paper do not say which activations it takes and how they are
    normalized: all of this is our reading. Wanda stands for both localizers of the paper.

    Args:
        model: A model with a UNet.
        found: What the searches ended with, S rows.
        starts: What they started from, likewise.
        memorized: Memorized prompts.
        general: Other prompts.
        seed: Of the noise.
        wanda: Says which weights are chosen.
    """
    own, others = (_activated(model, text, seed, wanda.batch_size) for text in (found, _encoded(model, memorized)))
    groups = {"found": found, "starts": starts, "general": _encoded(model, general)}
    return Diagnosis(
        spread={name: spread(text) for name, text in groups.items() if len(text) > 1},
        activations={
            name: {
                group: discrepancy(values[name])
                for group, values in (("found", own), ("memorized", others))
                if len(values[name]) > 1
            }
            for name in own
        },
        agreement={name: agreement(chosen) for name, chosen in _chosen(model, found, wanda)},
    )


def spread(text: Conditioning) -> Spread:
    """Distances of all pairs of N embeddings, flattened, N at least 2."""
    parts = [text.text.flatten(1), *([] if text.pooled is None else [text.pooled])]
    values = torch.cat(parts, 1).float().cpu()
    distances = torch.pdist(values)
    low, median, high = torch.quantile(distances, torch.tensor([0.25, 0.5, 0.75])).tolist()
    unit = nn.functional.normalize(values, dim=1)
    rows, columns = torch.triu_indices(len(values), len(values), 1)
    return Spread(
        embeddings=len(values), mean=float(distances.mean()), low=low, median=median, high=high,
        cosine=float((unit @ unit.T)[rows, columns].mean()),
    )  # fmt: skip


def discrepancy(values: Tensor) -> float:
    """Mean distance of all pairs of N activations, (N, ...), divided by their mean norm."""
    flat = values.flatten(1).float().cpu()
    return float(torch.pdist(flat).mean() / flat.norm(dim=1).mean().clamp(min=torch.finfo(torch.float32).tiny))


def agreement(chosen: Tensor) -> Agreement:
    """Mean intersection over union of all pairs of N sets, booleans (N, elements); of two empty sets it is 1."""
    count, size = chosen.shape
    common = sum((part.float() @ part.float().T for part in chosen.split(COLUMNS, 1)), torch.zeros(count, count))
    sizes = common.diagonal()
    union = sizes[:, None] + sizes - common
    overlap = torch.where(union > 0, common / union.clamp(min=1), torch.ones(()))
    rows, columns = torch.triu_indices(count, count, 1)
    share = float(sizes.mean()) / size
    return Agreement(
        iou=float(overlap[rows, columns].mean()),
        random=share / (2 - share) if share else 1.0,
        share=share,
        empty=int((union[rows, columns] == 0).sum()),
    )


def _encoded(model: Diffusion, texts: Sequence[str]) -> Conditioning:
    return model.encode(texts) if texts else model.unconditional(0)


@torch.no_grad()
def _activated(model: Diffusion, text: Conditioning, seed: int, batch_size: int) -> dict[str, Tensor]:
    """Activations of value neurons by layer, then outputs of blocks, on the CPU."""
    if not len(text):
        return dict.fromkeys([*model.value_layers, *_blocks(model)], torch.empty(0, 1))
    values = {name: layer.cpu() for name, layer in activations(model, text).items()}
    outputs: dict[str, list[Tensor]] = {name: [] for name in _blocks(model)}
    with _watched(_blocks(model), outputs):
        for rows in batched(range(len(text)), max(1, batch_size)):
            noise = model.latents([seed] * len(rows))
            model.predict_output(noise, model.timestep(), text.rows(rows).to(model.dtype))
    return {**values, **{name: torch.cat(parts) for name, parts in outputs.items()}}


def _blocks(model: Diffusion) -> dict[str, nn.Module]:
    """Blocks of the UNet by module path."""
    unet = model.unet
    sides = [(side, getattr(unet, side)) for side in ("down_blocks", "up_blocks")]
    blocks = {f"{side}.{number}": block for side, each in sides for number, block in enumerate(each)}
    return blocks if unet.mid_block is None else {**blocks, "mid_block": unet.mid_block}


@contextmanager
def _watched(blocks: Mapping[str, nn.Module], outputs: Mapping[str, list[Tensor]]) -> Iterator[None]:
    def keep(name: str, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # blocks on the way down give skips as well
        outputs[name].append(hidden.float().cpu())

    hooks = [
        block.register_forward_hook(lambda _m, _a, output, name=name: keep(name, output))
        for name, block in blocks.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _chosen(model: Diffusion, text: Conditioning, wanda: Wanda) -> Iterator[tuple[str, Tensor]]:
    """By layer, the weights that Wanda chooses for each row, (N, weights)."""
    layers = feed_forward_layers(model)
    empty = wanda.input_squares(model, layers, model.encode([""]))
    each = [wanda.input_squares(model, layers, text.rows([row])) for row in range(len(text))]
    for name, layer in layers.items():
        sets = [wanda.choose(layer.weight, squares[name], empty[name]).flatten().cpu() for squares in each]
        yield name, torch.stack(sets)
