"""Search for embeddings that bring pictures back, under whatever a method does to the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Adam

from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.methods.descent import check_precision, descend

STEPS, RATE, SAMPLES = 50, 0.1, 8
"""Steps of Adam, its rate, and noisy pictures a step, of Kowalczuk et al. (2025)."""
UNCHANGED = "neurons and weights stay as they are; an audit asks whether a changed network still holds what it held"
"""Why most methods can't be audited."""


@dataclass(frozen=True)
class Found:
    """Where a search ended."""

    text: Conditioning  #: What was found, float32, N rows.
    losses: Tensor  #: Training loss of each row before each step, (N, steps).


def search_embeddings(
    model: Diffusion,
    method: Method,
    batch: Batch,
    pictures: Tensor,
    *,
    steps: int = STEPS,
    rate: float = RATE,
    samples: int = SAMPLES,
) -> Found:
    """Searches for embeddings under which the network denoises given pictures well.

    Each row follows the gradient of the training loss of its own picture by Adam, at noise and timesteps that are drawn
    anew in each step, all timesteps alike, while the method is applied (DoRI: Kowalczuk et al. 2025, arXiv:2507.16880,
    whose code was not to be had; this follows a description of it, and where the network predicts velocity its own
    training loss takes the place of that of noise). All of the embedding is free, the pooled one too, but for padding
    that the network does not see and the zeros that widen CLIP's states in Stable Diffusion 3.

    A row of the batch is a search: prompt and neurons for the method, the embedding to start from, and the seed of all
    that is drawn. Rows have nothing to do with one another. A pass takes ``method.batch_size`` noisy pictures at most,
    divided by :data:`nemo_bench.diffusion.GRADIENT_MEMORY`. Pictures are clean latents, float32, (N, channels, height,
    width); ``samples`` is the number of noisy ones a step and row.

    Raises:
        ConfigError: The method changes something else than the network, or a number is out of range.
        ModelError: The model is in half precision, or predicts neither noise nor velocity.
    """
    if not method.auditable:
        raise ConfigError(f"{method.title} can't be audited: {UNCHANGED}")
    if not (steps >= 1 and 0 < rate < math.inf and samples >= 1):
        msg = f"given steps={steps}, rate={rate}, samples={samples}"
        raise ConfigError(f"a search needs at least 1 step and 1 sample and a rate above 0, {msg}")
    check_precision("a search", model.dtype)
    # Rows are copied, since what was made in inference mode takes no part in gradients.
    with torch.inference_mode(False):
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        owner = [row for row in range(len(generators)) for _ in range(samples)]
        size = max(1, method.batch_size // GRADIENT_MEMORY)
        losses: list[Tensor] = []
        free = _free(model, batch.text)

        def loss(rows: Sequence[int], values: Tensor) -> Tensor:
            timesteps, noise = _draw(generators, samples, model)
            leaf, gradient, each = values.detach().requires_grad_(), torch.zeros_like(values), []
            for first in range(0, len(owner), size):
                part, drawn = owner[first : first + size], slice(first, first + size)
                text = _unpacked(leaf, batch.text).rows(part).to(model.dtype)
                with method.apply(model, batch.rows(part)):
                    found = (
                        model.training_losses(pictures.float()[part], timesteps[drawn], noise[drawn], text) / samples
                    )
                    gradient += torch.autograd.grad(found.sum(), leaf)[0]
                each.append(found.detach())
            total = torch.cat(each).view(len(rows), samples).sum(1)
            losses.append(total.cpu())
            # Its value and its gradient, without what every part would keep for it.
            return (total + ((values - values.detach()) * gradient * free).sum(1))[:, None]

        # No loss is low enough, so all rows take all steps.
        end = descend(_packed(batch.text), loss, target=-math.inf, steps=steps, rate=rate, optimizer=Adam)
        return Found(_unpacked(end.values, batch.text), torch.stack(losses, 1))


def random_embeddings(model: Diffusion, like: Conditioning, seeds: Sequence[int]) -> Conditioning:
    """Standard normal embeddings of the form of N others, one a seed: one of the starts of Kowalczuk et al. (2025)."""
    packed = _packed(like)
    rows = [torch.randn(packed.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return _unpacked(torch.where(_free(model, like), torch.stack(rows).to(model.device), packed), like)


def _draw(generators: Sequence[torch.Generator], samples: int, model: Diffusion) -> tuple[Tensor, Tensor]:
    """Timesteps and noise of all rows, each from a CPU generator of its own."""
    last = model.training_timesteps
    drawn = [
        (torch.randint(last, (samples,), generator=g), torch.randn((samples, *model.latent_shape), generator=g))
        for g in generators
    ]
    timesteps, noise = (torch.cat(parts).to(model.device) for parts in zip(*drawn, strict=True))
    return timesteps, noise


def _free(model: Diffusion, text: Conditioning) -> Tensor:
    """Which of the numbers of :func:`_packed` are searched, boolean, (N, numbers)."""
    pooled = None if text.pooled is None else torch.ones_like(text.pooled)
    return _packed(replace(text, text=model.family.used(text), pooled=pooled)).bool()


def _packed(text: Conditioning) -> Tensor:
    """All that is searched, a row each, (N, numbers)."""
    parts = [text.text.flatten(1), *([] if text.pooled is None else [text.pooled])]
    return torch.cat(parts, 1).float()


def _unpacked(values: Tensor, like: Conditioning) -> Conditioning:
    """Undoes :func:`_packed`."""
    shape = like.text.shape[1:]
    size = shape.numel()
    pooled = None if like.pooled is None else values[:, size:]
    return replace(like, text=values[:, :size].unflatten(1, shape), pooled=pooled)
