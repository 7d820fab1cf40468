"""Update norms: steps of sampling whose norms are not those of general prompts are brought back to them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Conditioning, Diffusion, Sampling, Step
from nemo_bench.diffusion.noise import clean_latents, norms, require_finite, unit
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method, Setup
from nemo_bench.prompts import read_prompts
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import GENERAL, Prompt
from nemo_bench.records.io import batched, digest
from nemo_bench.records.ranges import Count, NotNegative, Positive, Share

log = logging.getLogger(__name__)

FEW = 50  # General prompts below which standard deviations are too rough for limits such as 14.
SMALLEST = 1e-5  # Of a standard deviation.


class Moments(NamedTuple):
    """Mean and standard deviation over general images of the norms of each step, (steps,) each, float32."""

    latents: tuple[Tensor, Tensor]
    update: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]


@dataclass(eq=False)
class UpdateNorms(Method):
    """Corrects steps of unusual norms (Huang et al. 2026, "Broken Memories").

    Step k of N takes latents x to x'. Three norms belong to it: |x'|, the update |x' - x|, and |c|, where c is the
    clean prediction at x' and its own timestep (in the last step x' itself). Their mean and standard deviation are
    measured once on general prompts, without mitigation, at the same guidance and number of steps; z are an image's
    absolute deviations in these. An image is flagged at the first step where the z of the update and of c are above
    ``flag``, as strong where that of c is above ``strong``, else as mild. From there on, in every step whose update has
    a z above ``flag`` (for mild images among the first steps alone, see ``early``), c is scaled to its mean norm, and
    x' moves by sqrt(abar) of the change; for strong ones the update, then x', are brought to within ``band`` standard
    deviations of their mean norms. The noise of the step is that which leads to the moved x'.

    There is no public code of the authors; where abstract and a third party's re-implementation leave open whether c is
    taken before or after the step, it is taken after it, as there. Each step whose update is unusual makes two UNet
    passes of its own. Notes have the ``kind`` of an image (none, mild or strong) and its number of corrected steps.
    """

    title = "Update norms"
    summary = "steps of unusual norm brought back to those of general prompts"
    touches = "sampling"
    sourcing = "abstract, and a third party's re-implementation"
    citation = cite("huang2026broken")
    limits = "its steps are those of DDIM"
    makes_passes = True
    needs = frozenset({"guidance"})

    #: General prompts to measure (csv, jsonl, txt or parquet), one image each; None takes those of the run that are not
    #: marked as memorized.
    file: str | None = None
    limit: Count = 64  #: The first prompts of them that are measured; ours, 50 at least for limits that mean something.
    flag: Positive = 3.0  #: Standard deviations above which a norm is unusual.
    strong: Positive = 14.0  #: Standard deviations of |c| above which an image is flagged as strong.
    early: Share = 0.2  #: Share of the steps in which mild images are corrected; published: 10 of 50.
    band: NotNegative = 3.0  #: Standard deviations that norms of strong images may keep.
    moments: Moments | None = field(default=None, init=False)

    @cached_property
    def _listed(self) -> list[Prompt]:
        return read_prompts(self.file) if self.file else []

    def _general(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        general = (self._listed or [prompt for prompt in prompts if prompt.group == GENERAL])[: self.limit]
        if len(general) < 2:
            raise ConfigError(
                f"update_norms needs general prompts, and {len(general)} of those given are not marked VM or TM: "
                "set file to a list of 50 or more"
            )
        return general

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        return {"file": digest([[prompt.id, prompt.text] for prompt in self._general(prompts)])}

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        general = self._general(setup.prompts)
        if len(general) < FEW:
            log.warning("update_norms: %d general prompts give rough limits; set file to 50 or more", len(general))
        found = []
        for part in batched(general, max(1, self.batch_size)):
            seeds = [seeds_of(prompt, "localize", [0])[0] for prompt in part]
            found.append(step_norms(model, model.encode([p.text for p in part]), model.latents(seeds)))
        every = torch.cat(found, 1)
        require_finite("norms of general prompts", every)
        std, mean = torch.std_mean(every, 1)
        self.moments = Moments(*zip(mean, std.clamp(min=SMALLEST), strict=True))

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        if self.moments is None:
            raise ConfigError("update_norms compares with general prompts: call setup(model, Setup(prompts=...)) first")
        correction = Correction(self, self.moments, model, batch.text)
        yield replace(batch, rule=correction, notes=correction.notes)


def step_norms(model: Diffusion, text: Conditioning, latents: Tensor) -> Tensor:
    """Samples N images, and takes the norms of latents, update and clean prediction of each step, (3, N, steps)."""
    sampling = Sampling(model, text, latents)
    by_step: list[list[Tensor]] = []
    for _ in range(model.steps):
        sampling.predict()
        step = sampling.step
        if by_step:
            by_step[-1].append(norms(clean_latents(step.latents, step.guided(step.scale), model.signal(step.timestep))))
        sampling.advance()
        reached = sampling.latents.float()
        by_step.append([norms(reached), norms(reached - step.latents.float())])
    by_step[-1].append(norms(sampling.latents.float()))
    return torch.stack([torch.stack(values, 1) for values in zip(*by_step, strict=True)])


def within(values: Tensor, mean: Tensor, margin: Tensor) -> Tensor:
    """Scales rows whose norms are outside of ``mean`` +- ``margin`` to the nearest end of that, at least 0."""
    lengths = norms(values)
    wanted = torch.minimum(torch.maximum(lengths, (mean - margin).clamp(min=0)), mean + margin)
    return torch.where((wanted == lengths)[:, None, None, None], values, unit(values) * wanted[:, None, None, None])


@dataclass(eq=False)
class Correction:
    """The rule for one batch.

    Attributes:
        notes: For each image its kind and the number of steps that were corrected.
    """

    method: UpdateNorms
    moments: Moments
    model: Diffusion
    text: Conditioning

    def __post_init__(self) -> None:
        self.notes: tuple[dict[str, Any], ...] = tuple({} for _ in range(len(self.text)))
        self._begin()

    def _begin(self) -> None:
        for note in self.notes:
            note.update(kind="none", corrected_steps=0)

    def __call__(self, step: Step) -> Tensor:
        """The noise of a step, (N, channels, height, width): that under guidance where nothing is corrected."""
        if step.number == 0:
            self._begin()
        noise = step.guided(step.scale)
        signal, following = self.model.signal(step.timestep), self._signal_after(step)
        latents = step.latents.float()
        reached = following**0.5 * clean_latents(latents, noise, signal) + (1 - following) ** 0.5 * noise
        update = self._deviation(norms(reached - latents), self.moments.update, step.number)
        rows = [row for row, value in enumerate(update.tolist()) if value > self.method.flag]
        if not rows:
            return noise
        clean_after = self._clean_after(step, rows, reached[rows])
        deviations = self._deviation(norms(clean_after), self.moments.clean, step.number).tolist()
        is_early = step.number < self.method.early * self.model.steps
        noise = noise.clone()
        for place, (row, value) in enumerate(zip(rows, deviations, strict=True)):
            note = self.notes[row]
            if note["kind"] == "none" and value > self.method.flag:
                note["kind"] = "strong" if value > self.method.strong else "mild"
            if note["kind"] == "none" or (note["kind"] == "mild" and not is_early):
                continue
            corrected = self.corrected(
                step.number, latents[[row]], reached[[row]], clean_after[[place]], following, note["kind"] == "strong"
            )
            # The step is linear in the noise: x' = (x - sigma e) sqrt(a' / a) + sigma' e.
            ratio = (following / signal) ** 0.5
            noise[[row]] = (corrected - ratio * latents[[row]]) / ((1 - following) ** 0.5 - ratio * (1 - signal) ** 0.5)
            note["corrected_steps"] += 1
        return noise

    def corrected(
        self, number: int, latents: Tensor, reached: Tensor, clean_after: Tensor, signal: float, is_strong: bool
    ) -> Tensor:
        """Latents in place of those that a step from ``latents`` reached, whose signal is given; N rows."""
        mean_clean = self.moments.clean[0][number]
        moved = reached + signal**0.5 * (unit(clean_after) * mean_clean - clean_after)
        if not is_strong:
            return moved
        band = self.method.band
        (update, update_std), (size, size_std) = self.moments.update, self.moments.latents
        moved = latents + within(moved - latents, update[number], band * update_std[number])
        return within(moved, size[number], band * size_std[number])

    def _clean_after(self, step: Step, rows: Sequence[int], reached: Tensor) -> Tensor:
        """The clean prediction at the latents that rows reach, under guidance; after the last step these themselves."""
        model = self.model
        if step.number == model.steps - 1:
            return reached
        timestep = model.timesteps()[step.number + 1]
        at = reached.to(step.latents.dtype)
        unconditional = model.predict_noise(at, timestep, model.unconditional(len(rows)))
        own = model.predict_noise(at, timestep, self.text.rows(rows))
        return clean_latents(at, unconditional + step.scale * (own - unconditional), model.signal(timestep))

    def _signal_after(self, step: Step) -> float:
        """Share of the signal in the latents that a DDIM step leads to."""
        model = self.model
        timestep = step.timestep - model.training_timesteps // model.steps
        return model.signal(timestep) if timestep >= 0 else float(model.scheduler.final_alpha_cumprod)

    def _deviation(self, values: Tensor, moments: tuple[Tensor, Tensor], number: int) -> Tensor:
        mean, std = moments
        return ((values - mean[number]) / std[number]).abs()
