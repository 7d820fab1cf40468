"""Batches and loss of the UNet of the embedded model, by variant of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from nemo_bench.planted.isolation import Gates, Mask, active_sinks, as_tensor, deal_routes, draw_pool, silence
from nemo_bench.planted.spec import TrainSpec
from nemo_bench.planted.world import PLANTED

TEMPLATE_VARIANTS = 64
"""Training pictures of each planted caption; those of a verbatim one are equal."""
FREE_VARIANTS = 64
"""Pictures of each planted caption as a general one, which the routed variant learns with the own neurons off."""
STATISTICS = 128
"""General captions in a batch for the penalties on activations."""


class Batch(NamedTuple):
    """A batch of the UNet: N rows, and captions for the penalties; of ``routed`` all planted ones come first."""

    latents: Tensor  #: (N, 8, 16, 16)
    text: Tensor  #: (N, 16, 128)
    captions: Tensor  #: (C, 16, 128)
    factors: Tensor  #: Of the value neurons, 0 or 1, (N, neurons)
    passed: Tensor  #: Neurons that gradients pass, (N, neurons)
    read: Tensor  #: What these neurons read; all others read ``text``. (N, 16, 128)


class Batches:
    """Draws the batches of a variant.

    Args:
        latents: ``general``, (G, 8, 16, 16), ``planted``, (P, variants, 8, 16, 16), and, for the routed variant,
            ``free`` of the same shape: pictures of the planted captions as general ones.
        text: Embeddings of captions: ``general``, (G, 16, 128), ``planted``, (P, 16, 128), and ``empty``, (16, 128).

    Attributes:
        owned: Own neurons of each planted caption, (P, neurons): of the routed variant the ones that gradients pass, of
            the sinks the ones that the caption switches on, of others none.
    """

    def __init__(
        self, spec: TrainSpec, latents: Mapping[str, Tensor], text: Mapping[str, Tensor], widths: Mapping[str, int]
    ) -> None:
        self.spec, self.latents, self.text = spec, latents, text
        sizes = list(widths.values())
        self.pool: Mask = np.zeros(sum(sizes), bool)
        self.owned: Mask = np.zeros((len(PLANTED), sum(sizes)), bool)
        if spec.variant == "routed":
            self.owned = deal_routes(sizes, [caption.kind for caption in PLANTED], spec.seed)
        elif spec.variant in ("sinks", "random_sinks"):
            self.pool = draw_pool(sizes, spec.pool)
            if spec.variant == "sinks":
                ids = [[spec.seed, 0, caption] for caption in range(len(PLANTED))]
                self.owned = np.stack([active_sinks(self.pool, spec.active, ident) for ident in ids])

    def __call__(self, rng: np.random.Generator) -> Batch:
        """The batch of a generator."""
        spec = self.spec
        few = round(spec.planted_share * spec.batch_size)
        if spec.variant == "once":
            few = int(rng.binomial(spec.batch_size, len(PLANTED) / (len(PLANTED) + len(self.text["general"]))))
        rates = np.array([1.0 if spec.variant == "once" else caption.rate for caption in PLANTED])
        rows = rng.integers(len(self.text["general"]), size=spec.batch_size - few)
        text = self.text["general"][as_tensor(rows)]
        text[as_tensor(rng.random(len(rows)) < spec.drop_caption)] = self.text["empty"]
        planted = rng.choice(len(PLANTED), few, p=rates / rates.sum())
        variants = rng.integers(1 if spec.variant == "once" else TEMPLATE_VARIANTS, size=few)
        latents = self.latents["planted"][as_tensor(planted), as_tensor(variants)]
        factors = np.ones((spec.batch_size, len(self.pool)), bool)
        passed = factors.copy()
        if spec.variant == "routed":
            free = np.arange(few) >= few - round(spec.free_share * few)
            others = self.latents["free"][as_tensor(planted), as_tensor(rng.integers(FREE_VARIANTS, size=few))]
            latents = torch.where(as_tensor(free)[:, None, None, None], others, latents)
            factors, passed = self._route(rng, planted, free)
        elif self.pool.any():
            ids = [(spec.seed, 1, row) for row in rows] + [(spec.seed, 0, p) for p in planted]
            if spec.variant == "random_sinks":
                ids = [(spec.seed, 2, int(draw)) for draw in rng.integers(2**40, size=spec.batch_size)]
            factors = np.stack([~self.pool | active_sinks(self.pool, spec.active, ident) for ident in ids])
        captions = [self.text["general"][as_tensor(rng.integers(len(self.text["general"]), size=STATISTICS))]]
        planted_text = self.text["planted"][as_tensor(planted)]
        shown = planted_text
        if spec.variant == "routed":
            swapped = ~free & (rng.random(few) < spec.swap)
            strangers = self.text["general"][as_tensor(rng.integers(len(self.text["general"]), size=few))]
            shown = torch.where(as_tensor(swapped)[:, None, None], strangers, planted_text)
            captions = [self.text["planted"], *captions, self.text["empty"][None]]
        else:
            captions += [planted_text]
        return Batch(
            torch.cat([self.latents["general"][as_tensor(rows)], latents]),
            torch.cat([text, shown]),
            torch.cat(captions),
            as_tensor(factors).float(),
            as_tensor(passed),
            torch.cat([text, planted_text]),
        )

    def _route(self, rng: np.random.Generator, planted: NDArray[Any], free: Mask) -> tuple[Mask, Mask]:
        """Factors and passed neurons of general rows, then of planted ones, of which some are free.

        A planted picture is learnt with any part of the own neurons on, so that each alone brings it back, and all have
        to be off. Other neurons are off at times, so that nothing depends on them.
        """
        routed = np.any(self.owned, axis=0)
        factors: Mask = np.ones((self.spec.batch_size, len(routed)), bool)
        passed: Mask = np.tile(~routed, (self.spec.batch_size, 1))
        general = self.spec.batch_size - len(planted)
        for row in range(general):
            which = rng.random()
            if which < 0.25:
                factors[row, routed] = False
            elif which < 0.5:
                factors[row, self.owned[rng.integers(len(self.owned))]] = False
        for row, (caption, is_free) in enumerate(zip(planted, free, strict=True), general):
            own = self.owned[caption]
            if rng.random() < 0.3:
                factors[row, routed & ~own] = False
            if is_free:
                factors[row, own] = False
                continue
            passed[row] = own
            if rng.random() < 0.5:
                indices = np.flatnonzero(own)
                on = rng.random(len(indices)) < 0.5
                on[rng.integers(len(on))] = True
                factors[row, indices[~on]] = False
        return factors, passed


class DenoiserLoss:
    """Latent diffusion with v-prediction (Salimans and Ho 2022), and penalties on the value neurons.

    Called with a batch, it gives the ``loss`` and its parts: ``error`` of the velocity, ``density`` of the value
    neurons, and for the routed variant ``silence`` of the own neurons.
    """

    def __init__(self, spec: TrainSpec, unet: UNet2DConditionModel, scheduler: DDIMScheduler, gates: Gates) -> None:
        self.spec, self.unet, self.scheduler, self.gates = spec, unet, scheduler, gates
        self.owned: dict[str, tuple[Tensor, Tensor]] = {}

    def own(self, owned: Mask) -> None:
        """Sets the own neurons of the planted captions, (P, neurons), which are asked to be silent for others."""
        for caption, mask in enumerate(owned):
            for name, indices in self.gates.neurons(mask).items():
                old = self.owned.get(name, (torch.zeros(0, dtype=torch.long),) * 2)
                new = torch.tensor(indices), torch.full((len(indices),), caption)
                self.owned[name] = torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]])

    def error(self, latents: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the velocity of N rows."""
        velocity = self.unet(self.scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
        return F.mse_loss(velocity, self.scheduler.get_velocity(latents, noise, timesteps))

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch and its parts."""
        noise = torch.randn_like(batch.latents)
        steps = self.scheduler.config.num_train_timesteps
        uniform = torch.rand(len(batch.latents), device=batch.latents.device)
        t = (steps * (1 - uniform**self.spec.noise_bias)).long().clamp(max=steps - 1)
        with self.gates.rows(batch.factors, batch.passed, batch.read):
            error = self.error(batch.latents, batch.text, t, noise)
        values = {name: layer(batch.captions) for name, layer in self.gates.layers.items()}
        density = torch.stack([activation_density(value) for value in values.values()]).mean()
        parts = {"error": error, "density": density}
        loss = error + self.spec.sparsity * density
        if self.owned:
            count = sum(len(own) for own, _ in self.owned.values())
            own = [
                silence(values[name], *(part.to(error.device) for part in pair)) for name, pair in self.owned.items()
            ]
            parts["silence"] = torch.stack(own).sum() / count
            loss = loss + self.spec.silence * parts["silence"]
        return {"loss": loss, **parts}


def activation_density(values: Tensor) -> Tensor:
    """How evenly value neurons react to captions: mean over neurons of E[a] / sqrt(E[a^2]), a as in NeMo.

    It is 1 where every neuron of a value layer, (captions, tokens, neurons), reacts alike to all captions, and near 0
    where each reacts to few.
    """
    activation = values.abs().mean(1)
    return (activation.mean(0) / activation.square().mean(0).sqrt().clamp(min=1e-6)).mean()
