"""One pass of sampling that several detectors observe."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from nemo_bench.detectors.base import Detector, DetectorScore, View, now
from nemo_bench.diffusion import GRADIENT_MEMORY, Diffusion, Sampling, conditional_attention
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.errors import NotFiniteError
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched

_Image = tuple[int, int]  # An image to sample: its prompt, by position, and its seed index.


class Watcher:
    """A detector with the values that it observed of each image, and its cost, as if it ran alone.

    A derivative of a pass counts as another pass; ``extra_row_passes`` can't be shared with others; ``seconds`` has its
    own time and its share, by rows, of the steps it observes and of decoding images it needs.
    """

    def __init__(self, detector: Detector, model: Diffusion) -> None:
        self.detector = detector
        self.steps = min(detector.steps or model.steps, model.steps)
        self.row_passes = 0
        self.extra_row_passes = 0
        self.seconds = 0.0
        self.observed: dict[_Image, list[dict[str, Tensor]]] = defaultdict(list)
        self.pictures: dict[_Image, Tensor] = {}

    def rows(self, batch: Sequence[_Image]) -> list[int]:
        """Positions of the images whose seeds the detector takes."""
        return [row for row, (_, seed) in enumerate(batch) if seed < self.detector.seeds]

    def observe(self, batch: Sequence[_Image], view: View, batch_size: int) -> int:
        """Observes one step of a batch, and returns how many rows of the shared predictions it needs."""
        model, rows = view.model, self.rows(batch)
        size = max(1, batch_size // GRADIENT_MEMORY) if self.detector.derives else len(rows)
        start, passes_before = now(model), model.row_passes
        shared_before, seconds_before = view.passes, view.seconds
        needed = 0
        for index in batched(rows, size):
            part = view.rows(index)
            values = self.detector.observe(part)
            needed += part.passes
            for place, row in enumerate(index):
                self.observed[batch[row]].append({name: value[place] for name, value in values.items()})
        # The detector that reads a shared prediction first has it made; all that read it bear its cost.
        extra = model.row_passes - passes_before - (view.passes - shared_before)
        if self.detector.samples:
            # Alone it would sample with both halves, whether it reads them or not.
            needed = 2 * len(rows)
        self.row_passes += needed + extra
        self.extra_row_passes += extra
        self.seconds += now(model) - start - (view.seconds - seconds_before)
        return needed

    def score(self, model: Diffusion, prompt: Prompt, position: int) -> DetectorScore:
        """The score of a prompt; it says why where it is not finite."""
        start = now(model)
        images = [(position, seed) for seed in range(self.detector.seeds)]
        observed = [
            {name: torch.stack([values[name] for values in step]) for name in step[0]}
            for step in zip(*(self.observed[image] for image in images), strict=True)
        ]
        pictures = torch.stack([self.pictures[image] for image in images]) if self.detector.images else None
        try:
            if pictures is not None:
                require_finite("images", pictures)
            result = self.detector.score(model, prompt, observed, pictures)
        except NotFiniteError as error:
            result = DetectorScore(math.nan, failed=str(error))
        self.seconds += now(model) - start
        if not math.isfinite(result.score) and not result.failed:
            return DetectorScore(result.score, failed=f"the score is {result.score}, in {model.dtype}")
        return result


def watch(
    model: Diffusion, detectors: Mapping[str, Detector], prompts: Sequence[Prompt], batch_size: int = 32
) -> tuple[dict[str, list[DetectorScore]], dict[str, Watcher]]:
    """Samples once, up to the last step that a detector needs, and scores every prompt with every detector.

    Starting noise is that of generated images, so these are the images of a run without mitigation. Detectors of the
    first step alone share its predictions and need no sampling.

    Args:
        model: The model, without blocked neurons.
        detectors: By name.
        prompts: K prompts.
        batch_size: Images in a UNet pass at most (guidance makes two rows of each); fewer for detectors that take
            derivatives, by :data:`nemo_bench.diffusion.GRADIENT_MEMORY`.

    Returns:
        K scores by detector, in the order of the prompts, without details where one failed; and the watcher of each
        detector, which has its cost for all of them.

    Raises:
        NemoBenchError: A detector or its settings do not suit this model, or it needs guided sampling where the model
            has none.
    """
    for detector in detectors.values():
        detector.check(type(model.pipeline).__name__, model.guidance, compiled=model.compiled)
        detector.check_model(model)
    watchers = {name: Watcher(detector, model) for name, detector in detectors.items()}
    with torch.inference_mode(False), torch.no_grad():
        text = model.encode([prompt.text for prompt in prompts])
        lengths = [len(model.tokens(prompt.text)) for prompt in prompts]
        for batch in _batches([*watchers.values()], len(prompts), batch_size):
            start = View(
                model=model,
                text=text.rows([prompt for prompt, _ in batch]),
                latents=model.latents([seeds_of(prompts[prompt], "generate", [seed])[0] for prompt, seed in batch]),
                timestep=model.timesteps()[0],
                seeds=[seed for _, seed in batch],
                lengths=[lengths[prompt] for prompt, _ in batch],
            )
            active = [watcher for watcher in watchers.values() if watcher.rows(batch)]
            if any(watcher.detector.samples for watcher in active):
                _sample(active, batch, start, batch_size)
            else:
                _observe(active, batch, start, batch_size)
        scores = {
            name: [watcher.score(model, prompt, position) for position, prompt in enumerate(prompts)]
            for name, watcher in watchers.items()
        }
    return scores, watchers


def _batches(watchers: Sequence[Watcher], prompts: int, batch_size: int) -> Iterator[Sequence[_Image]]:
    """Batches of images; seeds go into one batch where the same passes serve them."""
    seeds = range(max(watcher.detector.seeds for watcher in watchers))
    for _, group in groupby(seeds, partial(_passes, watchers)):
        group_seeds = [*group]
        images = [(prompt, seed) for prompt in range(prompts) for seed in group_seeds]
        yield from batched(images, batch_size)


def _passes(watchers: Sequence[Watcher], seed: int) -> tuple[object, ...]:
    """Equal for seeds that the same passes serve."""
    active = [watcher for watcher in watchers if watcher.detector.seeds > seed]
    if not any(watcher.detector.samples for watcher in active):
        return tuple(active)
    steps = max(watcher.steps for watcher in active)
    decodes = any(watcher.detector.images for watcher in active)
    return (steps, decodes, *(watcher for watcher in active if watcher.detector.attends))


def _sample(watchers: Sequence[Watcher], batch: Sequence[_Image], start: View, batch_size: int) -> None:
    """Samples a batch as far as its detectors need, and has them observe each step."""
    model = start.model
    of_images = [watcher for watcher in watchers if watcher.detector.images]
    sampling = Sampling(model, start.text, start.latents)
    begun = now(model)
    for number in range(model.steps if of_images else max(watcher.steps for watcher in watchers)):
        observing = [watcher for watcher in watchers if number < watcher.steps]
        maps = _predict(sampling, observing, len(batch))
        seconds = now(model) - begun
        step = sampling.step
        view = replace(
            start,
            latents=step.latents,
            timestep=step.timestep,
            number=number,
            maps=maps,
            noises={"conditional": step.conditional, "unconditional": step.unconditional},
            passes=2 * len(batch),
            seconds=seconds,
        )
        _observe(observing, batch, view, batch_size)
        maps.clear()  # the next step needs the memory
        begun = now(model)
        sampling.advance()
    if of_images:
        pictures = sampling.decode().images
        seconds = now(model) - begun
        for watcher in of_images:
            rows = watcher.rows(batch)
            watcher.pictures |= {batch[row]: pictures[row] for row in rows}
            watcher.seconds += seconds * len(rows) / len(batch)


def _predict(sampling: Sampling, watchers: Sequence[Watcher], images: int) -> dict[str, Tensor]:
    """Predicts a step, and returns the attention of the layers that detectors need."""
    model = sampling.model
    layers = {layer for watcher in watchers for layer in watcher.detector.layers(model, sampling.number)}
    maps: dict[str, Tensor] = {}

    def keep(layer: str, logits: Tensor) -> Tensor:
        maps[layer] = conditional_attention(logits, images)
        return logits

    with model.edit_attention(keep, tuple(layers)) if layers else nullcontext():
        sampling.predict()
    return maps


def _observe(watchers: Sequence[Watcher], batch: Sequence[_Image], view: View, batch_size: int) -> None:
    """Has detectors observe a step, and divides the time of its predictions among them."""
    needed = [watcher.observe(batch, view, batch_size) for watcher in watchers]
    for watcher, rows in zip(watchers, needed, strict=True):
        watcher.seconds += view.seconds * rows / max(view.passes, 1)
