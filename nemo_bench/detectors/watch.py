"""One pass of sampling that any number of detectors watch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from nemo_bench.detectors.base import Detector, Finding, Predictions, View, now
from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion, Sampling, conditional_attention
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.errors import NotFiniteError
from nemo_bench.prompts.data import seeds_of
from nemo_bench.records.data import Prompt


@dataclass
class Cost:
    """What a detector takes for some prompts, as if it ran alone.

    Attributes:
        row_passes: UNet passes of one sample; a derivative of a pass counts as another one.
        extra_row_passes: Those among them that no detector could share.
        seconds: Its own time, that of the steps it watches by its share of their rows, and likewise, where it looks at
            images, that of decoding them.
    """

    row_passes: int = 0
    extra_row_passes: int = 0
    seconds: float = 0.0


@dataclass
class _Trail:
    """What one detector kept of each image: by prompt and seed, one entry a step; and the image."""

    steps: dict[tuple[int, int], list[dict[str, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    images: dict[tuple[int, int], Tensor] = field(default_factory=dict)


def watch(
    model: Diffusion, detectors: Mapping[str, Detector], prompts: Sequence[Prompt], batch_size: int = 32
) -> tuple[dict[str, list[Finding]], dict[str, Cost]]:
    """Samples once, as far as anyone watches, and asks every detector about every prompt.

    Starting noise is that of generated images, so these are the images of a run without mitigation. Detectors of the
    first step alone share its predictions and need no sampling.

    Args:
        model: The model, nothing blocked.
        detectors: By name.
        prompts: K prompts.
        batch_size: Images in a UNet pass at most (guidance makes two rows of each); detectors that take derivatives
            are shown fewer at a time, by :data:`nemo_bench.diffusion.GRADIENT_MEMORY`.

    Returns:
        Findings by detector, one a prompt in their order, without details where it failed; and what each detector
        takes for all of them.

    Raises:
        NemoBenchError: A detector or its settings do not suit this model, or it wants guided sampling where the model
            has none.
    """
    for detector in detectors.values():
        detector.check(type(model.pipeline).__name__, model.guidance, compiled=model.compiled)
    with torch.inference_mode(False), torch.no_grad():
        return _Watch(model, detectors, prompts, batch_size).findings()


class _Watch:
    def __init__(
        self, model: Diffusion, detectors: Mapping[str, Detector], prompts: Sequence[Prompt], batch_size: int
    ) -> None:
        self.model, self.detectors, self.prompts, self.batch_size = model, detectors, prompts, batch_size
        for detector in detectors.values():
            detector.fits(model)
        self.text = model.encode([p.text for p in prompts])
        self.lengths = [len(model.tokens(p.text)) for p in prompts]
        self.first = model.timesteps()[0]
        self.trails = {name: _Trail() for name in detectors}
        self.costs = {name: Cost() for name in detectors}

    def findings(self) -> tuple[dict[str, list[Finding]], dict[str, Cost]]:
        seeds = range(max(d.seeds for d in self.detectors.values()))
        for _, group in groupby(seeds, self._needs):
            numbers = list(group)
            images = [(p, s) for p in range(len(self.prompts)) for s in numbers]
            for first in range(0, len(images), self.batch_size):
                self._look_at(images[first : first + self.batch_size])
        found = {}
        for name in self.detectors:
            start = now(self.model)
            found[name] = [self._judge(name, place) for place in range(len(self.prompts))]
            self.costs[name].seconds += now(self.model) - start
        return found, self.costs

    def _depth(self, detector: Detector) -> int:
        return min(detector.steps or self.model.steps, self.model.steps)

    def _needs(self, seed: int) -> object:
        """Equal for seeds that go into one batch: those that the same passes serve."""
        active = {name: d for name, d in self.detectors.items() if d.seeds > seed}
        if not any(d.samples for d in active.values()):
            return tuple(active)
        attending = tuple(name for name, d in active.items() if d.attends)
        return max(map(self._depth, active.values())), any(d.images for d in active.values()), attending

    def _look_at(self, images: list[tuple[int, int]]) -> None:
        """Has the detectors watch a batch of images, each a prompt's place and a seed's number."""
        rows = {
            name: index
            for name, d in self.detectors.items()
            if (index := [i for i, (_, s) in enumerate(images) if s < d.seeds])
        }
        latents = self.model.latents([seeds_of(self.prompts[p], "generate", [s])[0] for p, s in images])
        text = self.text.rows([p for p, _ in images])
        if any(self.detectors[name].samples for name in rows):
            self._sample(images, rows, latents, text)
            return
        predictions = Predictions(self.model, latents, self.first, text)
        shared = {name: self._ask(name, images, predictions, index, 0) for name, index in rows.items()}
        self._share(predictions.seconds, predictions.passes, shared)

    def _sample(
        self, images: list[tuple[int, int]], rows: Mapping[str, list[int]], latents: Tensor, text: Conditioning
    ) -> None:
        model = self.model
        depth = {name: self._depth(self.detectors[name]) for name in rows}
        decoding = {name: len(index) for name, index in rows.items() if self.detectors[name].images}
        sampling = Sampling(model, text, latents)
        since = now(model)
        for number in range(model.steps if decoding else max(depth.values())):
            watching = {name: index for name, index in rows.items() if number < depth[name]}
            maps = self._predict(sampling, watching, len(images))
            waited = now(model) - since
            if watching:
                step = sampling.step
                predictions = Predictions(
                    model, step.latents, step.timestep, text, step.conditional, step.unconditional
                )
                shared = {
                    name: self._ask(name, images, predictions, index, number, maps) for name, index in watching.items()
                }
                self._share(waited, 2 * len(images), shared)
            maps.clear()  # the next step needs the memory
            since = now(model)
            sampling.advance()
        if decoding:
            pictures = sampling.decode().images
            self._share(now(model) - since, len(images), decoding)
            for name in decoding:
                self.trails[name].images |= {images[row]: pictures[row] for row in rows[name]}

    def _predict(self, sampling: Sampling, watching: Iterable[str], images: int) -> dict[str, Tensor]:
        """Makes the predictions of a step; returns the attention of the layers that detectors ask for."""
        asked = (self.detectors[name].layers(self.model, sampling.number) for name in watching)
        layers = tuple({layer for layers in asked for layer in layers})
        maps: dict[str, Tensor] = {}

        def keep(layer: str, logits: Tensor) -> Tensor:
            maps[layer] = conditional_attention(logits, images)
            return logits

        with self.model.edit_attention(keep, layers) if layers else nullcontext():
            sampling.predict()
        return maps

    def _ask(
        self,
        name: str,
        images: list[tuple[int, int]],
        predictions: Predictions,
        index: list[int],
        number: int,
        maps: Mapping[str, Tensor] | None = None,
    ) -> int:
        """Lets a detector look at its rows of a step, keeps what it keeps; returns the shared passes that it needs."""
        detector, cost = self.detectors[name], self.costs[name]
        start, made, known, waited = now(self.model), self.model.row_passes, predictions.passes, predictions.seconds
        view = View(predictions, index, number, [self.lengths[p] for p, _ in images], maps, [s for _, s in images])
        size = max(1, self.batch_size // GRADIENT_MEMORY) if detector.derives else len(index)
        used = 0
        for part in view.split(size):
            kept = detector.observe(part)
            used += part.used
            for place, row in enumerate(part.index):
                self.trails[name].steps[images[row]].append({key: values[place] for key, values in kept.items()})
        # Whoever asks first has a shared prediction made; its passes and its time are everybody's.
        extra = self.model.row_passes - made - (predictions.passes - known)
        # Alone, a detector that samples would take both halves whether or not it looks at them.
        passes = 2 * len(index) if detector.samples else used
        cost.row_passes += passes + extra
        cost.extra_row_passes += extra
        cost.seconds += now(self.model) - start - (predictions.seconds - waited)
        return passes

    def _share(self, seconds: float, rows: int, taken: Mapping[str, int]) -> None:
        """Charges detectors for what took some time, by how many of its rows they need."""
        for name, count in taken.items():
            self.costs[name].seconds += seconds * count / max(rows, 1)

    def _judge(self, name: str, place: int) -> Finding:
        detector, trail, prompt = self.detectors[name], self.trails[name], self.prompts[place]
        keys = [(place, seed) for seed in range(detector.seeds)]
        seen = [
            {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
            for steps in zip(*(trail.steps[key] for key in keys), strict=True)
        ]
        images = torch.stack([trail.images[key] for key in keys]) if detector.images else None
        try:
            if images is not None:
                require_finite("images", images)
            found = detector.judge(self.model, prompt, seen, images)
        except NotFiniteError as error:
            return Finding(math.nan, failed=str(error))
        if not math.isfinite(found.score):
            return Finding(found.score, failed=f"the score is {found.score}, in {self.model.dtype}")
        return found
